"""Binary classifier optimization: is this image better than the reference's, yes or no (arXiv 2404.04656)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Bco:
    """sum over a prompt's candidates of -log sigmoid(y (reward - delta)), reward = beta logratio, y = +-1.

    For a pair -log sigmoid(reward_w - delta) - log sigmoid(delta - reward_l). Established (vector C-bco, shift 0).

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; 5000 is Diffusion-DPO's, no value is published
        for images. A factor B in front of error differences, B (k - e), is beta = 2 B.
    shift: delta. `batch` is the mean reward of all valid candidates of the rows given, without gradient; `none` is 0.

    A candidate is a yes where its utility is above 1/2 and a no elsewhere, at 1/2 too (a tie that was kept): drop ties.

    Differs from the paper/code: the paper weighs desirable and undesirable means equally and the released trainers keep
    a running mean; here delta is the plain mean of one call's rows (the same for pairs, up to the running), so that the
    objective has no memory; with micro-batches or several processes it is over fewer images.
    """

    beta: float = 5000.0
    shift: Literal["batch", "none"] = "batch"

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        desirable = likelihoods.utility > 0.5
        reward = self.beta * kept(likelihoods.logratio, mask)
        shift = torch.zeros_like(reward[0, 0])
        if self.shift == "batch":
            shift = reward.detach().sum() / mask.sum().clamp(min=1)
        loss = softplus(torch.where(desirable, shift - reward, reward - shift))
        return LossOutput(
            per_prompt=kept(loss, mask).sum(dim=1),
            metrics={
                **ranking_metrics(reward, ordered_pairs(desirable.to(reward.dtype), mask)),
                "shift": shift.expand(len(reward)),
            },
        )
