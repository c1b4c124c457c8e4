"""The embedded step-aware scorer: `sprites_clip` trained on noisy previews of the SDXL-architecture sprites model."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.scorers.step_aware import StepAware
from diffalign.sprites import WEIGHTS


@dataclass(frozen=True)
class SpritesStepAware(StepAware):
    """`weights/step_scorer`, as `python -m diffalign.sprites.scorer` makes it; fields: see `ClipScorer`.

    A short training: on the same previews, timestep by timestep, it does not differ measurably from `sprites_clip`
    (benchmarks/results/scorer-sprites.json). It is there to run what needs a step-aware scorer.
    """

    path: str = str(WEIGHTS / "step_scorer")
