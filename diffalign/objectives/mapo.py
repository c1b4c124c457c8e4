"""Margin-aware preference optimization without a reference: MaPO (arXiv 2406.06424)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.objectives._pairs import pair_masks
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Mapo:
    """code: e_w - beta log sigmoid(T [f(s e_w) - f(s e_l)]); paper: e_w - log sigmoid(f(e_w)^beta - f(e_l)^beta)/beta.

    f(x) = x / (exp(x) - 1), falling from f(0) = 1; e is the mean squared error. Needs errors as they are:
    likelihood.weighting=constant. The code form is established (vectors C-mapo and the MaPO set); the paper's power is
    read off its typesetting (a factor beta f is the other reading, less likely).

    form: `code` is what was released and trained; `paper` is the second version's formula. They are not one loss: at
        their defaults the code's preference gradient is about 50 times the paper's.
    beta: code: weight of the preference term, 0.1 by default. Paper: f's exponent and 1 / weight; 8 for general
        preferences (the paper's choice), 32 to 1024 for other tasks. Null takes the form's own.
    timesteps: T, code only: the factor of the margin, the schedule's 1000 in the release.
    steepness: s > 0, code only; 0.5.

    Differs from the code: finite where it is not (float32: error 0 gives nan there, s e above 88 too), by expm1 and
    a series near 0. A tie that the data keeps is half a win for each.
    """

    form: Literal["code", "paper"] = "code"
    beta: float | None = None
    timesteps: float = 1000.0
    steepness: float = 0.5

    needs: ClassVar[frozenset[str]] = frozenset({"pair"})

    def __post_init__(self) -> None:
        for name in ("beta", "timesteps", "steepness"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name} must be positive (got {value})")
        if self.form == "paper" and (self.timesteps != 1000 or self.steepness != 0.5):
            raise UserError("objective.timesteps and objective.steepness have no effect with objective.form=paper")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, _ = pair_masks(likelihoods)
        error = kept(likelihoods.error, likelihoods.mask)
        if self.form == "code":
            weight = 0.1 if self.beta is None else self.beta
            reward = self.timesteps * torch.expm1(log_f(self.steepness * error))  # f - 1: no digits lost in differences
        else:
            power = 8.0 if self.beta is None else self.beta
            weight = 1 / power
            reward = torch.exp(power * log_f(error))  # however small: a high power leaves only its relative size
        loss = (winner_share(likelihoods) * (error + weight * softplus(reward.flip(1) - reward))).sum(dim=1)
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics=ranking_metrics(reward, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )


def log_f(x: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """log(x / (exp(x) - 1)) for x >= 0, exact and with an exact gradient from 0 to the largest float."""
    small = x < 0.1
    # Each branch gets an argument it can bear: where() alone would still let nan through in the backward pass.
    near, far = torch.where(small, x, torch.zeros_like(x)), torch.where(small, torch.ones_like(x), x)
    square = near.square()
    series = -0.5 * near - square * (1 / 24 - square * (1 / 2880 - square / 181440))
    closed = torch.log(far) - far - torch.log(-torch.expm1(-far))
    return torch.where(small, series, closed)
