"""A bonus for what the reference finds unlikely: XPO's optimism (arXiv 2405.21046), bounded; a term of `sum`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.objectives._lists import kept
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Explore:
    """Mean over candidates of sigmoid(beta logratio), to be minimised on images that the reference drew.

    It pushes the policy away from its reference's own images, so that the pairs it draws next say something new. A term
    beside a pair: `[{name: pair, candidates: [0, 1]}, {name: explore, weight: 0.01, candidates: [2]}]`, candidate 2 the
    reference's sample; `weight` is XPO's alpha.

    beta: per unit of logp (a mean over latent dimensions), as in `pair`: nats that a unit is worth.

    Differs from the paper: its alpha log p(x) is unbounded ascent on an error. In this bounded form a term lies in
    [0, weight], its slope at the reference is beta/4, and an image already far below its reference is left alone. The
    raw form is `{name: sft, weight: -ALPHA}` in units of error (vector C-xpo). The bound is ours.
    """

    beta: float = 5000.0

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        bonus = kept(torch.sigmoid(self.beta * kept(likelihoods.logratio, mask)), mask)
        per_prompt = bonus.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return LossOutput(per_prompt=per_prompt, metrics={"explore": per_prompt.detach()})
