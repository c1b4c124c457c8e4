"""Odds-ratio preference optimization without a reference (ORPO, arXiv 2403.07691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.objectives._odds import odds_terms
from diffalign.objectives._pairs import pair_masks
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Orpo:
    """e_w - weight log sigmoid(o_w - o_l), o = log(p / (1 - p)) with p = exp(beta logp) = exp(-beta e / 2).

    e is the mean squared error. Needs errors as they are: likelihood.weighting=constant. Formula established (vector
    C-orpo); its transfer to diffusion, where p is no probability of an image, is a reconstruction.

    beta: p's exponent per unit of logp; a factor kappa in front of the error is beta = 2 kappa. 20, which makes p
        moderate at errors near 0.1, is the check vector's and not tuned.
    weight: of the odds term against the error, >= 0; 0.1, the size usual for language models, not tuned here.

    Differs from the paper/code: the diffusers research script takes the odds of mean squared errors as if they were
    log-likelihoods, which rewards a small error on the loser; here the sign is right. beta e / 2 is held above 1e-6,
    where the odds are infinite. A tie that the data keeps is half a win for each.
    """

    beta: float = 20.0
    weight: float = 0.1

    needs: ClassVar[frozenset[str]] = frozenset({"pair"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")
        if not self.weight >= 0:
            raise UserError(f"objective.weight must be at least 0 (got {self.weight})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, _ = pair_masks(likelihoods)
        error = kept(likelihoods.error, likelihoods.mask)
        log_p, log_not_p = odds_terms(0.5 * self.beta * error)
        odds = log_p - log_not_p
        loss = (winner_share(likelihoods) * (error + self.weight * softplus(odds.flip(1) - odds))).sum(dim=1)
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics=ranking_metrics(odds, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )
