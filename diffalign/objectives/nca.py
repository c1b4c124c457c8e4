"""Noise contrastive alignment of pairs (arXiv 2402.05369): a winner's reward must rise, not only the gap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.objectives._pairs import pair_masks
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Nca:
    """-log sigmoid(reward_w) - 1/2 log sigmoid(-reward_w) - 1/2 log sigmoid(-reward_l), reward = beta logratio.

    Established (vector C-nca). The winner's reward is pulled to a finite value (ln 2), the loser's ever down.

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 5000 is Diffusion-DPO's, no value is published
        for images. A factor B in front of error differences, B (k - e), is beta = 2 B.

    Differs from the paper/code: a tie that the data keeps is half a win for each (in the paper, equal rewards).
    """

    beta: float = 5000.0

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pair"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, _ = pair_masks(likelihoods)
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        loss = (winner_share(likelihoods) * softplus(-reward) + 0.5 * softplus(reward)).sum(dim=1)
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics=ranking_metrics(reward, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )
