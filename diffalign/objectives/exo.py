"""Efficient exact optimization on pairs (EXO, arXiv 2402.00856): the mode-seeking KL, policy first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.objectives._pairs import pair_masks
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Exo:
    """KL(softmax(reward_w, reward_l) || (1 - eps, eps)), reward = beta logratio.

    Established (vector C-exo). Its minimum is at margin = ln((1 - eps) / eps), 6.9 by default, beyond which it pulls
    back; where the model is far on the wrong side the gradient vanishes (a small probability times its logarithm).

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 5000 is Diffusion-DPO's, no value is published
        for images. A factor B in front of error differences, B (k - e), is beta = 2 B.
    flip_rate: eps in (0, 0.5), the loser's probability in the target; 0.001 is that of public trainers.

    Differs from the paper/code: a tie that the data keeps has the target (1/2, 1/2).
    """

    beta: float = 5000.0
    flip_rate: float = 1e-3

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pair"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")
        if not 0 < self.flip_rate < 0.5:
            raise UserError(f"objective.flip_rate must lie in (0, 0.5) (got {self.flip_rate})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, _ = pair_masks(likelihoods)
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        target = self.flip_rate + (1 - 2 * self.flip_rate) * winner_share(likelihoods)
        log_policy = torch.log_softmax(reward, dim=1)
        # Where a candidate is missing the target may be anything: valid removes it.
        loss = (log_policy.exp() * (log_policy - target.log())).sum(dim=1)
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics=ranking_metrics(reward, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )
