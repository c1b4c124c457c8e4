"""Noisy previews: both pictures of a pair noised alike, and what the frozen model takes for the clean ones.

As the step-aware model is trained in SPO (arXiv 2406.04314, section 3.2 and the released code).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import randomness
from diffalign.sampling import predict
from diffalign.types import Schedule, fold


def time_of(schedule: Schedule, timestep: int) -> float:
    """The t in [0, 1] whose network time is `timestep`; discrete schedules count from t = 1/T, flows from 0."""
    num = getattr(schedule, "num_train_timesteps", 1000)
    candidates = (min(1.0, (timestep + offset) / num) for offset in (1, 0))
    return min(candidates, key=lambda t: abs(float(schedule.network_time(torch.tensor(t))) - timestep))


class Previews:
    """Draws t and noise by address, and runs the model: no gradient, base weights, guidance as asked.

    Args:
        model: a loaded model; its adapter, where it has one, is off.
        cfg_scale: of classifier-free guidance; 1 is off.
        seed: of the addressed draws.
    """

    def __init__(self, model: Any, cfg_scale: float, seed: int) -> None:
        self.model, self.cfg_scale, self.seed = model, cfg_scale, seed
        self._empty: dict[str, Tensor] = {name: rows.float() for name, rows in model.empty_prompt().items()}

    def draw(self, ids: Tensor, visits: Tensor) -> Float[Tensor, " B"]:
        """t of each pair's draw: uniform over the network's times."""
        return self.model.schedule.sample_t(randomness.uniform(self.seed, "scorer t", ids, visits), "uniform")

    @torch.no_grad()
    def __call__(
        self, latents: Mapping[str, Any], ids: Tensor, visits: Tensor, t: Float[Tensor, " B"], stream: str = "train"
    ) -> tuple[Float[Tensor, "B 2 3 H W"], Float[Tensor, " B"]]:
        """Pictures in [0, 1] on the CPU and the network's time of each pair; `latents` as the data's cache gives them.

        The VAE's posterior is sampled, each picture apart; the noise is one for both.
        """
        model, schedule, seed = self.model, self.model.schedule, self.seed
        mean, std = latents["mean"], latents["std"]
        num, candidates = mean.shape[:2]
        x0 = mean + std * randomness.normal(seed, f"scorer posterior {stream}", ids, visits, mean.shape[1:])
        noise = randomness.normal(seed, f"scorer noise {stream}", ids, visits, mean.shape[2:])
        noise = noise[:, None].expand_as(x0)  # shared by the two, as released
        times = t.repeat_interleave(candidates).to(model.device)
        x0, noise = (fold(values).to(model.device) for values in (x0, noise))
        size = torch.tensor(model.resolution).expand(num * candidates, 2)
        sizes = model.size_cond(size, torch.zeros_like(size), size)
        cond = {name: fold(rows) for name, rows in latents["text"].items()} | sizes
        empty = {name: rows.expand(num * candidates, *rows.shape[1:]) for name, rows in self._empty.items()} | sizes
        cond, uncond = ({name: rows.to(model.device) for name, rows in of.items()} for of in (cond, empty))
        xt = schedule.add_noise(x0, noise, times)
        with model.adapter_off():
            pred = predict(model, xt, times, cond, uncond, self.cfg_scale).float()
        pixels = model.decode(schedule.to_x0(pred, xt, times))
        return pixels.unflatten(0, (num, candidates)), schedule.network_time(t)
