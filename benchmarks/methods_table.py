"""The tables of methods_on_sprites.py, from its results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from methods_data import GOLD, PROXY

from diffalign import _statistics
from diffalign._json import read_json

COLUMNS = {
    "method": "",
    "strength": "which of the three the tuning chose",
    "gold gain": "mean gold score minus the base's, 95 % bootstrap over prompts",
    "per seed": "the same for each training seed",
    "against": "gold gain minus that of --against, paired by prompt and noise",
    "gold wins": "share of pictures better than the base's of the same noise, ties half",
    "proxy gain": "as gold gain, for the biased judge",
    "drift": "mean squared distance of the predictions from the base's, in shares of the base's error",
    "winner": "mean change of held-out winners' error, in shares of the base's error: above 0 they became less likely",
    "loser": "the same of the losers",
    "accuracy": "implicit preference accuracy on held-out pairs",
    "diversity": "effective number of pictures among a prompt's two",
    "ms": "processor time of a training step of 32 pictures, where --seconds measured it",
}


STRENGTH_NAMES = ("low", "mid", "high")


def with_interval(mean: float, low: float, high: float) -> str:
    """As the tables print it."""
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def difference(result: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    """Gold gain minus the other's, paired by prompt; empty without another one."""
    more = excess(result, other)
    return "" if more is None else paired(more, np.zeros(len(more)))


def excess(result: dict[str, Any] | None, other: dict[str, Any] | None) -> np.ndarray | None:
    """Each prompt's gold score minus the other's; none without another one."""
    if not result or not other or result["method"] == other["method"]:
        return None
    return np.subtract(result[GOLD]["of_prompts"], other[GOLD]["of_prompts"])


def paired(ours: np.ndarray, others: np.ndarray) -> str:
    """The mean difference over prompts."""
    more = _statistics.mean_difference(ours, others)
    return with_interval(more.mean, more.low, more.high)


def cells(result: dict[str, Any], other: dict[str, Any], seconds: dict[str, float]) -> list[str]:
    """A method's row of the table; `other` is the result it is compared with, empty where there is none."""
    gold, proxy, runs = result[GOLD], result[PROXY], result["runs"]
    win, low, high = (100 * value for value in gold["win"])
    mean = {key: statistics.mean(row[key] for row in runs) for key in runs[0]}
    return [
        result["method"],
        STRENGTH_NAMES[strength_of(result)],
        with_interval(*gold["gain"]),
        " ".join(f"{value - gold['base']:+.3f}" for value in gold["of_seeds"]),
        difference(result, other),
        f"{win:.1f} % [{low:.1f}, {high:.1f}]",
        f"{proxy['gain'][0]:+.3f}",
        f"{mean['drift']:.4f}",
        f"{mean['displacement']:+.3f}",
        f"{mean['loser_displacement']:+.3f}",
        f"{100 * mean['implicit_accuracy']:.0f} %",
        f"{mean['diversity']:.3f}",
        f"{1000 * seconds[result['method']]:.0f}" if result["method"] in seconds else "",
    ]


def strength_of(result: dict[str, Any]) -> int:
    """Which of the three a result chose."""
    return [row["setting"] for row in result["tuning"]].index(result["setting"])


def seconds_file(folder: Path) -> Path:
    """Beside the folder of results."""
    return folder.with_name(f"{folder.name}-seconds.json")


def table(folder: Path, against: str) -> str:
    """Markdown of all results there, best gold gain first, compared with that of `against`."""
    results = sorted((read_json(path) for path in folder.glob("*.json")), key=lambda r: -r[GOLD]["gain"][0])
    seconds = read_json(seconds_file(folder)).get("seconds_per_step", {})
    other: dict[str, Any] = next((result for result in results if result["method"] == against), {})
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(cells(result, other, seconds) for result in results)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def table_by_flips(results: Path, against: str) -> str:
    """Markdown of the methods measured on wrong labels too; `results` are those of right ones.

    Columns: gold gain by share of wrong labels; the same minus that of `against` on the same labels; how much of this
    difference came with the wrong labels; accuracy and drift by share.
    """
    folders = {0.0: results}
    for folder in results.parent.glob(f"{results.name}-flips-*"):
        folders[float(folder.name.rpartition("-")[2])] = folder
    shares = sorted(folders)
    found = [{path.stem: read_json(path) for path in sorted(folders[share].glob("*.json"))} for share in shares]
    header = ["method", "strength"]
    for column, first in (("gold gain", 0), (f"against {against}", 0), ("of this by wrong labels", 1)):
        header += [f"{column}, {100 * share:.0f} %" for share in shares[first:]]
    rows = [header + ["accuracy", "drift"]]
    rows.append(["---"] * len(rows[0]))
    for method in dict.fromkeys(method for there in found[1:] for method in there):
        ours, others = ([there.get(name) for there in found] for name in (method, against))
        measured = [result for result in ours if result]
        row = [method, " ".join(dict.fromkeys(STRENGTH_NAMES[strength_of(result)] for result in measured))]
        row += [with_interval(*result[GOLD]["gain"]) if result else "" for result in ours]
        row += [difference(*pair) for pair in zip(ours, others, strict=True)]
        before = excess(ours[0], others[0])
        for pair in zip(ours[1:], others[1:], strict=True):
            after = excess(*pair)
            row.append("" if before is None or after is None else paired(after, before))
        for fact, form in (("implicit_accuracy", "{:.0%}"), ("drift", "{:.3f}")):
            row.append(
                " ".join(form.format(statistics.mean(run[fact] for run in result["runs"])) for result in measured)
            )
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
