"""log p and log(1 - p) for p = exp(-x): what objectives on absolute likelihoods share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-6  # below it log(1 - p) goes to -inf: no value and no gradient of use


def odds_terms(x: Float[Tensor, "B K"]) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """(log p, log(1 - p)) of p = exp(-x), x a positive multiple of the error, both finite with finite gradients."""
    x = x.clamp(min=FLOOR)
    return -x, torch.log(-torch.expm1(-x))
