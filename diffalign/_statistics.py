"""Paired win rates, mean differences and their intervals.

Images of one prompt resemble each other, so prompts and not images are what
is resampled: a cluster bootstrap (Efron and Tibshirani 1993, chapter 8). Several seeds per prompt sharpen each prompt's
result but never pretend to be more prompts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffalign.types import UserError

NUM_RESAMPLES = 10_000
_CHUNK = 1 << 21  # resampled values held at once: bounds memory whatever the number of prompts

Verdict = Literal["better", "worse", "not distinguishable"]
Method = Literal["bootstrap", "wilson"]
Groups = Sequence[Hashable] | NDArray[Any]  # one label per value, usually its prompt


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


def checked(values: ArrayLike, name: str, num: int | None = None) -> NDArray[np.float64]:
    """`values` as float64 [n].

    Raises:
        UserError: not a list of `num` (of at least one) finite numbers; says which and how many.
    """
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


def _codes(groups: Groups | None, num: int) -> NDArray[np.int64]:
    """Group labels as 0, 1, ...; without groups everyone is a group of their own."""
    if groups is None:
        return np.arange(num)
    if len(groups) != num:
        raise UserError(f"groups: {len(groups)} labels for {num} values; give one prompt per value")
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups])


def _totals(x: NDArray[np.float64], codes: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and count of every group."""
    return np.bincount(codes, weights=x).astype(np.float64), np.bincount(codes).astype(np.float64)


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
    """Two-sided paired randomisation test: of two equal models, any prompt's excess might as well have the other sign.

    Exact up to the Monte Carlo error of the resamples; prompts whose pairs are balanced carry no evidence.
    """
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
    groups: Groups | None = None,
    method: Method = "bootstrap",
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
    a, b = checked(a, name), checked(b, name, len(np.atleast_1d(a)))
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


def mean_and_se(x: ArrayLike, groups: Groups | None = None, *, level: float = 0.95, name: str = "scores") -> Estimate:
    """Mean, its standard error clustered by `groups`, and the normal interval mean +- z * se.

    Raises:
        UserError: no values, a value that is not finite, or not one group per value.
    """
    x = checked(x, name)
    return _estimate(x, _codes(groups, len(x)), level)


def mean_difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Groups | None = None,
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
    a, b = checked(a, name), checked(b, name, len(np.atleast_1d(a)))
    codes = _codes(groups, len(a))
    estimate = _estimate(a - b, codes, level)
    if estimate.num_groups == 1:
        return estimate
    low, high = _bootstrap_interval(*_totals(a - b, codes), level, num_resamples, seed)
    return Estimate(**{**asdict(estimate), "low": low, "high": high})


def holdout_accuracy(margins: ArrayLike, *, level: float = 0.95) -> WinRate:
    """Implicit preference accuracy: how often the winner has the higher implicit reward; ties half, Wilson's interval.

    `margins` [n]: logratio(winner) - logratio(loser) of held-out pairs, one number per pair (draws averaged before).

    Raises:
        UserError: no margins, or one that is not finite.
    """
    margins = checked(margins, "held-out margins")
    return win_rate(margins, np.zeros_like(margins), method="wilson", level=level, name="held-out margins")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979): the chance of one false claim among them all stays at the level."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = running
    return adjusted
