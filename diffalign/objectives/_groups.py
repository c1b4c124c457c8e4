"""A prompt's candidates as a group: their rewards against the group's own mean and spread."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.objectives._lists import check_list, kept
from diffalign.types import Likelihoods

SMALLEST_STD = 1e-4  # added to a standard deviation in the codes of Flow-GRPO and DiffusionNFT


def deviations(likelihoods: Likelihoods) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B 1"]]:
    """(utility minus the mean over the prompt's candidates, their population std + 1e-4).

    Candidates of equal utilities deviate by exactly 0, those that are not there too.

    Raises:
        UserError: fewer than two candidates per prompt.
    """
    check_list(likelihoods)
    utility, mask = kept(likelihoods.utility, likelihoods.mask), likelihoods.mask
    count = mask.sum(dim=1, keepdim=True).clamp(min=1)
    best = utility.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    is_level = ((utility == best) | ~mask).all(dim=1, keepdim=True)  # whose mean may be off by a rounding
    gap = kept(utility - utility.sum(dim=1, keepdim=True) / count, mask & ~is_level)
    return gap, (gap.square().sum(dim=1, keepdim=True) / count).sqrt() + SMALLEST_STD
