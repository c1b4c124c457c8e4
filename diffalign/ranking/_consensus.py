"""How far voters agree: on each prompt, each rater with the others, and all of them beyond chance."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Share(NamedTuple):
    """What a prompt's or a rater's verdicts have in common with the majority."""

    name: str
    share: float
    num_verdicts: int


@dataclass(frozen=True)
class Consensus:
    """Agreement on what several raters judged: the same two contestants for the same prompt (and item).

    `prompts`: share of verdicts that are the most frequent one of their pair, the least agreed prompt first.
    `raters`: share of a rater's verdicts that are what most of the others said, where these had a majority.
    `alpha`: Krippendorff's, with a tie half-way between the two wins; 1 is agreement, 0 what chance would give; NaN
    where nothing was judged twice.
    """

    alpha: float
    num_shared: int  # pairs that several raters judged
    prompts: tuple[Share, ...]
    raters: tuple[Share, ...]


def consensus(votes: Iterable[Any]) -> Consensus:
    """Of outcomes (left, right, share, prompt, rater, item); a rater's votes on the same pair count as one verdict."""
    said: dict[tuple[str, str, str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        first, second, share = vote.left, vote.right, vote.share
        if first > second:
            first, second, share = second, first, 1 - share
        said[vote.prompt, vote.item, first, second][vote.rater].append(share)
    shared = {
        unit: {rater: int(np.sign(np.mean(shares) - 0.5)) for rater, shares in by_rater.items()}
        for unit, by_rater in said.items()
        if len(by_rater) > 1
    }
    agreed: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    matched: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for (prompt, *_), verdicts in shared.items():
        counts = Counter(verdicts.values())
        agreed[prompt][0] += max(counts.values())
        agreed[prompt][1] += len(verdicts)
        for rater, verdict in verdicts.items():
            majority = _majority(counts, verdict)
            if majority is not None:
                matched[rater][0] += verdict == majority
                matched[rater][1] += 1
    return Consensus(_alpha(list(shared.values())), len(shared), _shares(agreed), _shares(matched))


def _majority(counts: Counter[int], without: int) -> int | None:
    """The most frequent verdict of the others; None where two are equally frequent."""
    others = counts.copy()
    others[without] -= 1
    first, *rest = others.most_common(2)
    return None if rest and rest[0][1] == first[1] else first[0]


def _shares(counts: dict[str, list[int]]) -> tuple[Share, ...]:
    """The lowest share first."""
    found = (Share(name, common / num, num) for name, (common, num) in counts.items())
    return tuple(sorted(found, key=lambda share: (share.share, share.name)))


def _alpha(units: list[dict[str, int]]) -> float:
    import evalica
    import pandas as pd

    if not units:
        return math.nan
    # Who said it does not matter to alpha, so the rows are the first, second, ... verdict of each unit. Each unit is
    # there in both orders: else chance, and with it alpha, would depend on how the contestants are called.
    ratings = np.full((max(map(len, units)), len(units)), np.nan)
    for column, verdicts in enumerate(units):
        ratings[: len(verdicts), column] = list(verdicts.values())
    ratings = np.concatenate([ratings, -ratings], axis=1)
    return float(evalica.alpha(pd.DataFrame(ratings), distance="interval").alpha)
