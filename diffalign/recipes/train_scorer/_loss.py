"""The loss of preference scorers, as in PickScore's and SPO's released training code (no in-batch negatives)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def pair_loss(scores: Float[Tensor, "B 2"], label: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Cross entropy of softmax(scores) to (label, 1 - label), less ln 2 for a tie, so that a matched tie costs 0.

    `label` is the probability that the first picture is preferred: the Bradley-Terry model with scores as logits
    (arXiv 2406.04314, eq. 8; arXiv 2305.01569, eq. 2 and the paragraph after).
    """
    target = torch.stack([label, 1 - label], dim=1)
    entropy = -(target * scores.log_softmax(dim=1)).sum(dim=1)
    return entropy - math.log(2) * (label == 0.5).to(entropy)


def prompt_weights(counts: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1 / (pairs of the same prompt in the data), made to sum to 1 over the global batch."""
    weights = 1 / counts
    return weights / weights.sum()


def label_of(utility: Sequence[float]) -> float:
    """The label of a pair: the first of two probabilities that sum to 1, else who is higher."""
    first, second = utility
    if min(first, second) >= 0 and abs(first + second - 1) < 1e-6:
        return float(first)
    return 0.5 if first == second else float(first > second)


def pseudo_label(scores: Sequence[float], scale: float, tie_gap: float) -> float:
    """The label that another scorer's two scores give: P_0 - P_1 = tanh(scale (s_0 - s_1) / 2) beyond the tie gap.

    As for SPO's SDXL model (released code): above 0.1 the first wins, below -0.1 the second, else a tie.
    """
    gap = math.tanh(scale * (scores[0] - scores[1]) / 2)
    return 0.5 if abs(gap) <= tie_gap else float(gap > 0)
