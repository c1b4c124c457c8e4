"""Who is above whom: what listwise and pointwise objectives share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.types import Likelihoods, UserError


def check_list(likelihoods: Likelihoods) -> None:
    """Refuses single images.

    Raises:
        UserError: fewer than two candidates per prompt.
    """
    if likelihoods.utility.shape[1] < 2:
        raise UserError(
            "a listwise objective got 1 candidate per prompt: give it pairs or ranked lists, or choose a pointwise"
            " objective (objective.name=kto, bco)"
        )


def kept(values: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """`values`, 0 with no gradient where there is no candidate, whatever stands there."""
    return torch.where(mask, values, torch.zeros_like(values))


def ordered_pairs(values: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Bool[Tensor, "B K K"]:
    """[b, i, j]: candidates i and j are both there and i has the higher value. Ties order nothing."""
    return (values[:, :, None] > values[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def winner_share(likelihoods: Likelihoods) -> Float[Tensor, "B K"]:
    """1 for the candidate of highest utility, 0 for the others; candidates tied for best share the 1 equally."""
    utility = likelihoods.utility.masked_fill(~likelihoods.mask, -torch.inf)
    best = (utility == utility.amax(dim=1, keepdim=True)) & likelihoods.mask
    return best / best.sum(dim=1, keepdim=True).clamp(min=1).to(utility.dtype)


def ranking_metrics(rewards: Float[Tensor, "B K"], better: Bool[Tensor, "B K K"]) -> Mapping[str, Tensor]:
    """Means over a prompt's ordered pairs, NaN where nobody won: the reward gap, and how often its sign is right."""
    gap = (rewards[:, :, None] - rewards[:, None, :]).detach()
    count = better.sum(dim=(1, 2)).to(gap.dtype)  # 0 / 0 is the NaN
    right = 0.5 * (torch.sign(gap) + 1)  # an exact tie of the model counts 1/2
    return {
        "margin": torch.where(better, gap, torch.zeros_like(gap)).sum(dim=(1, 2)) / count,
        "implicit_accuracy": torch.where(better, right, torch.zeros_like(gap)).sum(dim=(1, 2)) / count,
    }
