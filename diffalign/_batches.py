"""The batches that a likelihood takes: finished images, or recorded sampler steps. Shape letters as in `types`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True)
class EndpointBatch:
    """Finished images; the likelihood draws the noise level.

    `visits` counts how often each record was drawn before: with `ids` it addresses all randomness of the draw, which
    therefore depends neither on batch size nor on world size nor on where a run resumed.
    """

    ids: Int64[Tensor, " B"]
    visits: Int64[Tensor, " B"]
    x0: Float[Tensor, "B K C H W"]
    cond: Mapping[str, Tensor]  # opaque to all but the model family, [B, K, ...]: a caption per candidate is normal
    utility: Float[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]
    scores: Mapping[str, Float[Tensor, "B K"]] = field(default_factory=dict)  # the data's scorer columns
    region: Float[Tensor, "B K H W"] | None = None  # the data's masks at latent resolution, in [0, 1]

    def to(self, device: torch.device | str) -> EndpointBatch:
        """The same batch on `device`."""
        return replace(
            self,
            **{name: getattr(self, name).to(device) for name in ("ids", "visits", "x0", "utility", "mask")},
            cond={key: value.to(device) for key, value in self.cond.items()},
            scores={key: value.to(device) for key, value in self.scores.items()},
            region=None if self.region is None else self.region.to(device),
        )

    def __getitem__(self, rows: slice) -> EndpointBatch:
        """A slice of the prompts: micro-batches are slices of one global batch."""
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("ids", "visits", "x0", "utility", "mask")},
            cond={key: value[rows] for key, value in self.cond.items()},
            scores={key: value[rows] for key, value in self.scores.items()},
            region=None if self.region is None else self.region[rows],
        )

    def __len__(self) -> int:
        return len(self.ids)


def fold(x: Tensor) -> Tensor:
    """[B, K, ...] to [N, ...], so that all candidates go through the network in one call."""
    return x.flatten(0, 1)


@dataclass(frozen=True)
class StepBatch:
    """Recorded steps of a stochastic sampler: x_prev was drawn from p(x_s | x_t), the policy's own or another's.

    S counts the steps that make one likelihood: 1 where every step is judged for itself (D3PO, SPO, GRPO), all of a
    trajectory's where it is judged as a whole (M-DPO). The first candidate axis is 1 where all candidates left the same
    x_t (SPO): the network then runs once for all of them.
    """

    ids: Int64[Tensor, " B"]
    visits: Int64[Tensor, " B"]
    xt: Float[Tensor, "B J S C H W"]  # J is K, or 1 where the candidates share x_t
    x_prev: Float[Tensor, "B K S C H W"]
    t: Float[Tensor, "B S"]
    t_prev: Float[Tensor, "B S"]
    eta: float  # of the sampler, as `Schedule.reverse_step` takes it
    weight: Float[Tensor, "B K S"]  # of a step in the sum; 0: nobody drew it (an ODE step), or it is not there
    cond: Mapping[str, Tensor]  # [B, ...]: candidates share the prompt
    uncond: Mapping[str, Tensor] | None  # [B, ...]; None where cfg_scale is 1
    cfg_scale: float
    utility: Float[Tensor, "B K"]
    mask: Bool[Tensor, "B K"]
    pred_ref: Float[Tensor, "B J S C H W"] | None = None  # the reference's guided predictions, where they were recorded
    logp_old: Float[Tensor, "B K"] | None = None  # the same sum, of means, under the weights that drew the steps
    mean_old: Float[Tensor, "B K S C H W"] | None = None  # of the Gaussians that the steps were drawn from
    scores: Mapping[str, Float[Tensor, "B K"]] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> StepBatch:
        """The same batch on `device`."""
        return self._each(lambda value: value.to(device))

    def __getitem__(self, rows: slice) -> StepBatch:
        """A slice of the prompts: micro-batches are slices of one global batch."""
        return self._each(lambda value: value[rows])

    def __len__(self) -> int:
        return len(self.ids)

    def _each(self, change: Callable[[Tensor], Tensor]) -> StepBatch:
        changed: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, Mapping):
                changed[name] = {key: change(item) for key, item in value.items()}
        return replace(self, **changed)
