"""The policy as its run began: the reference of a run that starts from trained weights, such as a later stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.references._swapped import SwappedWeights
from diffalign.types import Policy, Setting


@dataclass
class Start:
    """Keeps a copy of the trainable tensors alone and runs the policy's own network with them.

    `adapter_off` is the base model whatever adapter the run began from; this is base and that adapter. Policy and
    reference run the same module, so that at step 0 the margin is exactly 0 (with LoRA dropout, up to its noise).
    """

    gives: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        self._weights: SwappedWeights | None = None  # no field: it is no config key

    def bind(self, policy: Policy, setting: Setting | None = None) -> Start:
        """Copies the trainable tensors as they are now: call it before a checkpoint is loaded."""
        self._weights = SwappedWeights(policy)
        return self

    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The start's prediction [N C H W], no gradient."""
        assert self._weights is not None, "bind first"
        return self._weights.predict(xt, t, cond)

    def after_step(self, step: int) -> None:
        """The copy never changes."""
