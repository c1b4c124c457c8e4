"""A frozen copy of the policy as it was before training: the reference of full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.types import Policy, Setting


@dataclass
class Frozen:
    """Costs a second copy of the denoiser's weights; everything else is shared with the policy."""

    gives: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        self.policy: Policy | None = None  # no field: it is no config key

    def bind(self, policy: Policy, setting: Setting | None = None) -> Frozen:
        """Copies the denoiser as it is now: call it before a checkpoint is loaded."""
        clone = copy.copy(policy)
        clone.denoiser = copy.deepcopy(policy.denoiser).requires_grad_(False)
        self.policy = clone
        return self

    @torch.no_grad()
    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The copy's prediction [N C H W], no gradient."""
        assert self.policy is not None, "bind first"
        return self.policy(xt, t, cond)

    def after_step(self, step: int) -> None:
        """The copy never changes."""
