"""The Watch tab's pieces of HTML."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from diffalign import api
from gradio_app._parts import escape

MAX_VALUE = 120  # characters of a config value in the table of differences
DOT = " \u00b7 "


def status_html(runs: dict[str, tuple[Any, Any]]) -> str:
    """How each run stands: state, steps, what is left, and what happened beside training."""
    return f'<div class="da-runs">{"".join(_run(name, *of) for name, of in runs.items())}</div>'


def _run(name: str, run: Any, view: Any) -> str:
    share = min(1.0, run.step / run.steps) if run.steps else 0.0
    steps = f"step {run.step} of {run.steps}" if run.steps else f"step {run.step}"
    facts = [steps]
    if run.seconds_left is not None:
        facts.append(f"about {duration(run.seconds_left)} of training left")
    if run.state != "running":
        facts.append(f"{duration(max(0.0, time.time() - run.changed))} ago")
    if view.curves.unread:
        facts.append(f"still reading {view.curves.unread / 2**20:.0f} MiB")
    events = [*([run.reason] if run.reason and run.state != "finished" else []), *view.events()]
    notes = "".join(f'<div class="da-run-event">{escape(text)}</div>' for text in events)
    return (
        f'<div class="da-run da-run-{name}"><div class="da-run-line"><b>{name}</b>'
        f'<span class="da-run-name">{escape(run.name)}</span>{pill(run.state)}</div>'
        f'<div class="da-track"><div style="width:{100 * share:.1f}%"></div></div>'
        f'<div class="da-run-facts">{escape(DOT.join(facts))}</div>'
        f'<div class="da-run-facts">{escape(run.method)} on {escape(run.model)}</div>{notes}</div>'
    )


def pill(state: str) -> str:
    """A state as a coloured label."""
    return f'<span class="da-state da-{state.replace(" ", "-")}">{escape(state)}</span>'


def duration(seconds: float) -> str:
    """A time span in its largest fitting unit."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def charts_html(groups: Sequence[Any]) -> str:
    """Groups of charts; those that matter when something is wrong are folded."""
    return "".join(_group(group) for group in groups)


def _group(group: Any) -> str:
    charts = f'<div class="da-watch-box">{"".join(map(_chart, group.charts))}</div>'
    if group.is_minor:
        return f'<details class="da-watch-group"><summary>{escape(group.title)}</summary>{charts}</details>'
    return f'<section class="da-watch-group"><h3>{escape(group.title)}</h3>{charts}</section>'


def _chart(chart: Any) -> str:
    values = chart.values if len(chart.values) <= 2 else ()
    newest = " ".join(f"<span>{escape(label if len(values) > 1 else '')} {value:.4g}</span>" for label, value in values)
    return (
        f'<figure class="da-watch-chart"><figcaption><div><b>{escape(chart.title)}</b>{newest}</div>'
        f"<p>{escape(chart.note)}</p></figcaption>{chart.svg}</figure>"
    )


def differences_html(first: Any, second: Any) -> str:
    """The keys in which the resolved configs of two runs differ, as a table."""
    rows = api.config_differences(first=first.folder, second=second.folder)
    if not rows:
        return '<div class="da-run-facts">The resolved configs are the same.</div>'
    body = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td>{_value(old)}</td><td>{_value(new)}</td></tr>"
        for key, old, new in rows
    )
    head = "<thead><tr><th>What differs</th><th>A</th><th>B</th></tr></thead>"
    table = f'<table class="da-watch-table">{head}<tbody>{body}</tbody></table>'
    return f'<div class="da-watch-scroll">{table}</div>'


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return f"<code>{escape(text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + chr(0x2026))}</code>"
