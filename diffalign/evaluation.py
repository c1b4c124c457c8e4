"""Which model is better, and how sure that is: models against a baseline on the same prompts and seeds.

Arrays in, numbers out: no model, no image. The statistics themselves are in `_statistics.py` and public from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign._json import finite
from diffalign._statistics import (
    NUM_RESAMPLES,
    Estimate,
    Verdict,
    WinRate,
    checked,
    holdout_accuracy,
    holm,
    mean_and_se,
    mean_difference,
    wilson,
    win_rate,
)
from diffalign.types import UserError

__all__ = [
    "Comparison",
    "ComparisonRow",
    "Estimate",
    "WinRate",
    "compare",
    "holdout_accuracy",
    "holm",
    "mean_and_se",
    "mean_difference",
    "wilson",
    "win_rate",
]


@dataclass(frozen=True)
class ComparisonRow:
    """One model under one scorer, over all prompts or one category; `win`, `difference` are against the baseline."""

    model: str
    scorer: str
    category: str | None
    mean: Estimate
    win: WinRate | None = None  # None for the baseline itself
    difference: Estimate | None = None
    p_holm: float | None = None  # win.p_value adjusted for the number of models compared
    verdict: Verdict | None = None  # the interval's; with several models p_holm must agree


@dataclass(frozen=True)
class Comparison:
    """Models against a baseline on the same prompts and seeds, under every scorer."""

    baseline: str
    models: tuple[str, ...]
    scorers: tuple[str, ...]
    categories: tuple[str, ...]
    num_prompts: int
    num_seeds: int
    num_images: int  # per model
    level: float
    rows: tuple[ComparisonRow, ...]

    def row(self, model: str, scorer: str, category: str | None = None) -> ComparisonRow:
        """The one row of that model, scorer and category (None: over all prompts)."""
        (found,) = [r for r in self.rows if (r.model, r.scorer, r.category) == (model, scorer, category)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; what is not finite is None."""
        return finite(self)


def _table(
    arrays: Mapping[str, NDArray[np.float64]],
    prompts: Sequence[str],
    baseline: str,
    scorer: str,
    category: str | None,
    level: float,
    num_resamples: int,
    seed: int,
) -> list[ComparisonRow]:
    """The rows of one scorer on one set of prompts, Holm-adjusted over the models."""
    others = [model for model in arrays if model != baseline]
    options: dict[str, Any] = {"groups": prompts, "level": level, "num_resamples": num_resamples, "seed": seed}
    wins = {model: win_rate(arrays[model], arrays[baseline], **options) for model in others}
    adjusted = dict(zip(others, holm([wins[model].p_value for model in others]), strict=True))
    rows = []
    for model, x in arrays.items():
        mean = mean_and_se(x, prompts, level=level)
        if model == baseline:
            rows.append(ComparisonRow(model, scorer, category, mean))
            continue
        refuted = len(others) > 1 and adjusted[model] > 1 - level
        verdict: Verdict = "not distinguishable" if refuted else wins[model].verdict
        difference = mean_difference(x, arrays[baseline], **options)
        rows.append(ComparisonRow(model, scorer, category, mean, wins[model], difference, adjusted[model], verdict))
    return rows


def compare(
    scores: Mapping[str, Mapping[str, ArrayLike]],
    prompts: Sequence[str],
    seeds: Sequence[int],
    baseline: str,
    *,
    categories: Sequence[str] | None = None,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares every model with the baseline, image by image of the same prompt and seed.

    Args:
        scores: model -> scorer -> scores [n]; row i of every array belongs to prompts[i] and seeds[i].
        categories: a label per row, for a table per category beside the one over all prompts.
        seed: of the resampling; the result is a pure function of the arguments.

    Raises:
        UserError: an unknown baseline, a scorer that a model lacks, lengths that differ, scores that are not finite
            (the scorer, the model and the count are named).
    """
    if baseline not in scores:
        raise UserError(f"baseline {baseline!r} is not among the models: {', '.join(scores) or 'none'}")
    num, scorers = len(prompts), tuple(scores[baseline])
    for what, labels in (("seeds", seeds), ("categories", categories)):
        if labels is not None and len(labels) != num:
            raise UserError(f"{what}: {len(labels)} for {num} prompts; give one per image")
    arrays: dict[str, dict[str, NDArray[np.float64]]] = {}  # scorer -> model -> [n]
    for model, columns in scores.items():
        if set(columns) != set(scorers):
            odd = ", ".join(sorted(set(columns) ^ set(scorers)))
            raise UserError(f"models {model!r} and {baseline!r} were not judged by the same scorers: {odd}")
        for scorer in scorers:
            name = f"scorer {scorer!r} of model {model!r}"
            arrays.setdefault(scorer, {})[model] = checked(columns[scorer], name, num)
    names = tuple(dict.fromkeys(categories or ()))
    rows: list[ComparisonRow] = []
    for category in (None, *names):
        keep = [i for i in range(num) if category is None or categories is None or categories[i] == category]
        for scorer in scorers:
            part = {model: x[keep] for model, x in arrays[scorer].items()}
            labels = [prompts[i] for i in keep]
            rows += _table(part, labels, baseline, scorer, category, level, num_resamples, seed)
    return Comparison(
        baseline, tuple(scores), scorers, names, len(set(prompts)), len(set(seeds)), num, level, tuple(rows)
    )
