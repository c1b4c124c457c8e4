"""Kahneman-Tversky optimization of single images, liked or not: Diffusion-KTO (arXiv 2404.04465; KTO 2402.01306)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Kto:
    """mean over a prompt's candidates of lambda_y (1 - h(y (reward - z))), reward = beta logratio, y = +-1.

    Established: the released code's loss (vectors C-kto and the KTO set of 2404.04465's code).

    beta: per unit of logp (a mean over latent dimensions). The code multiplies the error difference k - e = 2 logratio
        by its B, so beta = 2 B: 10000 is the paper's 5000, 2000 the script's default of 1000.
    lambda_desirable, lambda_undesirable: weights > 0 of the two kinds; 1 in the code. A candidate is desirable where
        its utility is above 1/2 and undesirable elsewhere, at 1/2 too (a tie that was kept): drop ties.
    zero_point: z. `batch` is the mean reward of all valid candidates of the rows given, at least 0, without gradient;
        `none` is 0.
    utility_shape: `kahneman-tversky` h = sigmoid; `loss-averse` h = log sigmoid, which keeps pulling at bad images.

    Differs from the paper/code: z is over the rows of one call, so with micro-batches or several processes it is over
    fewer images than the code's mean over all processes, and the loss depends on the split; `none` does not. The
    paper's sampling (80 % desirable) is the source's matter. The risk-seeking shapes are left out: the paper's and the
    code's differ.
    """

    beta: float = 10000.0
    lambda_desirable: float = 1.0
    lambda_undesirable: float = 1.0
    zero_point: Literal["batch", "none"] = "batch"
    utility_shape: Literal["kahneman-tversky", "loss-averse"] = "kahneman-tversky"

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        for name in ("beta", "lambda_desirable", "lambda_undesirable"):
            if not getattr(self, name) > 0:
                raise UserError(f"objective.{name} must be positive (got {getattr(self, name)})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        desirable = likelihoods.utility > 0.5
        reward = self.beta * kept(likelihoods.logratio, mask)
        zero = torch.zeros_like(reward[0, 0])
        if self.zero_point == "batch":
            zero = (reward.detach().sum() / mask.sum().clamp(min=1)).clamp(min=0)
        value = torch.where(desirable, reward - zero, zero - reward)
        weight = torch.where(desirable, self.lambda_desirable, self.lambda_undesirable).to(reward.dtype)
        # 1 - sigmoid(v) = sigmoid(-v) and 1 - log sigmoid(v), without cancellation
        loss = torch.sigmoid(-value) if self.utility_shape == "kahneman-tversky" else 1 + softplus(-value)
        return LossOutput(
            per_prompt=kept(weight * loss, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1),
            metrics={
                **ranking_metrics(reward, ordered_pairs(desirable.to(reward.dtype), mask)),
                "zero_point": zero.expand(len(reward)),
            },
        )
