"""The curves of one run, or of two over each other, as inline SVG with the values under the pointer."""

from __future__ import annotations

import html
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffalign._charts import LINE, SERIES, TEXT, chart, level_line
from diffalign.runs._curves import Curves, Series
from diffalign.runs._plans import ACCURACY, HIDDEN, PROXY, SCORERS, Plan, plans_of

COLOURS = (*SERIES, "#1f9e89", "#b05cc8", "#a08a1f", "#8d6e63")  # the later ones read well on light and dark alike
DASHES = ("-", (0, (4, 2)))  # of the first and of the second run
SPARSE = 40  # points below which each is marked
STRIPS = 60  # across a chart, each with the values at its step
COLUMNS = 24  # of a heat map
_BUCKET = re.compile(r"/t(?P<low>[\d.]+)-(?P<high>[\d.]+)$")
_drawing = threading.Lock()  # Matplotlib's settings belong to the whole process


@dataclass(frozen=True)
class Chart:
    """A drawn chart; `values` are the newest of each line, `svg` is safe to put into a page."""

    title: str
    note: str
    values: tuple[tuple[str, float], ...]
    svg: str


@dataclass(frozen=True)
class Group:
    """Charts that are read together."""

    title: str
    charts: tuple[Chart, ...]
    is_minor: bool = False  # looked at when something is wrong


@dataclass(frozen=True)
class Look:
    smooth: bool = True
    log: bool = False


@dataclass
class Drawer:
    """Draws charts of runs and keeps the newest, so that only what changed is drawn again."""

    max_kept: int = 400
    _kept: dict[Any, Chart | None] = field(default_factory=dict)

    def groups(
        self, runs: Mapping[str, Curves], proxies: Mapping[str, str | None], smooth: bool = True, log: bool = False
    ) -> list[Group]:
        """The charts that one or two runs have numbers for.

        Args:
            runs: short name -> curves.
            proxies: short name -> the scorer that training followed (stop.train_scorer).
            smooth: draw moving averages, with the raw values faint behind them.
            log: the loss on a logarithmic axis.
        """
        look, found = Look(smooth, log), []
        for title, plans, is_minor in plans_of(list(runs.values())):
            charts = [self._line_chart(plan, runs, look) for plan in plans]
            if title == ACCURACY:
                charts += [self._heat_map(run if len(runs) > 1 else "", curves) for run, curves in runs.items()]
            if title == SCORERS:
                charts.insert(0, self._proxy_chart(runs, proxies))
            drawn = tuple(one for one in charts if one is not None)
            if drawn:
                found.append(Group(title, drawn, is_minor))
        return found

    def _keep(self, key: Any, draw: Any) -> Chart | None:
        with _drawing:
            if key not in self._kept:
                while len(self._kept) >= self.max_kept:
                    del self._kept[next(iter(self._kept))]
                from matplotlib import rc_context

                with rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
                    self._kept[key] = draw()
            return self._kept[key]

    def _line_chart(self, plan: Plan, runs: Mapping[str, Curves], look: Look) -> Chart | None:
        lines = _lines(plan, runs)
        if not lines:
            return None
        key = (plan, look, tuple((line.label, line.dash, _mark(line.series)) for line in lines))
        return self._keep(key, lambda: _draw(plan, lines, look, {}))

    def _proxy_chart(self, runs: Mapping[str, Curves], proxies: Mapping[str, str | None]) -> Chart | None:
        lines = [line for run, curves in runs.items() for line in _proxy_lines(run, curves, proxies.get(run), runs)]
        if not lines:
            return None
        alarms = {run: tuple(curves.alarms) for run, curves in runs.items()}
        key = ("proxy", tuple((line.label, _mark(line.series)) for line in lines), tuple(alarms.items()))
        return self._keep(key, lambda: _draw(PROXY, lines, Look(smooth=False), alarms))

    def _heat_map(self, run: str, curves: Curves) -> Chart | None:
        rows = {
            (float(match["low"]), float(match["high"])): series
            for name, series in list(curves.series.items())
            if (match := _BUCKET.search(name)) and name.startswith("implicit_accuracy/")
        }
        if not rows:
            return None
        key = ("heat", run, tuple((edges, _mark(series)) for edges, series in rows.items()))
        return self._keep(key, lambda: _draw_heat(run, dict(sorted(rows.items()))))


