"""Who won: what pairwise objectives share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.types import Likelihoods, UserError


def split_pair(
    values: Float[Tensor, "B 2"], utility: Float[Tensor, "B 2"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """(winner's, loser's) values: the winner has the higher utility; at a tie the first candidate stands as winner."""
    first_wins = utility[:, 0] >= utility[:, 1]
    winner = torch.where(first_wins, values[:, 0], values[:, 1])
    loser = torch.where(first_wins, values[:, 1], values[:, 0])
    return winner, loser


def pair_masks(likelihoods: Likelihoods) -> tuple[Bool[Tensor, " B"], Bool[Tensor, " B"]]:
    """(both candidates are there, they tie) per prompt.

    Raises:
        UserError: not two candidates per prompt.
    """
    if likelihoods.utility.shape[1] != 2:
        raise UserError(
            f"a pair objective got {likelihoods.utility.shape[1]} candidates per prompt: label the data as pairs"
            " (diffalign label label.rule=best-worst) or choose a listwise objective"
        )
    return likelihoods.mask.all(dim=1), likelihoods.utility[:, 0] == likelihoods.utility[:, 1]
