"""From the scores of a sweep's runs to what its settings are worth: means, wins, the front. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign import evaluation, fronts
from diffalign._json import finite
from diffalign.evaluation import Estimate, WinRate
from diffalign.recipes.sweep._points import Setting

Scores = Mapping[str, NDArray[np.float64]]  # scorer -> [n], in the order of the prompts
LEVEL = 0.95
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
WEIGHTS = tuple(step / 10 for step in range(11))  # of the first axis, for the scalarisation table


@dataclass(frozen=True)
class Judged:
    """What one finished run came to."""

    seed: int  # of training
    folder: str
    scores: Scores
    metrics: Mapping[str, float]  # its last validation's, without the prefix


@dataclass(frozen=True)
class Standing:
    """A setting under one scorer, over all its runs; `win` and `difference` are against the base, image by image."""

    mean: Estimate
    win: WinRate
    difference: Estimate
    p_holm: float  # win.p_value adjusted for the number of settings
    verdict: str  # the interval's, unless p_holm does not agree
    seed_means: Mapping[str, float]  # training seed -> mean
    seed_sd: float | None  # of these means; None for one seed


def standings(
    runs: Mapping[str, Sequence[Judged]], base: Scores, prompts: Sequence[str], seed: int
) -> dict[str, dict[str, Standing]]:
    """Setting -> scorer -> standing. Several training seeds are pooled: prompts stay the unit that is resampled.

    Args:
        runs: setting -> its finished runs, at least one.
        base: the base model's scores; `prompts` [n] names the groups of its images.
        seed: of the resampling.
    """
    result: dict[str, dict[str, Standing]] = {name: {} for name in runs}
    for scorer, of_base in base.items():
        wins, rest = dict[str, WinRate](), dict[str, tuple[Estimate, Estimate]]()
        for name, judged in runs.items():
            x = np.concatenate([run.scores[scorer] for run in judged])
            y, groups = np.tile(of_base, len(judged)), [*prompts] * len(judged)
            wins[name] = evaluation.win_rate(x, y, groups=groups, level=LEVEL, seed=seed)
            difference = evaluation.mean_difference(x, y, groups, level=LEVEL, seed=seed)
            rest[name] = evaluation.mean_and_se(x, groups, level=LEVEL), difference
        adjusted = evaluation.holm([win.p_value for win in wins.values()])
        for (name, win), p_holm in zip(wins.items(), adjusted, strict=True):
            refuted = len(wins) > 1 and p_holm > 1 - LEVEL
            means = {str(run.seed): float(run.scores[scorer].mean()) for run in runs[name]}
            result[name][scorer] = Standing(
                *(rest[name][0], win, rest[name][1], p_holm),
                verdict="not distinguishable" if refuted else win.verdict,
                seed_means=means,
                seed_sd=float(np.std([*means.values()], ddof=1)) if len(means) > 1 else None,
            )
    return result


def front_of(points: Mapping[str, tuple[float, float]], base: str) -> dict[str, Any]:
    """The Pareto front of named points, the base's among them, and what linear weights choose.

    `hypervolume` is the area above the base: 0 where no setting is better than it on both axes.
    """
    names, coordinates = list(points), [*points.values()]
    best = fronts.scalarised_best(coordinates, WEIGHTS)
    return {
        "front": [names[i] for i in fronts.pareto_front(coordinates)],
        "hypervolume": fronts.hypervolume(coordinates, points[base]),
        "scalarised": [{"weight": w, "best": names[i]} for w, i in zip(WEIGHTS, best, strict=True)],
    }


def quantiles(columns: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Metric -> quantiles over the settings: what a setting of this grid is worth that nobody picked (LN-DPO's advice,
    arXiv 2407.15229), where the best alone would be the luck of the pick."""
    return {
        metric: {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
        for metric, values in columns.items()
        if len(values)
    }


def results(
    settings: Sequence[Setting],
    finished: Mapping[str, Sequence[Judged]],
    base: Scores,
    base_name: str,
    prompts: Sequence[str],
    axes: tuple[str, str] | None,
    seed: int,
) -> dict[str, Any]:
    """What sweep.json says of the settings, as plain types: `settings` in their order, those without a run left out.

    Args:
        finished: setting -> its runs; base: the base model's scores; prompts: one per image, in the scores' order.
        axes: the two scorers of the front, None for no front.
        seed: of the resampling.
    """
    table = standings(finished, base, prompts, seed)
    rows: list[dict[str, Any]] = []
    for setting in settings:
        if setting.name not in table:
            continue
        runs = [
            {
                "seed": run.seed,
                "folder": run.folder,
                "means": {scorer: float(values.mean()) for scorer, values in run.scores.items()},
                "metrics": run.metrics,
            }
            for run in finished[setting.name]
        ]
        names = set.intersection(*(set(run.metrics) for run in finished[setting.name]))
        metrics = {
            name: float(np.mean([run.metrics[name] for run in finished[setting.name]])) for name in sorted(names)
        }
        rows.append(
            {"name": setting.name, "label": setting.label, "values": setting.values, "runs": runs, "metrics": metrics}
            | {"scorers": table[setting.name]}
        )
    means = {scorer: evaluation.mean_and_se(values, prompts, level=LEVEL) for scorer, values in base.items()}
    columns = {scorer: [table[row["name"]][scorer].mean.mean for row in rows] for scorer in base}
    for metric in dict.fromkeys(name for row in rows for name in row["metrics"]):
        columns[metric] = [row["metrics"][metric] for row in rows if metric in row["metrics"]]
    front = {}
    if axes:
        points = {base_name: (means[axes[0]].mean, means[axes[1]].mean)}
        points |= {name: (of[axes[0]].mean.mean, of[axes[1]].mean.mean) for name, of in table.items()}
        front = front_of(points, base_name)
    return finite(
        {
            "keys": list(settings[0].values),
            "axes": axes,
            "num_prompts": len(set(prompts)),
            "images_per_prompt": len(prompts) // len(set(prompts)),
            "level": LEVEL,
            "base": {"name": base_name, "means": means},
            "settings": rows,
            **front,
            "quantiles": quantiles(columns),
        }
    )