def _mark(series: Series) -> tuple[Any, ...]:
    """What tells a series from the same one with more points, and from another run's."""
    first, last = series.stretches[0], series.stretches[-1]
    return (len(series.stretches), first.points, last.points, math.fsum(stretch.mean for stretch in series.stretches))


@dataclass(frozen=True)
class Line:
    label: str
    colour: str
    dash: Any
    series: Series


def _lines(plan: Plan, runs: Mapping[str, Curves]) -> list[Line]:
    """Colours tell the lines of a chart apart, or two runs where there is one line; dashes always tell the runs."""
    found = [
        (number, run, label, series)
        for number, (run, curves) in enumerate(runs.items())
        for label, names in plan.lines
        if (series := next((curves.series[name] for name in names if name in curves.series), None)) is not None
    ]
    labels = list(dict.fromkeys(label for _, _, label, _ in found))
    lines = []
    for number, run, label, series in found:
        colour = COLOURS[labels.index(label) if len(labels) > 1 else number]
        told = " ".join([*([label] if len(plan.lines) > 1 else []), *([run] if len(runs) > 1 else [])])
        lines.append(Line(told or label, colour, DASHES[number], series))
    return lines


def _proxy_lines(run: str, curves: Curves, proxy: str | None, runs: Mapping[str, Curves]) -> list[Line]:
    """Each scorer's change since its first grid, in standard errors of that grid; none without a proxy."""
    key = f"samples/{proxy}"
    if proxy is None or key not in curves.series:
        return []
    names = [key, *(name for name in list(curves.series) if name.startswith("samples/") and not HIDDEN.search(name))]
    lines = []
    for place, name in enumerate(dict.fromkeys(names)):
        errors = curves.series.get(f"{name}_se")
        first_error = errors.points[1][0] if errors else 0.0
        if not first_error > 0:
            continue
        steps, values = curves.series[name].points
        moved = Series()
        for step, value in zip(steps, values, strict=True):
            moved.append(step, (value - values[0]) / first_error)
        label = name.removeprefix("samples/") + (" (proxy)" if name == key else "")
        dash = DASHES[list(runs).index(run)]
        lines.append(Line(f"{label} {run}" if len(runs) > 1 else label, COLOURS[place % len(COLOURS)], dash, moved))
    return lines


def _draw(plan: Plan, lines: Sequence[Line], look: Look, alarms: Mapping[str, Sequence[int]]) -> Chart:
    axes_of: list[Any] = []

    def paint(axes: Any) -> None:
        axes_of.append(axes)
        for line in lines:
            _paint_line(axes, line, look.smooth)
        for number, rang in enumerate(alarms.values()):
            for step in rang:
                axes.axvline(step, color=TEXT, linewidth=0.8, linestyle=DASHES[number], alpha=0.6)
        if plan.is_loss and look.log:
            _make_logarithmic(axes)
        low, high = axes.get_ylim()
        span = high - low
        if plan.level is not None and low - span <= plan.level <= high + span:
            level_line(axes, plan.level, plan.level_label)
        if len(lines) > 2:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=7.5)
        elif len(lines) > 1:
            axes.legend(frameon=False, fontsize=7.5)

    svg = chart(" ".join([plan.title, *(line.label for line in lines)]), paint)
    values = tuple((line.label, line.series.last) for line in lines)
    return Chart(plan.title, plan.note, values, _with_values(svg, axes_of[0], lines))


