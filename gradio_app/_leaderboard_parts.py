"""The Leaderboard tab's pieces of HTML."""

from __future__ import annotations

import math
from typing import Any

from gradio_app._parts import escape

DOT = " \u00b7 "
DASH = "\u2013"
MANY = 10_000  # votes; more are not told apart
FEW = 10  # prompts or ballots, below which intervals are rough
LISTED = 8  # prompts and raters


def board(found: Any, names: dict[str, str], with_points: bool) -> str:
    """All of the standings; `names` are what people read of the contestants."""
    shown = [names[name] for name in found.names]
    parts = [_summary(found, names), _ranking(found, shown, with_points)]
    sections = [
        ("Who beats whom", _matrix(found, shown)),
        ("Votes still needed", _power(found, shown)),
        ("Agreement", _agreement(found)),
    ]
    rest = "".join(f"<section><h3>{title}</h3>{text}</section>" for title, text in sections)
    return f'<div class="da-board">{"".join(parts)}<div class="da-board-rest">{rest}</div></div>'


def _summary(found: Any, names: dict[str, str]) -> str:
    ballots = f"{found.num_ballots} votes"
    if found.num_outcomes != found.num_ballots:
        ballots += f" ({found.num_outcomes} pairs)"
    unit = found.resampled if found.resampled == "prompts" else "votes"
    text = f"{ballots}{DOT}{100 * found.level:.0f} % intervals over {found.num_clusters} {unit}"
    notes = []
    if found.num_clusters < FEW:
        notes.append(f"With {found.num_clusters} {unit} the intervals are rough.")
    if len(found.groups) > 1:
        groups = "; ".join(", ".join(names[name] for name in group) for group in found.groups)
        notes.append(f"These groups were never compared with each other, so their order says nothing: {groups}.")
    lines = "".join(f'<div class="da-board-note">{escape(note)}</div>' for note in notes)
    return f'<div class="da-board-facts">{escape(text)}</div>{lines}'


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _ranking(found: Any, shown: list[str], with_points: bool) -> str:
    rows = "".join(_row(found, k, name, with_points) for k, name in enumerate(shown))
    heads = ("", "Contestant", "Chance to beat another one", f"{100 * found.level:.0f} % interval", "Pairs")
    names = ("da-place", "da-name", "da-rate-cell", "da-share", "da-pairs")
    head = "".join(f'<div class="{name}">{text}</div>' for name, text in zip(names, heads, strict=True))
    return f'<div id="da-ranking"><div class="da-rank-row da-rank-head">{head}</div>{rows}</div>'


def _row(found: Any, k: int, name: str, with_points: bool) -> str:
    low, high = found.win_rate_interval[k]
    first, last = found.rank_interval[k]
    rate, played = found.win_rate[k], found.wins[k].sum() + found.wins[:, k].sum()
    ranks = f"{first}" if first == last else f"{first}{DASH}{last}"
    points = f'<small class="da-points">{found.points[k]:.0f} points</small>' if with_points else ""
    return (
        f'<div class="da-rank-row"><div class="da-place" title="between which ranks it lies">{ranks}</div>'
        f'<div class="da-name">{escape(name)}{points}</div>'
        f'<div class="da-rate-cell"><div class="da-rate"><i style="width:{100 * rate:.2f}%"></i>'
        f'<b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b></div></div>'
        f'<div class="da-share"><b>{_percent(rate)} %</b> <span>{_percent(low)}{DASH}{_percent(high)}</span></div>'
        f'<div class="da-pairs">{played:.0f}</div></div>'
    )


def _matrix(found: Any, shown: list[str]) -> str:
    rows = []
    for i, name in enumerate(shown):
        cells = "".join(_cell(found, shown, i, j) for j in range(len(shown)))
        rows.append(f'<tr><th class="da-name">{i + 1}. {escape(name)}</th>{cells}</tr>')
    head = "".join(f'<th title="{escape(name)}">{j + 1}</th>' for j, name in enumerate(shown))
    return (
        f'<div class="da-scroll"><table class="da-matrix" id="da-matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="da-board-facts">Share of its pairs with the column that the row won, ties half; below, how many.</p>'
    )


def _cell(found: Any, shown: list[str], i: int, j: int) -> str:
    num = found.wins[i, j] + found.wins[j, i]
    if i == j:
        return '<td class="da-self"></td>'
    model = f"the model says {_percent(found.probability[i, j])} %"
    title = escape(f"{shown[i]} against {shown[j]}: {model}")
    if num == 0:
        return f'<td title="{title}"><small>{DASH}</small></td>'
    share = found.wins[i, j] / num
    kind, depth = ("win", share - 0.5) if share >= 0.5 else ("loss", 0.5 - share)
    return (
        f'<td class="da-{kind}" style="--depth:{160 * depth:.0f}%" title="{title}">'
        f"{_percent(share)}<small>{num:.0f}</small></td>"
    )


def _power(found: Any, shown: list[str]) -> str:
    lines = []
    for k in range(len(shown) - 1):
        more = found.votes_needed(k, k + 1)
        if more == 0:
            text = "<b>decided</b>"
        elif more > MANY or math.isinf(more):
            text = f"more than {MANY:,} votes: they look equal"
        else:
            text = f"about <b>{more:,.0f}</b> more votes between them"
        lines.append(f"<li><span>{escape(shown[k])} over {escape(shown[k + 1])}</span><span>{text}</span></li>")
    return (
        f'<ul class="da-lines" id="da-power">{"".join(lines)}</ul>'
        '<p class="da-board-facts">Until the interval leaves out 50 % with a chance of 80 %, if the difference is what '
        f"it looks like now. Design effect of the votes so far: {found.design_effect:.2f}.</p>"
    )


def _agreement(found: Any) -> str:
    of = found.consensus
    if not of.num_shared:
        return '<p class="da-board-facts">Nothing was judged by two raters yet.</p>'
    alpha = "" if math.isnan(of.alpha) else f"Krippendorff\u2019s alpha <b>{of.alpha:.2f}</b>{DOT}"
    head = f'<p class="da-board-facts" id="da-alpha">{alpha}{of.num_shared} pairs judged by several raters</p>'
    raters = "".join(_share(share) for share in of.raters[:LISTED])
    prompts = "".join(_share(share) for share in of.prompts[:LISTED])
    titles = ("Raters, with the majority of the others", "Least agreed prompts, share of the majority")
    return head + "".join(
        f'<h4>{title}</h4><ul class="da-lines">{text}</ul>'
        for title, text in zip(titles, (raters, prompts), strict=True)
        if text
    )


def _share(share: Any) -> str:
    return (
        f'<li><span class="da-clamp" title="{escape(share.name)}">{escape(share.name or "no name")}</span>'
        f"<span><b>{_percent(share.share)} %</b> of {share.num_verdicts}</span></li>"
    )
