"""The policy with its adapter switched off: the reference of LoRA training, without a second copy of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.types import Policy, Setting


@dataclass
class AdapterOff:
    """Runs the same module under the same precision, so that at step 0 the margin is exactly 0."""

    gives: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        self.policy: Policy | None = None  # no field: it is no config key

    def bind(self, policy: Policy, setting: Setting | None = None) -> AdapterOff:
        """Remembers the policy.

        Raises:
            UserError: the policy has no adapter (full fine-tuning).
        """
        with policy.adapter_off():
            self.policy = policy
        return self

    @torch.no_grad()
    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The base network's prediction [N C H W], no gradient."""
        assert self.policy is not None, "bind first"
        with self.policy.adapter_off():
            return self.policy(xt, t, cond)

    def after_step(self, step: int) -> None:
        """The base never changes."""
