"""LambdaLoss over ranked lists: RankDPO (arXiv 2410.18013) and LiPO-lambda (arXiv 2402.01878)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from diffalign.objectives._lists import check_list, kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class LambdaRank:
    """sum_{u_i > u_j} (2^u_i - 2^u_j) |1/ln(1 + rank_i) - 1/ln(1 + rank_j)| softplus(-(reward_i - reward_j)).

    reward = beta logratio, u the utility; the weights carry no gradient. Two candidates: a constant times Diffusion-DPO
    (0.532456 for utilities 1 and 0). Formula established (RankDPO's text; vectors C-lambda), its settings are not:

    beta: per unit of logp (a mean over latent dimensions), as in `pair`. RankDPO publishes none; 5000 is
        Diffusion-DPO's. The paper's factor in front of a mean error difference, beta (s_j - s_i), is half of ours.
    rank_by: `label` ranks by utility, best is 1 (RankDPO's algorithm 2); `model` by the current reward (RankDPO's
        figure, LiPO), where a tie of the rewards, as at the reference, goes by utility.

    Utility is a graded label, in RankDPO the share of comparisons won in [0, 1]; a raw score of 20 would weigh 2^20.

    Differs from the papers: the base of the logarithm is unstated, e here (another base rescales the loss). Candidates
    tied in the ranking take the mean of their ranks, so that the order of the list does not matter.
    """

    beta: float = 5000.0
    rank_by: Literal["label", "model"] = "label"

    needs: ClassVar[frozenset[str]] = frozenset({"reference", "list"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        check_list(likelihoods)
        better = ordered_pairs(likelihoods.utility, likelihoods.mask)
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        gain = torch.exp2(kept(likelihoods.utility, likelihoods.mask))
        discount = 1 / torch.log1p(self._rank(likelihoods, reward.detach()))
        weight = (gain[:, :, None] - gain[:, None, :]) * (discount[:, :, None] - discount[:, None, :]).abs()
        loss = weight * softplus(reward[:, None, :] - reward[:, :, None])
        return LossOutput(
            per_prompt=torch.where(better, loss, torch.zeros_like(loss)).sum(dim=(1, 2)),
            metrics=ranking_metrics(reward, better),
        )

    def _rank(self, likelihoods: Likelihoods, reward: Tensor) -> Float[Tensor, "B K"]:
        """1 for the best; 1 + the number above + half the number tied with."""
        mask = likelihoods.mask
        above = ordered_pairs(likelihoods.utility, mask)
        if self.rank_by == "model":
            above = ordered_pairs(reward, mask) | ((reward[:, :, None] == reward[:, None, :]) & above)
        tied = mask[:, :, None] & mask[:, None, :] & ~above & ~above.transpose(1, 2)  # each with itself too
        return (0.5 + above.sum(dim=1) + 0.5 * tied.sum(dim=1)).to(reward.dtype)
