"""The states of a branching sampler on their way, and the network that moves them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffalign import randomness
from diffalign.data import PromptCond
from diffalign.sampling import log_density, predict

if TYPE_CHECKING:
    from diffalign.sources.branching import Branching


@dataclass(frozen=True)
class Transition:
    """One step of all candidates [P, k, ...] with the moments it was drawn from."""

    index: int
    xt: Float[Tensor, "P k C h w"]
    x_prev: Float[Tensor, "P k C h w"]
    logp: Float[Tensor, "P k"]


class Chain:
    """The states of a part's prompts on their way, and the network that moves them."""

    def __init__(
        self,
        *,
        policy: Any,
        cond: PromptCond,
        source: Branching,
        grid: Sequence[tuple[float, float]],
        eta: float,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        prompts: Int64[Tensor, " P"],
        ids: Int64[Tensor, " P"],
    ) -> None:
        self.policy, self.source, self.grid, self.eta, self.seed, self.ids = policy, source, grid, eta, seed, ids
        self.autocast, self.network_rows = autocast, 0
        self.device, self.schedule = policy.device, policy.schedule
        self.shape = policy.latent_shape(*policy.resolution)
        self.cond = {name: x.to(self.device) for name, x in cond.cond(prompts).items()}
        self.uncond = {name: x.to(self.device) for name, x in cond.uncond(len(prompts)).items()}
        self.xt = self._rounded(self._noise("start", 1)[:, 0])

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(getattr(torch, self.source.latents)).float()

    def _noise(self, stream: str, copies: int) -> Float[Tensor, "P copies C h w"]:
        rows = self.ids.repeat_interleave(copies)
        numbers = torch.arange(copies).repeat(len(self.ids))
        drawn = randomness.normal(self.seed, stream, rows, numbers, self.shape)
        return drawn.unflatten(0, (len(self.ids), copies)).to(self.device)

    def _times(self, num: int, index: int) -> tuple[Tensor, Tensor]:
        t, s = self.grid[index]
        return torch.full((num,), t, device=self.device), torch.full((num,), s, device=self.device)

    def predict(self, xt: Float[Tensor, "N C h w"], index: int, copies: int) -> Float[Tensor, "N C h w"]:
        """The guided prediction of all rows, `copies` of each prompt, in one call."""
        cond, uncond = (
            {name: x.repeat_interleave(copies, dim=0) for name, x in part.items()} for part in (self.cond, self.uncond)
        )
        scale = self.source.sampling.cfg_scale
        self.network_rows += len(xt) * (1 if scale == 1 else 2)
        with self.autocast():
            return predict(self.policy, xt, self._times(len(xt), index)[0], cond, uncond, scale).float()

    def step(self, index: int) -> None:
        """One ordinary stochastic step of the chain."""
        pred = self.predict(self.xt, index, copies=1)
        mean, std = self.schedule.reverse_step(pred, self.xt, *self._times(len(self.xt), index), self.eta)
        self.xt = self._rounded(mean + std * self._noise(f"step {index}", 1)[:, 0])

    def preview(self, xt: Float[Tensor, "N C h w"], pred: Tensor, index: int, copies: int) -> Float[Tensor, "N C h w"]:
        """The clean latents to which steps of the ODE lead from `xt`, `pred` being its prediction at step `index`."""
        num = min(self.source.preview_steps, len(self.grid) - index)
        stops = [index + (len(self.grid) - index) * i // num for i in range(num)]
        for stop, following in itertools.pairwise(stops):
            times = torch.full((len(xt),), self.grid[following][0], device=self.device)
            xt, _ = self.schedule.reverse_step(pred, xt, self._times(len(xt), stop)[0], times, 0.0)
            pred = self.predict(xt, following, copies)
        return self.schedule.to_x0(pred, xt, self._times(len(xt), stops[-1])[0])

    def branch(self, steps: Sequence[int], pred: Tensor | None) -> list[Transition]:
        """The candidates' ways through a window of steps that add noise: all from the chain's x_t, then each on its
        own."""
        assert pred is not None, "a window follows a prediction"
        num, k = len(self.xt), self.source.candidates
        xt = self.xt[:, None].expand(num, k, *self.shape)
        path: list[Transition] = []
        for index in steps:
            if path:
                moments_pred = self.predict(xt.flatten(0, 1), index, copies=k).unflatten(0, (num, k))
            else:
                moments_pred = pred[:, None].expand(num, k, *self.shape)
            times = self._times(num * k, index)
            mean, std = self.schedule.reverse_step(moments_pred.flatten(0, 1), xt.flatten(0, 1), *times, self.eta)
            noise = self._noise(f"pool {index}", k).flatten(0, 1)
            x_prev = self._rounded(mean + std * noise)
            logp = log_density(x_prev, mean, std).flatten(1).mean(dim=1)
            path.append(Transition(index, xt, x_prev.unflatten(0, (num, k)), logp.unflatten(0, (num, k))))
            xt = path[-1].x_prev
        return path