def _paint_line(axes: Any, line: Line, smooth: bool) -> None:
    """Few points as they are, with markers; many as a moving average with the raw values faint behind it."""
    style: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "linewidth": 1.6, "label": line.label}
    points = line.series.points
    if len(points[0]) < SPARSE:
        axes.plot(*points, marker="o", markersize=3, **style)
    elif smooth:
        axes.plot(*points, color=line.colour, linewidth=0.7, alpha=0.3)
        axes.plot(*line.series.smooth(), **style)
    else:
        axes.plot(*points, **style)


def _make_logarithmic(axes: Any) -> None:
    """With plain numbers at the ticks, also where the values lie within one power of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(5) if high < 20 * low else LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))


def _with_values(svg: str, axes: Any, lines: Sequence[Line]) -> str:
    """The chart under invisible strips that tell the values at their step."""
    _, _, width, height = (float(number) for number in re.findall(r'viewBox="([^"]*)"', svg)[0].split())
    box, (first, last) = axes.get_position(), axes.get_xlim()
    points = [(line.label, *line.series.points) for line in lines]
    strips = []
    for number in range(STRIPS):
        at = first + (number + 0.5) / STRIPS * (last - first)
        told = []
        for label, steps, values in points:
            near = min(
                range(max(0, (i := bisect_left(steps, at)) - 1), min(len(steps), i + 1)),
                key=lambda j: abs(steps[j] - at),
            )
            told.append(f"{label} {values[near]:.4g} (step {steps[near]})")
        x = (box.x0 + number / STRIPS * box.width) * width
        place = f'x="{x:.1f}" y="{(1 - box.y1) * height:.1f}" width="{box.width * width / STRIPS:.1f}"'
        title = html.escape("\n".join(told))
        strips.append(f'<rect {place} height="{box.height * height:.1f}"><title>{title}</title></rect>')
    return svg.replace("</svg>", f'<g class="da-values" fill="transparent">{"".join(strips)}</g></svg>')


def _draw_heat(run: str, rows: Mapping[tuple[float, float], Series]) -> Chart:
    """Implicit accuracy by noise level and step: means over stretches of the run."""
    ends = [(series.points[0][0], series.points[0][-1]) for series in rows.values()]
    first, last = min(end[0] for end in ends), max(end[1] for end in ends) + 1
    num = max(1, min(COLUMNS, max(sum(s.count for s in series.stretches) for series in rows.values())))
    cells = [_columns(series, first, last, num) for series in rows.values()]

    def paint(axes: Any) -> None:
        edges = [first + (last - first) * k / num for k in range(num + 1)]
        levels = [low for low, _ in rows] + [max(high for _, high in rows)]
        mesh = axes.pcolormesh(edges, levels, cells, cmap="RdBu", vmin=0, vmax=1, edgecolors="face", linewidth=0.1)
        axes.figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], pad=0.02, fraction=0.05).outline.set_visible(False)
        axes.set_yticks(levels)
        axes.set_ylabel("noise level t")
        for side in axes.spines.values():
            side.set_color(LINE)

    newest = tuple((f"t {low:g} to {high:g}", row[-1]) for (low, high), row in zip(rows, cells, strict=True))
    note = "Blue is above chance. Good: blue at the noise levels that shape a picture, the middle ones."
    title = "Accuracy by noise level"
    return Chart(
        f"{title}, {run}" if run else title,
        note,
        tuple(v for v in newest if not math.isnan(v[1])),
        chart(f"{title} {run}", paint),
    )


def _columns(series: Series, first: int, last: int, num: int) -> list[float]:
    """Means of a series over `num` equal stretches of [first, last), NaN where there is none."""
    sums, counts = [0.0] * num, [0] * num
    for stretch in series.stretches:
        place = min(num - 1, int((stretch.step - first) / (last - first) * num))
        sums[place] += stretch.count * stretch.mean
        counts[place] += stretch.count
    return [total / count if count else math.nan for total, count in zip(sums, counts, strict=True)]
