"""No reference: for objectives that need none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffalign.types import Denoiser, Setting


@dataclass(frozen=True)
class NoReference:
    """Predicts nothing and never calls a network."""

    gives: ClassVar[frozenset[str]] = frozenset()

    def bind(self, policy: Denoiser, setting: Setting | None = None) -> NoReference:
        """Nothing to hold on to."""
        return self

    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> None:
        """None: `Likelihoods.logratio` then tells the user which key is missing."""
        return None

    def after_step(self, step: int) -> None:
        """Nothing changes."""
