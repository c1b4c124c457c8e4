"""Which model is better, and how sure that is: paired win rates, mean differences and their intervals.

Arrays in, numbers out: no model, no image. Images of one prompt resemble each other, so prompts and not images are what
is resampled: a cluster bootstrap (Efron and Tibshirani 1993, chapter 8). Several seeds per prompt sharpen each prompt's
result but never pretend to be more prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign._json import finite
from diffalign.types import UserError

NUM_RESAMPLES = 10_000
_CHUNK = 1 << 21  # resampled values held at once: bounds memory whatever the number of prompts

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True)
class WinRate:
    """How often the first of two wins. `rate` counts ties half; `low` and `high` bound it at confidence `level`."""

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    level: float
    p_value: float  # two-sided, against a rate of one half
    num_groups: int  # independent prompts
    method: str  # "bootstrap" or "wilson"

    @property
    def verdict(self) -> Verdict:
        """Better or worse only where the interval leaves out one half."""
        return "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "not distinguishable"


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (clustered by group) and an interval at confidence `level`."""

    mean: float
    se: float  # NaN for a single group: one prompt says nothing about prompts
    low: float
    high: float
    level: float
    num: int
    num_groups: int


def _values(values: ArrayLike, name: str, num: int | None = None) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"{name}: expected a non-empty list of numbers, got shape {list(array.shape)}")
    if num is not None and len(array) != num:
        raise UserError(
            f"{name}: {len(array)} scores for {num} images; every model needs one score per prompt and seed"
        )
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UserError(f"{name}: {bad} of {len(array)} scores are NaN or infinite; score these images again")
    return array


def _codes(groups: Sequence[Hashable] | NDArray[Any] | None, num: int) -> NDArray[np.int64]:
    """Group labels as 0, 1, ...; without groups everyone is a group of their own."""
    if groups is None:
        return np.arange(num)
    if len(groups) != num:
        raise UserError(f"groups: {len(groups)} labels for {num} values; give one prompt per value")
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups])


def _totals(x: NDArray[np.float64], codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of every group."""
    return np.bincount(codes, weights=x), np.bincount(codes).astype(np.float64)


def _bootstrap_interval(
    sums: NDArray[np.float64], counts: NDArray[np.float64], level: float, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean over everything when groups are drawn with replacement."""
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, _CHUNK // len(sums))
    for start in range(0, num_resamples, rows):
        index = rng.integers(0, len(sums), size=(min(rows, num_resamples - start), len(sums)), dtype=np.int32)
        means[start : start + len(index)] = sums[index].sum(1) / counts[index].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sign_flip_p(excess: NDArray[np.float64], num_resamples: int, seed: int) -> float:
    """Two-sided paired randomisation test: were the models alike, each prompt's excess might as well have the other sign."""
    rng = np.random.default_rng(seed)
    observed = abs(excess.sum()) * (1 - 1e-12)
    extreme = 0
    rows = max(1, _CHUNK // len(excess))
    for start in range(0, num_resamples, rows):
        signs = rng.integers(0, 2, size=(min(rows, num_resamples - start), len(excess)), dtype=np.int8)
        extreme += int((np.abs((2.0 * signs - 1.0) @ excess) >= observed).sum())
    return (1 + extreme) / (1 + num_resamples)


def wilson(successes: float, num: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); `successes` may hold halves."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / num
    centre = (rate + z * z / (2 * num)) / (1 + z * z / num)
    half = z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num)) / (1 + z * z / num)
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate(
    a: ArrayLike,
    b: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    method: Literal["bootstrap", "wilson"] = "bootstrap",
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    name: str = "scores",
) -> WinRate:
    """How often a[i] beats b[i], the scores of two models on the same prompt and seed; ties count half.

    "bootstrap" resamples prompts (`groups`: one label per pair; without it every pair is its own) and tests with random
    sign flips. Where all prompts have the same rate (all won, all tied) resampling has nothing to vary and would claim
    certainty; the interval is then Wilson's with one trial per prompt.
    "wilson" takes the pairs as independent trials: effective n = wins + ties + losses, successes = wins + ties / 2.
    A tied trial varies less than that assumes, so with ties the interval is wider than needed.

    Raises:
        UserError: lengths differ, no pairs, a score that is not finite, or "wilson" with several pairs per prompt.
    """
    a, b = _values(a, name), _values(b, name, len(np.atleast_1d(a)))
    points = (a > b) + 0.5 * (a == b)
    sums, counts = _totals(points, _codes(groups, len(points)))
    rate = float(points.mean())
    if method == "wilson":
        if len(sums) < len(points):
            raise UserError(
                f"{name}: method wilson needs independent pairs; with several seeds per prompt use bootstrap"
            )
        low, high = wilson(float(points.sum()), len(points), level)
        p_value = math.erfc(abs(rate - 0.5) * math.sqrt(2 * len(points)))  # score test, variance 1 / (4 n)
    else:
        if np.ptp(sums / counts) == 0:
            low, high = wilson(rate * len(sums), len(sums), level)
        else:
            low, high = _bootstrap_interval(sums, counts, level, num_resamples, seed)
        p_value = _sign_flip_p(sums - counts / 2, num_resamples, seed)
    wins, ties = int((points == 1).sum()), int((points == 0.5).sum())
    return WinRate(wins, ties, len(points) - wins - ties, rate, low, high, level, p_value, len(sums), method)


def _estimate(x: NDArray[np.float64], codes: NDArray[np.int64], level: float) -> Estimate:
    sums, counts = _totals(x, codes)
    mean, num_groups, se = float(x.mean()), len(sums), math.nan
    if num_groups > 1:
        # Cluster-robust, and exactly sd / sqrt(n) when every group has one member.
        se = math.sqrt(num_groups / (num_groups - 1) * float(((sums - counts * mean) ** 2).sum())) / len(x)
    z = NormalDist().inv_cdf((1 + level) / 2)
    return Estimate(mean, se, mean - z * se, mean + z * se, level, len(x), num_groups)


def mean_and_se(
    x: ArrayLike, groups: Sequence[Hashable] | None = None, *, level: float = 0.95, name: str = "scores"
) -> Estimate:
    """Mean, its standard error clustered by `groups`, and the normal interval mean +- z * se.

    Raises:
        UserError: no values, a value that is not finite, or not one group per value.
    """
    x = _values(x, name)
    return _estimate(x, _codes(groups, len(x)), level)


def mean_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    name: str = "scores",
) -> Estimate:
    """Mean of a - b over pairs of the same prompt and seed, its clustered standard error and a bootstrap interval.

    Raises:
        UserError: lengths differ, no pairs, or a score that is not finite.
    """
    a, b = _values(a, name), _values(b, name, len(np.atleast_1d(a)))
    codes = _codes(groups, len(a))
    estimate = _estimate(a - b, codes, level)
    if estimate.num_groups == 1:
        return estimate
    low, high = _bootstrap_interval(*_totals(a - b, codes), level, num_resamples, seed)
    return Estimate(**{**asdict(estimate), "low": low, "high": high})


def holdout_accuracy(margins: ArrayLike, *, level: float = 0.95) -> WinRate:
    """Implicit preference accuracy: how often the winner's implicit reward is the higher one; ties half, Wilson's interval.

    `margins` [n]: logratio(winner) - logratio(loser) of held-out pairs, one number per pair (draws averaged before).

    Raises:
        UserError: no margins, or one that is not finite.
    """
    margins = _values(margins, "held-out margins")
    return win_rate(margins, np.zeros_like(margins), method="wilson", level=level, name="held-out margins")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): the chance of one false claim among them all stays at the level."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted


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
            arrays.setdefault(scorer, {})[model] = _values(columns[scorer], name, num)
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
