"""Plackett-Luce likelihood of a whole ranking; with `temperature: gap`, PRO (arXiv 2306.17492)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.objectives._lists import check_list, kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class PlackettLuce:
    """sum_k [logsumexp(reward_k, {reward_i : utility_i < utility_k}) - reward_k], reward = beta logratio.

    Each candidate is to be chosen out of itself and everything below it. With two candidates this is Diffusion-DPO.
    Established (vectors C-pl, C-ladder); the gap form (C-pro) was reconstructed from PRO's formula, no code was run.

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 5000 is Diffusion-DPO's, no list value is
        published for images. A factor B in front of error differences, B (k - e), is beta = 2 B.
    temperature: `constant` is 1 everywhere. `gap` multiplies, at the position of candidate k, the reward of each lower
        candidate i by utility_k - utility_i and k's own by the largest such gap, so that clear wins count more; utility
        must then be a score in sensible units. It is not invariant to a constant added to all rewards.

    Differs from the papers: candidates of equal utility are not ordered against each other: neither stands in the
    other's denominator (the papers assume strict rankings). PRO's SFT term is `sum` with `sft`.
    """

    beta: float = 5000.0
    temperature: Literal["constant", "gap"] = "constant"

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "list"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        check_list(likelihoods)
        utility = likelihoods.utility
        better = ordered_pairs(utility, likelihoods.mask)
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        own, other = reward[:, :, None], reward[:, None, :]
        if self.temperature == "gap":
            gap = utility[:, :, None] - utility[:, None, :]
            gap = torch.where(better, gap, torch.zeros_like(gap))
            own, other = own * gap.amax(dim=2, keepdim=True), other * gap
        # The chosen one's own term is exp(0): an empty position, with nobody below, costs exactly 0.
        excess = (other - own).masked_fill(~better, -torch.inf)
        positions = torch.logsumexp(torch.cat([torch.zeros_like(excess[:, :, :1]), excess], dim=2), dim=2)
        return LossOutput(per_prompt=positions.sum(dim=1), metrics=ranking_metrics(reward, better))
