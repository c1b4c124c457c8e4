"""Every ordered pair of a list, weighed alike (the pairwise losses of LiPO's comparison, arXiv 2402.01878)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import relu, softplus

from diffalign.objectives._lists import check_list, kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class AllPairs:
    """mean_{utility_i > utility_j} link(reward_i - reward_j), reward = beta logratio.

    Established (vector C-allpairs). With two candidates and the logistic link this is Diffusion-DPO.

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 5000 is Diffusion-DPO's, no list value is
        published for images. A factor B in front of error differences, B (k - e), is beta = 2 B.
    link: `logistic` softplus(-margin); `hinge` max(0, 1 - margin) (SLiC-HF, arXiv 2305.10425).

    Differs from `pair`: candidates of equal utility form no pair, so that a prompt whose candidates all tie has loss 0.
    """

    beta: float = 5000.0
    link: Literal["logistic", "hinge"] = "logistic"

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "list"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        check_list(likelihoods)
        better = ordered_pairs(likelihoods.utility, likelihoods.mask)
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        margin = reward[:, :, None] - reward[:, None, :]
        loss = softplus(-margin) if self.link == "logistic" else relu(1 - margin)
        total = torch.where(better, loss, torch.zeros_like(loss)).sum(dim=(1, 2))
        return LossOutput(
            per_prompt=total / better.sum(dim=(1, 2)).clamp(min=1), metrics=ranking_metrics(reward, better)
        )
