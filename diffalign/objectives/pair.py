"""Pairwise preference objectives on log-ratios; with its defaults, Diffusion-DPO (arXiv 2311.12908)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import softplus

from diffalign.objectives._pairs import pair_masks, split_pair
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Pair:
    """-(1-eps) log sigmoid(margin) - eps log sigmoid(-margin), margin = beta (logratio_w - logratio_l).

    With logp = -1/2 mean squared error this is the released Diffusion-DPO loss, -log sigmoid(-beta/2 (d_w - d_l)),
    d = error minus the reference's error.

    beta: per (mean over latent dimensions) nat; 2000 to 5000 in the paper, 5000 in its code. The paper's formula (14)
        has no 1/2 and a sum of squares; METHODS.md converts.
    labels: `hard` trusts the label; `smooth` (cDPO, arXiv 2305.18290 section 3.3's noise model, Mitchell 2023) expects
        the share `flip_rate` of the labels to be wrong.
    flip_rate: eps in [0, 0.5); 0 with hard labels.

    Differs from the paper/code: a tie that the data keeps is a label of 1/2 (loss symmetric in the two images), where
    the Salesforce script drops ties and the diffusers script lets jpg_0 win.
    """

    beta: float = 5000.0
    labels: Literal["hard", "smooth"] = "hard"
    flip_rate: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pair"})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")
        if not 0 <= self.flip_rate < 0.5:
            raise UserError(f"objective.flip_rate must lie in [0, 0.5) (got {self.flip_rate})")
        if self.labels == "hard" and self.flip_rate:
            raise UserError("objective.flip_rate has no effect with hard labels: set objective.labels=smooth")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, tie = pair_masks(likelihoods)
        winner, loser = split_pair(self.beta * likelihoods.logratio, likelihoods.utility)
        margin = winner - loser
        # The probability that the stated loser is the true winner: 1/2 where nobody won.
        flip = torch.where(tie, 0.5, self.flip_rate)
        loss = (1 - flip) * softplus(-margin) + flip * softplus(margin)
        accuracy = 0.5 * (torch.sign(margin) + 1)  # an exact tie of the model counts 1/2
        nothing = torch.full_like(margin, float("nan"))
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics={
                "margin": torch.where(valid, margin, nothing).detach(),
                "implicit_accuracy": torch.where(valid & ~tie, accuracy, nothing).detach(),
            },
        )
