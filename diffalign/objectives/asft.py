"""Aligned supervised fine-tuning through absolute likelihoods, without a reference (ASFT, arXiv 2409.10571)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.objectives._odds import odds_terms
from diffalign.objectives._pairs import pair_masks
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Asft:
    """e_w + weight [-log p_w - log(1 - p_l)], p = exp(beta logp) = exp(-beta e / 2), e the mean squared error.

    The bracket is -log sigmoid(logit p_w) - log sigmoid(-logit p_l). Needs errors as they are:
    likelihood.weighting=constant. Reconstructed: the paper's terms put on diffusion errors (vector C-asft, computed
    from the formula; no code was found).

    beta: p's exponent per unit of logp; a factor kappa in front of the error is beta = 2 kappa. 20, which makes p
        moderate at errors near 0.1, is the check vector's and not tuned.
    weight: of the bracket against the error, >= 0. The form kappa e_w + lambda [...] is weight = lambda / kappa, up to
        a factor kappa of the whole loss; 0.1 is lambda = 1 at the default beta, not tuned.

    Differs from the paper: beta e / 2 is held above 1e-6, where log(1 - p) is infinite. A tie that the data keeps is
    half a win for each.
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
        share = winner_share(likelihoods)
        loss = (share * (error - self.weight * log_p) - (1 - share) * self.weight * log_not_p).sum(dim=1)
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics=ranking_metrics(log_p - log_not_p, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )
