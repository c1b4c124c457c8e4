"""Semi-policy preference optimization: the winner judges what its rival is (SePPO and SSPO, arXiv 2410.05255)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.objectives._pairs import pair_masks, split_pair
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Seppo:
    """-log sigmoid(reward_w - s reward_r), reward = beta logratio, which is -log sigmoid(-beta/2 (d_w - s d_r)).

    w is the image of higher utility, from the data; r its rival, drawn by the reference, a past checkpoint. The anchor
    A = error_ref(w) - error(w), without gradient, says what the rival is: where the policy is ahead (A >= 0) a loser
    (s = 1, Diffusion-DPO); where it is behind, the reference's own image is still worth learning from.

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 2000 in the paper.
    flip: s where A < 0: `sign` is -1, both images are pulled (SePPO); `indicator` 0, the winner alone (SSPO); `none` 1,
        which is Diffusion-DPO.

    Metrics: `flip_rate`, the share of prompts with A < 0, beside margin and accuracy of the plain pair. The anchor of
    one noise level is noisy: likelihood.draws averages it.

    Reconstructed: no training code is released and the formula was read in reviews and abstracts. Of its constants, the
    factor beta/2 on mean errors is Diffusion-DPO's code's (likely), weights by noise level are left out, and A = 0, the
    policy at its reference, is s = 1 in all three (a sign of 0 would train the winner alone). Noise shared by the two
    images is Diffusion-DPO's too. A tie, which the paper's data cannot have, is half a loss either way.
    """

    beta: float = 2000.0
    flip: Literal["sign", "indicator", "none"] = "sign"

    needs: ClassVar[frozenset[str]] = frozenset({"pair", "reference"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, tie = pair_masks(likelihoods)
        winner, rival = split_pair(self.beta * likelihoods.logratio, likelihoods.utility)
        loss = torch.where(
            tie, 0.5 * (self._loss(winner, rival) + self._loss(rival, winner)), self._loss(winner, rival)
        )
        margin = (winner - rival).detach()
        nothing = torch.full_like(margin, float("nan"))
        return LossOutput(
            per_prompt=torch.where(valid, loss, torch.zeros_like(loss)),
            metrics={
                "margin": torch.where(valid, margin, nothing),
                "implicit_accuracy": torch.where(valid & ~tie, 0.5 * (torch.sign(margin) + 1), nothing),
                "flip_rate": torch.where(valid & ~tie, (winner.detach() < 0).to(margin.dtype), nothing),
            },
        )

    def _loss(self, winner: Float[Tensor, " B"], rival: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        behind = {"sign": -1.0, "indicator": 0.0, "none": 1.0}[self.flip]
        side = torch.where(winner.detach() < 0, behind, 1.0).to(rival.dtype)  # A has the sign of the winner's reward
        return softplus(side * rival - winner)
