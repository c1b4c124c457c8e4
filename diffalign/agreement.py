"""How often scores agree with people, by the rules that published accuracies use, and with each other.

A ranked prompt has K scores (higher is better) and K ranks by people (lower is better, equal ranks are a tie). The
published rules differ in what they do with ties and in what they average over, which alone moves an accuracy by several
points; each is here under its own name. All are invariant to the order of the images. Pure functions of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from diffalign.errors import UserError

AgreementRule = Literal["pickapic", "imagereward", "hps-ir", "hpdv2", "strict"]
TIE_GAPS = tuple(round(0.1 * step, 1) for step in range(11))  # that Pick-a-Pic's rule chooses from


class Points(NamedTuple):
    """Of one prompt: what its pairs earned, and how many pairs count."""

    earned: float
    num: int


@dataclass(frozen=True)
class Agreement:
    """`value` in [0, 1], NaN where no pair counts; `per_prompt` holds the prompts that have pairs which count."""

    value: float
    num_pairs: int
    per_prompt: tuple[Points, ...]
    is_pooled: bool  # over pairs; else a mean of the prompts' own values


def kappa(table: ArrayLike) -> float:
    """Cohen's kappa (p_o - p_e) / (1 - p_e) of two raters (Cohen 1960), from counts [C, C] of the first's categories
    against the second's; NaN where both always say the same one, or nothing was counted."""
    counts = np.asarray(table, float)
    total = counts.sum()
    if total == 0:
        return float("nan")
    observed = np.trace(counts) / total
    expected = float(counts.sum(axis=1) @ counts.sum(axis=0)) / total**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def verdict_tables(
    values: Float[NDArray[np.float64], "K J"], min_margin: float = 0.0
) -> Float[NDArray[np.float64], "J J 3 3"]:
    """For every two scorers, how often one said worse, tied, better of a pair and what the other said of it.

    Every pair counts half in each order, so that nothing depends on the order of the images. Sums over prompts are what
    `kappa` takes; a gap of at most `min_margin` is a tie.
    """
    return gap_tables(values[:, None] - values[None], min_margin)


def gap_tables(gaps: Float[NDArray[np.float64], "K K J"], min_margin: float = 0.0) -> Float[NDArray, "J J 3 3"]:
    """`verdict_tables` of by how much each scorer says that the row's image is better than the column's."""
    gap = gaps[~np.eye(len(gaps), dtype=bool)]  # [K (K - 1), J]
    said = np.where(np.abs(gap) <= min_margin, 0, np.sign(gap)).astype(int) + 1
    one_hot = np.eye(3)[said]  # [K (K - 1), J, 3]
    return np.einsum("pax,pby->abxy", one_hot, one_hot) / 2


def points(
    scores: ArrayLike, rank: ArrayLike, rule: AgreementRule, tie_gap: float | None = None, scale: float = 1.0
) -> Points:
    """What one prompt's pairs earn.

    `pickapic`: a tie is predicted where |p0 - p1| <= `tie_gap`, p = softmax(`scale` * scores) of the two; 1 for the
        right verdict, a half where exactly one of prediction and people is a tie, else 0.
    `imagereward`, `hps-ir`: pairs that people tied do not count; a predicted tie is wrong.
    `hpdv2`: 1 unless prediction and people are strictly opposed, so that ties of either side are right (the inversions
        of HPSv2 and MPS).
    `strict`: pairs tied by either side do not count.

    Raises:
        UserError: scores and ranks of other lengths, a score that is not finite, or pickapic without `tie_gap`.
    """
    score, place = np.asarray(scores, float), np.asarray(rank, float)
    if score.shape != place.shape or score.ndim != 1 or not np.isfinite(score).all():
        raise UserError(f"agreement needs a finite score and a rank per image (got {score.shape} and {place.shape})")
    first, second = np.triu_indices(len(score), 1)
    gap, people = score[first] - score[second], np.sign(place[second] - place[first])
    if rule == "pickapic":
        if tie_gap is None:
            raise UserError("the rule pickapic needs a tie_gap: fit it with best_tie_gap on other prompts")
        # |p0 - p1| of two softmax probabilities
        predicted = np.where(np.abs(np.tanh(scale * gap / 2)) <= tie_gap, 0, np.sign(gap))
        earned = np.where(predicted == people, 1.0, np.where((predicted == 0) != (people == 0), 0.5, 0.0))
        return Points(float(earned.sum()), len(earned))
    predicted = np.sign(gap)
    if rule == "hpdv2":
        return Points(float((predicted * people >= 0).sum()), len(people))
    counts = people != 0 if rule != "strict" else (people != 0) & (predicted != 0)
    return Points(float((predicted == people)[counts].sum()), int(counts.sum()))


def agreement(of_prompts: Sequence[Points], rule: AgreementRule) -> Agreement:
    """The prompts' points as one number: a mean over prompts for `hps-ir` and `hpdv2`, else over all pairs."""
    counted = tuple(found for found in of_prompts if found.num)
    num_pairs = sum(found.num for found in counted)
    is_pooled = rule not in ("hps-ir", "hpdv2")
    if not counted:
        return Agreement(float("nan"), 0, (), is_pooled)
    if is_pooled:
        value = sum(found.earned for found in counted) / num_pairs
    else:
        value = float(np.mean([found.earned / found.num for found in counted]))
    return Agreement(value, num_pairs, counted, is_pooled)


def best_tie_gap(ranked: Sequence[tuple[ArrayLike, ArrayLike]], scale: float = 1.0) -> float:
    """Of `TIE_GAPS` the one with the highest pickapic agreement on (scores, rank) of validation prompts; of equals the
    smallest.

    Raises:
        UserError: no prompt, or see `points`.
    """
    if not ranked:
        raise UserError("no ranked prompt to fit the tie gap on")
    values = [
        agreement([points(scores, rank, "pickapic", gap, scale) for scores, rank in ranked], "pickapic").value
        for gap in TIE_GAPS
    ]
    return TIE_GAPS[int(np.argmax(values))]
