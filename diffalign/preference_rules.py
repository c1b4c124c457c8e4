"""Which of several images is better, from the scores of one scorer or of many: pure rules, no files and no models.

Shared by `diffalign label` and by the judge of rollouts. Shape letters: K images of one prompt, J scorers; scores are
higher-is-better and finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

Prefer = Literal["sum", "votes", "maximin", "pareto", "jury", "pairwise"]
Pairing = Literal["best-worst", "best-vs-rest", "all-pairs"]


@dataclass(frozen=True)
class Verdict:
    """What the scorers say of every two images; row against column.

    wins: the row's image is better. Where neither is, the two are tied or disputed.
    size: by how much, in the unit of the rule; size.T = -size.
    extremes: (best, worst) where the rule names them itself, which need not be the largest `size`.
    extremes_differ: whether some score of theirs does, by more than the margin.
    """

    wins: Bool[NDArray[np.bool_], "K K"]
    size: Float[NDArray[np.float64], "K K"]
    extremes: tuple[int, int] | None = None
    extremes_differ: bool = False


def standardised(values: Float[NDArray[np.float64], "K J"]) -> Float[NDArray[np.float64], "K J"]:
    """Every column with mean 0 and standard deviation 1 over the images; a constant column is 0."""
    centred = values - values.mean(axis=0)
    spread = values.std(axis=0)
    return centred / np.where(spread > 0, spread, 1)


def vote_shares(values: Float[NDArray[np.float64], "K J"]) -> Float[NDArray[np.float64], " K"]:
    """Share of its comparisons that each image wins, over all scorers and other images, in [0, 1].

    Syn-Pic's labels (RankDPO, arXiv 2410.18013): C_i / (J (K - 1)), where image i gets a point for each scorer and each
    image that it beats. A tie gives neither a point, so without ties the shares add to K / 2. Only orders count:
    scorers' units do not matter.
    """
    num, judges = values.shape
    assert num > 1 and judges > 0
    return (values[:, None] > values[None]).sum(axis=(1, 2)) / (judges * (num - 1))


def utility(
    values: Float[NDArray[np.float64], "K J"], prefer: Prefer, weights: Sequence[float] | NDArray[np.float64]
) -> Float[NDArray[np.float64], " K"]:
    """One number per image: the weighted sum, `vote_shares`, or for `maximin` the worst of its standardised scores.

    `pareto` and `jury` compare two images at a time and order nothing; theirs is the weighted sum too. Of `pairwise`,
    whose `values` [K K] are P(row beats column), it is the mean probability to beat the others.
    """
    if prefer == "pairwise":
        return (values.sum(axis=1) - values.diagonal()) / max(1, len(values) - 1)
    if prefer == "votes":
        return vote_shares(values)
    if prefer == "maximin":
        return standardised(values).min(axis=1)
    return values @ np.asarray(weights, float)


def compare(
    values: Float[NDArray[np.float64], "K J"],
    prefer: Prefer,
    weights: Sequence[float] | NDArray[np.float64],
    min_margin: float = 0.0,
    min_agreement: float = 0.5,
) -> Verdict:
    """Every two images by one of the rules.

    `sum`, `votes`, `maximin`: the utilities differ by more than `min_margin`; `size` is the difference.
        `maximin` (DSTC) names its extremes: argmax_i min_k S_ik against argmin_i max_k S_ik, S standardised.
    `pareto` (D3PO's code): nowhere worse and somewhere better by more than `min_margin`; a negative weight turns a
        scorer round. `size` is the weighted sum of the gaps.
    `jury`: a scorer votes where its gap exceeds `min_margin`; the majority wins where at least `min_agreement` of all
        scorers, abstentions among them, voted for it. `size` is (votes for - votes against) / J.
    `pairwise`: `values` [K K] are P(row beats column) of a judge who compares two images at a time, perhaps in a
        circle; `size` is P(i over j) - P(j over i). The extremes are the images that win most and least on the mean.
    """
    if prefer == "pairwise":
        size, share = values - values.T, utility(values, prefer, weights)
        best, worst = int(share.argmax()), int(share.argmin())
        return Verdict(size > min_margin, size, (best, worst), bool(size[best, worst] > min_margin))
    if prefer == "pareto":
        signed = np.asarray(weights, float)
        gap = (values[:, None] - values[None]) * np.sign(signed)
        wins = (gap >= 0).all(axis=2) & (gap > min_margin).any(axis=2)
        return Verdict(wins, (gap * np.abs(signed)).sum(axis=2))
    if prefer == "jury":
        votes = ((values[:, None] - values[None]) > min_margin).mean(axis=2)
        # a share such as 4/5 must reach a bound written as 0.8
        return Verdict((votes > votes.T) & (votes >= min_agreement - 1e-9), votes - votes.T)
    of_each = utility(values, prefer, weights)
    size = of_each[:, None] - of_each[None]
    if prefer != "maximin":
        return Verdict(size > min_margin, size)
    standard = standardised(values)
    best, worst = int(standard.min(axis=1).argmax()), int(standard.max(axis=1).argmin())
    differ = best != worst and bool((np.abs(values[best] - values[worst]) > min_margin).any())
    return Verdict(size > min_margin, size, (best, worst), differ)


def win_probability(size: float, prefer: Prefer, temperature: float) -> float:
    """That an image is better than another by how much: Bradley-Terry's sigmoid(size / temperature); of a `jury` the
    share of its votes, abstentions counted half to each side; of `pairwise` the judge's own."""
    if prefer in ("jury", "pairwise"):
        return (1 + size) / 2
    return float(0.5 * (1 + np.tanh(size / temperature / 2)))  # the sigmoid, without overflow


def chosen_pairs(verdict: Verdict, pairing: Pairing) -> list[tuple[int, int]]:
    """(better, worse) places that a pairing looks at, whether or not the verdict is clear: see `is_decided`.

    `best-worst`: the largest size among clear verdicts, else among all; of equals the first winner and the last loser.
    `best-vs-rest`: the image of the largest sum of sizes against each other one, the largest first (Curry-DPO, arXiv
        2403.07230).
    `all-pairs`: every two, in the order of their places.
    """
    size, num = verdict.size, len(verdict.size)
    if num < 2:
        return []
    if pairing == "best-worst":
        if verdict.extremes is not None:
            return [verdict.extremes] if verdict.extremes[0] != verdict.extremes[1] else []
        open_to = verdict.wins if verdict.wins.any() else ~np.eye(num, dtype=bool)
        largest = np.argwhere(open_to & (size == size[open_to].max()))
        winner = int(largest[0, 0])
        return [(winner, int(largest[largest[:, 0] == winner][-1, 1]))]
    if pairing == "best-vs-rest":
        total = size.sum(axis=1)
        best = int(total.argmax())
        others = [int(place) for place in np.argsort(total, kind="stable") if place != best]
        return [(best, other) if size[best, other] >= 0 else (other, best) for other in others]
    every = itertools.combinations(range(num), 2)
    return [(first, second) if size[first, second] >= 0 else (second, first) for first, second in every]


def is_decided(verdict: Verdict, pair: tuple[int, int], pairing: Pairing) -> bool:
    """Whether the first image of a pair that the pairing chose is clearly the better."""
    if pairing == "best-worst" and verdict.extremes is not None:
        return verdict.extremes_differ
    return bool(verdict.wins[pair])
