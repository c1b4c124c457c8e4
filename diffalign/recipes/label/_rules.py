"""One prompt's scores to the records that a labelling rule makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from diffalign import preference_rules, randomness
from diffalign.sections import Label

DRAW_UNIT = 2.0**-63  # of `randomness.address`, to a number in [0, 1)


@dataclass(frozen=True)
class Choice:
    """Images that make a record, by their places in the prompt's group.

    is_decided: false for a pair that the rule looked at and that is tied, disputed or within the margin.
    certainty: what the least and the most certain are sorted by; of pairs |probability - 1/2|.
    """

    places: tuple[int, ...]
    utility: tuple[float, ...]
    certainty: float
    probability: float | None = None  # of pairs: that the first is better
    is_decided: bool = True


def needed_images(settings: Label) -> int:
    """Of a prompt, so that there is anything to label."""
    is_alone = settings.rule in ("singles", "ladder") and settings.prefer == "sum"
    return 1 if is_alone else 2


def choices(
    values: Float[NDArray[np.float64], "K J"], settings: Label, weights: Sequence[float], cut: float | None = None
) -> list[Choice]:
    """What one prompt's images make, clear or not. `cut` is the utility that liked images exceed.

    Pairs have their better image first and utilities (1, 0), which `labelled` may turn into soft or drawn labels.
    """
    if len(values) < needed_images(settings):
        return []
    if settings.rule in ("best-worst", "best-vs-rest", "all-pairs"):
        return _pairs(values, settings, weights)
    utility = preference_rules.utility(values, settings.prefer, weights)
    order = [int(place) for place in np.argsort(-utility, kind="stable")]
    spread = float(utility[order[0]] - utility[order[-1]])
    if settings.rule == "ranking":
        ranked = tuple(float(utility[place]) for place in order)
        return [Choice(tuple(order), ranked, spread, is_decided=spread > settings.min_margin)]
    if settings.rule == "ladder":
        return [Choice((order[0],), (1.0,), float(utility[order[0]]))]
    assert cut is not None
    distance = np.abs(utility - cut)
    return [
        Choice((place,), (float(utility[place] > cut),), float(distance[place]))
        for place in range(len(utility))
        if not settings.min_margin or distance[place] > settings.min_margin
    ]


def _pairs(values: Float[NDArray[np.float64], "K J"], settings: Label, weights: Sequence[float]) -> list[Choice]:
    assert settings.rule in ("best-worst", "best-vs-rest", "all-pairs")
    verdict = preference_rules.compare(values, settings.prefer, weights, settings.min_margin, settings.min_agreement)
    made = []
    for pair in preference_rules.chosen_pairs(verdict, settings.rule):
        chance = preference_rules.win_probability(float(verdict.size[pair]), settings.prefer, settings.temperature)
        is_decided = preference_rules.is_decided(verdict, pair, settings.rule)
        made.append(Choice(pair, (1.0, 0.0), abs(chance - 0.5), chance, is_decided))
    return made


def labelled(choice: Choice, settings: Label, files: Sequence[str], user: str = "") -> Choice:
    """A pair with the label that was asked for; other records as they are.

    `sampled` draws the winner with its probability, by the address of seed and files: the same whatever was labelled
    before it.
    """
    if choice.probability is None or settings.labels == "hard":
        return choice
    if settings.labels == "soft":
        return replace(choice, utility=(choice.probability, 1 - choice.probability))
    draw = randomness.address("bradley-terry", settings.seed, user, *files) * DRAW_UNIT
    if draw < choice.probability:
        return choice
    return replace(choice, places=choice.places[::-1], probability=1 - choice.probability)
