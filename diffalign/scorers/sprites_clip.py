"""The embedded learned scorer of the sprites world: a small CLIP trained on the gold judge's preferences."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.scorers._clip import ClipScorer
from diffalign.sprites import WEIGHTS


@dataclass(frozen=True)
class SpritesClip(ClipScorer):
    """`weights/scorer`, as `python -m diffalign.sprites.scorer` makes it; fields: see `ClipScorer`.

    benchmarks/results/scorer-sprites.json says how often it agrees with the judge. It knows 64 x 64 pictures and the
    words of the grammar only.
    """

    path: str = str(WEIGHTS / "scorer")
