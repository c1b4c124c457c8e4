"""Pieces of every source that samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from diffalign import randomness
from diffalign.data import PromptCond
from diffalign.schedule import RectifiedFlow
from diffalign.sources._rounds import Place
from diffalign.types import Reference, Schedule, Setting, UserError


def stochastic_sampler(schedule: Schedule, eta: float | None, is_recorded: bool) -> tuple[str, float]:
    """(sampler, eta) of a rollout: DDIM or the flow SDE; without noise the ODE of either.

    By default a recorded step has DDPM's variance (eta 1, as in D3PO's and SPO's codes) or Flow-GRPO's noise level 0.7.
    """
    is_flow = isinstance(schedule, RectifiedFlow)
    if eta is None:
        eta = (0.7 if is_flow else 1.0) if is_recorded else 0.0
    if is_flow:
        return ("flow-sde" if eta else "flow-euler"), eta
    return "ddim", eta


@dataclass(frozen=True)
class RolloutSampling:
    """How a rollout is sampled.

    eta: noise of a step; default 1 (DDIM with ancestral variance) or 0.7 (the flow SDE) where steps are recorded, 0
        (the ODE) where images are.
    noisy: part of the steps, from the first (0) to the last (1), that adds noise and is recorded; the others are ODE
        steps, which nobody drew and which therefore count nothing.
    batch_size: images per call.
    """

    num_steps: int = 20
    cfg_scale: float = 5.0
    eta: float | None = None
    noisy: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 16

    def __post_init__(self) -> None:
        low, high = self.noisy
        if not 0 <= low < high <= 1:
            raise UserError(f"source.sampling.noisy must be two numbers 0 <= first < last <= 1 (got {low}, {high})")
        if self.batch_size < 1:
            raise UserError(f"source.sampling.batch_size must be at least 1 (got {self.batch_size})")


class ReferenceDenoiser:
    """A reference as something to sample from."""

    def __init__(self, reference: Reference, schedule: Schedule) -> None:
        self._reference, self.schedule = reference, schedule

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        pred = self._reference.predict(xt, t, cond, torch.zeros(len(xt), dtype=torch.int64))
        assert pred is not None, "a source asks only a reference that is one"
        return pred


class Mixed:
    """Some rows from one denoiser, the others from another: own pictures and the reference's in one sampling."""

    def __init__(self, policy: Any, other: ReferenceDenoiser, is_other: Bool[Tensor, " N"]) -> None:
        self._policy, self._other, self._is_other, self.schedule = policy, other, is_other, policy.schedule

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        rows = self._is_other.repeat(len(xt) // len(self._is_other))  # twice with guidance
        parts = []
        for denoiser, chosen in ((self._policy, ~rows), (self._other, rows)):
            parts.append(denoiser(xt[chosen], t[chosen], {name: value[chosen] for name, value in cond.items()}))
        result = torch.empty_like(xt, dtype=parts[0].dtype)
        result[~rows], result[rows] = parts
        return result


def prompts_of_part(
    place: Place, cond: PromptCond, per_part: int, per_round: int, setting: Setting
) -> tuple[Int64[Tensor, " P"], Int64[Tensor, " P"]]:
    """Places in the list and ids of a part's prompts: the next of an endless stream, re-permuted every epoch."""
    num, start = len(cond.prompts), place.part * per_part
    positions = range(place.round * per_round + start, place.round * per_round + min(start + per_part, per_round))
    places = [randomness.permute(p % num, num, setting.seed, "prompts", p // num) for p in positions]
    ids = [randomness.address("rollout", place.attempt, position) for position in positions]
    return torch.tensor(places), torch.tensor(ids)
