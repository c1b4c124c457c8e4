"""The report of a sweep: `sweep.json` for programs, one self-contained `report.html` and a `front.svg` for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign._atomic import write_atomic
from diffalign._json import write_json
from diffalign._page import render
from diffalign._sweep_charts import curve_chart, dots_of, front_chart, standalone


def curves(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, SVG) of each metric over the key; none where several keys vary or fewer than two settings are there."""
    rows, keys = results["settings"], results["keys"]
    if len(keys) != 1 or len(rows) < 2:
        return []
    values = [row["values"][keys[0]] for row in rows]
    short = keys[0].rpartition(".")[2]
    charts = []
    for scorer, base in results["base"]["means"].items():
        means = [row["scorers"][scorer]["mean"] for row in rows]
        svg = curve_chart(
            scorer, short, values, [mean["mean"] for mean in means], [mean["se"] for mean in means], base["mean"]
        )
        charts.append((f"{scorer}, mean", svg))
        wins = [100 * row["scorers"][scorer]["win"]["rate"] for row in rows]
        charts.append((f"{scorer}, win rate % against base", _plain(f"{scorer} wins", short, values, wins, 50.0)))
    for metric in results["quantiles"]:
        if all(metric in row["metrics"] for row in rows):
            measured = [row["metrics"][metric] for row in rows]
            charts.append((metric, _plain(metric, short, values, measured, None)))
    return charts


def _plain(metric: str, key: str, values: list[Any], numbers: list[float], base: float | None) -> str:
    return curve_chart(metric, key, values, numbers, [None] * len(values), base)


def claim(results: Mapping[str, Any]) -> str:
    """The first line of the page."""
    num = len(results["settings"])
    settings = f"{num} setting{'s' * (num != 1)}"
    if not results.get("front"):
        return f"{settings} and their base"
    front, base = results["front"], results["base"]["name"]
    trained = len([name for name in front if name != base])
    return f"{trained} of {settings} on the front" + (", and the base, too" if base in front else "")


def write_sweep_report(folder: Path, results: Mapping[str, Any]) -> Path:
    """Writes sweep.json, report.html and, where there are two axes, front.svg, each whole or not at all.

    Args:
        results: `recipes.sweep._results.results` with `title`, `facts`, `scorers` (name -> facts) and `failed`.

    Returns:
        The page's path.
    """
    from markupsafe import Markup

    write_json(folder / "sweep.json", results)
    front = None
    if results["axes"]:
        front = front_chart(dots_of(results), tuple(results["axes"]))
        write_atomic(folder / "front.svg", standalone(front, results["title"]))
    warnings = [f"{run['name']}, seed {run['seed']} failed: {run['error']}" for run in results["failed"]]
    page = render(
        "sweep.html.j2",
        title=results["title"],
        numbers="sweep.json",
        warnings=warnings,
        results=results,
        claim=claim(results),
        # labels come from outside; the charts escape them
        front=Markup(front) if front else None,
        curves=[{"title": title, "svg": Markup(svg)} for title, svg in curves(results)],
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"
