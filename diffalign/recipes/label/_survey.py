"""A look at all scores before anything is written: ties, disagreement, and the least and the most certain records."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffalign import preference_rules, randomness
from diffalign.agreement import gap_tables, kappa
from diffalign.recipes.label._records import has_captions
from diffalign.recipes.label._rules import Choice, choices, needed_images
from diffalign.recipes.label._scores import Group, Scored
from diffalign.sections import Label
from diffalign.types import UserError


@dataclass(frozen=True)
class Entry:
    """A record that could be made, small enough to keep a few of."""

    number: int  # of its prompt
    rows: Sequence[Mapping[str, Any]]  # of its images, in the order of the choice
    choice: Choice

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """Which one it is among all of the file."""
        return self.number, self.choice.places


class Fewest:
    """The `num` entries of the smallest keys seen so far, in memory for `num`; equal keys go by a hash of the seed."""

    def __init__(self, num: int, seed: int) -> None:
        self._num, self._seed = num, seed
        self._heap: list[tuple[tuple[float, ...], int, Entry]] = []  # of the largest first
        self._count = itertools.count()

    def add(self, key: tuple[float, ...], entry: Entry) -> None:
        """Keeps the entry if it is among the smallest."""
        if not self._num:
            return
        order = randomness.address("least", self._seed, *(row["file"] for row in entry.rows))
        item = ((*(-part for part in key), -float(order)), next(self._count), entry)
        if len(self._heap) < self._num:
            heapq.heappush(self._heap, item)
        else:
            heapq.heappushpop(self._heap, item)

    def entries(self) -> list[Entry]:
        """Smallest key first."""
        return [entry for _, _, entry in sorted(self._heap, reverse=True)]


class Survey:
    """Numbers and extreme records of a whole score file, gathered one prompt at a time."""

    def __init__(self, scored: Scored, settings: Label) -> None:
        self.scored, self.settings = scored, settings
        self.weights = tuple(settings.weights) or (1.0,) * len(scored.names)
        self.counts = dict.fromkeys(("prompts", "images", "images_without_score", "prompts_with_too_few_images"), 0)
        self.num_choices = self.num_undecided = 0
        num = len(scored.names)
        self.tables = np.zeros((num, num, 3, 3))
        self.for_people = Fewest(settings.humans, settings.seed)
        self.least, self.most = Fewest(settings.sheet, settings.seed), Fewest(settings.sheet, settings.seed)
        self.cut: float | None = None

    def take(self) -> None:
        """Reads the whole file: once, and once more before it where liking needs a quantile.

        Raises:
            UserError: see `Scored.groups`, or no image to take a quantile of.
        """
        if self.settings.rule == "singles":
            self.cut = self._find_cut()
        for group in self.scored.groups():
            self._add(group)

    def choices(self, group: Group) -> list[tuple[int | None, Choice]]:
        """What the group makes, with the place of the one scorer that says so where scorers are users."""
        settings = self.settings
        if settings.by_users:
            every = range(len(self.scored.names))
            return [(j, c) for j in every for c in choices(group.values[:, [j]], settings, (1.0,), self.cut)]
        return [(None, choice) for choice in choices(group.values, settings, self.weights, self.cut)]

    def _find_cut(self) -> float:
        if self.settings.like_above is not None:
            return self.settings.like_above
        utilities = array("d")  # eight bytes per image
        for group in self.scored.groups():
            if len(group.rows) >= needed_images(self.settings):
                utilities.extend(preference_rules.utility(group.values, self.settings.prefer, self.weights))
        if not utilities:
            raise UserError(
                f"{self.scored.path} has too few images of a prompt for label.prefer={self.settings.prefer}"
            )
        quantile = 0.5 if self.settings.like_quantile is None else self.settings.like_quantile
        return float(np.quantile(np.frombuffer(utilities), quantile))

    def _add(self, group: Group) -> None:
        settings, margin = self.settings, self.settings.min_margin
        self.counts["prompts"] += 1
        self.counts["images"] += len(group.rows)
        self.counts["images_without_score"] += group.num_unjudged
        self.counts["prompts_with_too_few_images"] += len(group.rows) < needed_images(settings)
        if len(group.rows) > 1:
            is_of_each = settings.prefer in ("jury", "pareto") or len(self.scored.names) == 1
            values = group.values
            # a judge who compares gives the gaps themselves
            gaps = (values - values.T)[..., None] if settings.prefer == "pairwise" else values[:, None] - values[None]
            self.tables += gap_tables(gaps, margin if is_of_each else 0.0)
        for _, choice in self.choices(group):
            self.num_choices += 1
            self.num_undecided += not choice.is_decided
            entry = Entry(group.number, [group.rows[place] for place in choice.places], choice)
            if not has_captions(self.scored, entry.rows):
                continue  # will be no record: nothing to show or to ask people about
            self.for_people.add((choice.is_decided, choice.certainty), entry)
            self.least.add((choice.is_decided, choice.certainty), entry)
            if choice.is_decided:
                self.most.add((-choice.certainty,), entry)

    def facts(self) -> dict[str, Any]:
        """For label.json: counts, ties, and how far the scorers agree with each other on pairs of images."""
        names, pairs = self.scored.names, float(self.tables[0, 0].sum())
        ties = {name: float(self.tables[j, j, 1, 1]) for j, name in enumerate(names)}
        agree = [
            {
                "scorers": [names[a], names[b]],
                "same": float(np.trace(self.tables[a, b])) / pairs if pairs else None,
                "opposed": float(self.tables[a, b, 0, 2] + self.tables[a, b, 2, 0]) / pairs if pairs else None,
                "kappa": kappa(self.tables[a, b]),
            }
            for a, b in itertools.combinations(range(len(names)), 2)
        ]
        shown = {name: {"ties": ties[name] / pairs if pairs else None} for name in names}
        return self.counts | {
            "image_pairs": round(pairs),
            "considered": self.num_choices,
            "undecided": self.num_undecided,
            "liked_above": self.cut,
            "scorers": {name: shown[name] | {"info": self.scored.scorers.get(name, {})} for name in names},
            "agreement": agree,
        }
