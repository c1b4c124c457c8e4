"""The HTML of a comparison: the grid of pictures with their scores, its progress, and two pictures face to face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from diffalign import api
from gradio_app._parts import data_uri, empty, escape

WIDTH, LARGE = 360, 1024  # pixels of a picture in the grid, and of one in a pair
PIXEL_ART = 128  # pictures up to this side are drawn with hard pixels
SHORT = 220  # characters of a prompt that is shown whole

Cell = tuple[int, int, int]


def nothing() -> str:
    """Before the first comparison."""
    return empty("No pictures yet", "Choose models and prompts, and press <b>Compare</b>.")


def waiting() -> str:
    """Before the first sign of life."""
    return '<div class="da-cmp-status" role="status"><div><span>Waiting for your turn</span></div></div>'


def cell_name(cell: Cell) -> str:
    """As it is called in the page."""
    return "-".join(map(str, cell))


def cell_of(name: object) -> Cell | None:
    """The cell of a name that came from the page; None of anything else."""
    parts = str(name)[:40].split("-")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


def grid(comparison: Any, with_pictures: bool = True) -> str:
    """Rows of prompts and seeds, columns of contestants, in a box that scrolls for itself."""
    headings = comparison.headings()
    parts = [
        f'<div class="da-cmp-cells" style="--da-cmp-columns: {len(headings)}">',
        '<div class="da-cmp-corner"></div>',
    ]
    parts += [f'<div class="da-cmp-head" title="{escape(heading)}">{escape(heading)}</div>' for heading in headings]
    best = {scorer: comparison.best(scorer) for scorer in comparison.scores}
    prompt = None
    for label, cells in comparison.rows():
        if cells[0][1] != prompt:
            prompt = cells[0][1]
            parts.append(_prompt(comparison.plan.prompts[prompt]))
        parts.append(f'<div class="da-cmp-side">{escape(label)}</div>')
        for cell in cells:
            inside = _picture(comparison, cell) if with_pictures and cell in comparison.pictures else ""
            scores = _scores(comparison, cell, best)
            parts.append(
                f'<div class="da-cmp-cell"><div id="da-cmp-cell-{cell_name(cell)}">{inside or _blank(comparison)}</div>'
            )
            parts.append(f"{scores}</div>")
    return f'<div class="da-cmp-scroll" tabindex="0">{"".join(parts)}</div></div>'


def news(comparison: Any, cells: Sequence[Cell]) -> str:
    """Pictures that have arrived, for the page to put in their places."""
    return "".join(
        f'<div data-for="da-cmp-cell-{cell_name(cell)}">{_picture(comparison, cell)}</div>' for cell in cells
    )


def _prompt(text: str) -> str:
    if len(text) <= SHORT:
        return f'<div class="da-cmp-prompt"><span>{escape(text)}</span></div>'
    shown = f"<summary>{escape(text[:SHORT])} ...</summary>"
    return f'<div class="da-cmp-prompt"><details>{shown}<div>{escape(text)}</div></details></div>'


def _blank(comparison: Any) -> str:
    return f'<div class="da-cmp-blank{" da-cmp-waits" if comparison.is_running else ""}"></div>'


def _picture(comparison: Any, cell: Cell) -> str:
    column, prompt, number = cell
    plan = comparison.plan
    said = f"{plan.columns[column].label}, seed {plan.numbers[number]}: {plan.prompts[prompt][:SHORT]}"
    image = _img(comparison.picture(cell), WIDTH, said)
    return f'<button type="button" class="da-cmp-pick" data-cell="{cell_name(cell)}">{image}</button>'


def _img(image: Image.Image, width: int, said: str, more: str = "") -> str:
    pixels = "da-pixels" if max(image.size) <= PIXEL_ART else ""
    return f'<img class="{pixels} {more}" src="{data_uri(image, width)}" alt="{escape(said)}">'


def _scores(comparison: Any, cell: Cell, best: dict[str, set[Cell]]) -> str:
    lines = []
    for scorer in comparison.plan.view.scorers:
        value = comparison.scores.get(scorer, {}).get(cell)
        if isinstance(value, float):
            text, more = f"{value:.4g}", " da-cmp-best" if cell in best[scorer] else ""
            lines.append(f'<div class="da-cmp-score{more}"><span>{escape(scorer)}</span><b>{text}</b></div>')
        else:
            why = comparison.failed.get(scorer) or value
            text, title = ("none", f' title="{escape(why)}"') if why else ("", "")
            lines.append(f'<div class="da-cmp-score"{title}><span>{escape(scorer)}</span><i>{text}</i></div>')
    return f'<div class="da-cmp-scores">{"".join(lines)}</div>' if lines else ""


def status(comparison: Any) -> str:
    """What is going on, a bar, and what went wrong."""
    done, total = len(comparison.pictures), comparison.total
    said = f"{comparison.stage.capitalize()}: {done} of {total} pictures"
    bar = (
        f'<div class="da-cmp-bar"><i style="width: {comparison.share:.1%}"></i></div>' if comparison.is_running else ""
    )
    notes = [f"{scorer} gave no scores: {why}" for scorer, why in comparison.failed.items()]
    notes += _unjudged(comparison)
    if comparison.error is not None:
        kind = "" if isinstance(comparison.error, api.UserError) else f"{type(comparison.error).__name__}: "
        notes.insert(0, f"{kind}{comparison.error}")
    told = "".join(f'<div class="da-cmp-note">{escape(note[:600])}</div>' for note in notes)
    hint = '<span class="da-cmp-hint">click two pictures to lay one over the other</span>' if done > 1 else ""
    return f'<div class="da-cmp-status" role="status"><div><span>{escape(said)}</span>{hint}</div>{bar}{told}</div>'


def _unjudged(comparison: Any) -> list[str]:
    """Of each scorer that left pictures out: how many, and why the first."""
    notes = []
    for scorer, answers in dict(comparison.scores).items():
        reasons = [answer for answer in list(answers.values()) if isinstance(answer, str)]
        if reasons:
            notes.append(f"{scorer} gave no score for {len(reasons)} of {len(answers)} pictures: {reasons[0]}")
    return notes


def pair(comparison: Any, first: Cell, second: Cell) -> str:
    """One picture over the other behind a slider, and what differs.

    Raises:
        UserError: see `api.difference`.
    """
    plan, images = comparison.plan, [comparison.picture(cell) for cell in (first, second)]
    names = [f"{plan.columns[cell[0]].label}, seed {plan.numbers[cell[2]]}" for cell in (first, second)]
    prompts = dict.fromkeys(plan.prompts[cell[1]][:SHORT] for cell in (first, second))
    over = _img(images[0], LARGE, names[0]) + _img(images[1], LARGE, names[1], "da-cmp-over")
    slider = '<input type="range" min="0" max="100" value="50" step="0.5" aria-label="how much of each picture">'
    left, right = (f"<span>{escape(name)}</span>" for name in names)
    try:
        changed, mean, gain = api.difference(*images)
        said = f"Difference x {gain}; mean |difference| <b>{mean:.2f}</b> of 255"
        apart = f"<figure>{_img(changed, LARGE, 'difference')}<figcaption>{said}</figcaption></figure>"
    except api.UserError as error:
        apart = f'<figure><figcaption class="da-cmp-note">{escape(error)}</figcaption></figure>'
    return (
        f'<div class="da-cmp-pair"><div class="da-cmp-pair-prompt">{escape("; ".join(prompts))}</div>'
        f'<div class="da-cmp-pair-both"><figure><div class="da-cmp-slide">{over}{slider}</div>'
        f'<figcaption class="da-cmp-ends">{left}{right}</figcaption></figure>{apart}</div></div>'
    )
