"""The Browse tab's pieces of HTML: cards, and the bars above and below them."""

from __future__ import annotations

from typing import Any

from gradio_app._parts import data_uri, empty, escape

LONGEST = 10_000  # characters of a caption
PIXEL_ART = 96  # pictures up to this side are drawn with hard pixels
DOT = " \u00b7 "
NOT_OPEN = empty(
    "Choose a data set",
    "Data sets below this app\u2019s folders are listed above: Parquet in the record or the Pick-a-Pic format, JSONL,"
    " folders with <code>w/</code> and <code>l/</code>, and <code>votes.db</code>. <br>"
    "<code>diffalign label</code> makes one of scored pictures.",
)
NOTHING = empty("No record fits", "Change the filter above, or take back the search.")


def button(kind: str, text: str, row: int | None = None, page: int | None = None, is_off: bool = False) -> str:
    """A button that browse.js reports; `kind` is what it asks for."""
    values = {"kind": kind, "row": row, "page": page}
    data = "".join(f' data-{name}="{value}"' for name, value in values.items() if value is not None)
    return f'<button type="button" class="da-browse-button"{data}{" disabled" if is_off else ""}>{text}</button>'


def bar(page: int, num_pages: int, num_found: int, num: int, log: Any) -> str:
    """Where one is, and the last edit to take back."""
    edits = len(log.entries)
    found = f"{num_found:,} of {num:,} records" if num_found != num else f"{num:,} records"
    told = f"{found}{DOT}{edits} edit{'' if edits == 1 else 's'}" if edits else found
    undo = button("undo", "Undo", is_off=not edits) + button("redo", "Redo", is_off=not log.num_undone)
    return f'<div class="da-browse-bar"><span>{told}</span><div>{undo}</div>{_turn(page, num_pages)}</div>'


def _turn(page: int, num_pages: int) -> str:
    jump = f'<input type="number" min="1" max="{max(1, num_pages)}" value="{page + 1}" aria-label="page">'
    back, on = (button("go", text, page=to, is_off=not 0 <= to < num_pages) for text, to in _ways(page))
    return f'<div class="da-browse-turn">{back}<label>Page {jump} of {max(1, num_pages):,}</label>{on}</div>'


def _ways(page: int) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("\u2190 Back", page - 1), ("Next \u2192", page + 1)


def cards(found: list[Any], page: int, num_pages: int) -> str:
    """A page of records, and at its end the way on."""
    if not found:
        return NOTHING
    below = f'<div class="da-browse-bar da-browse-below"><span></span>{_turn(page, num_pages)}</div>'
    return f'<div class="da-browse-cards">{"".join(map(_card, found))}</div>{below if num_pages > 1 else ""}'


def _card(card: Any) -> str:
    edit = card.edit
    marks = [text for is_so, text in ((edit.is_dropped, "dropped"), (edit.is_flipped, "flipped")) if is_so]
    marks += ["caption fixed"] if edit.captions else []
    pills = "".join(f'<span class="da-browse-mark">{text}</span>' for text in marks)
    problem = f'<div class="da-browse-problem">{escape(card.problem)}</div>' if card.problem else ""
    images = "".join(_image(image, k, card) for k, image in enumerate(card.images))
    facts = [card.place]
    if card.images:
        facts = [f"margin {card.margin:.3g}", *([card.user] if card.user else []), card.place]
    buttons = button("drop", "Bring back" if edit.is_dropped else "Drop", card.row)
    if card.images:
        buttons = button("flip", "Flip", card.row) + button("fix", "Fix caption", card.row) + buttons
    is_dropped = " da-browse-dropped" if edit.is_dropped else ""
    return (
        f'<article class="da-browse-card{is_dropped}" data-row="{card.row}">{_text(card.prompt, None)}{problem}'
        f'<div class="da-browse-images">{images}</div>'
        f'<div class="da-browse-facts">{pills}{escape(DOT.join(facts))}</div>'
        f'<div class="da-browse-buttons">{buttons}</div></article>'
    )


def _text(text: str, image: int | None) -> str:
    """A prompt or caption that can be unfolded, and edited where all of it is there."""
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}\u2026"
    at = f' data-image="{"" if image is None else image}"' if shown == text else ""
    return f'<div class="da-browse-text"{at} title="{escape(shown[:1000])}">{escape(shown)}</div>'


def _image(image: Any, k: int, card: Any) -> str:
    if image.picture is None:
        picture = f'<div class="da-browse-missing">{escape(image.problem)}</div>'
    else:
        pixels = ' class="da-pixels"' if max(image.picture.size) <= PIXEL_ART else ""
        picture = f'<img{pixels} src="{data_uri(image.picture)}" alt="image {k + 1}">'
    is_tie = len({one.utility for one in card.images}) == 1
    rank = "tie" if is_tie and len(card.images) > 1 else f"#{image.rank}"
    scores = "".join(f"<span>{escape(name)} {value:.3g}</span>" for name, value in image.scores.items())
    caption = _text(image.caption, k) if image.caption is not None else ""
    is_best = " da-browse-best" if image.rank == 1 and not is_tie else ""
    return (
        f'<figure class="da-browse-image{is_best}">{picture}<figcaption><b>{rank}</b> '
        f'<span title="utility">{image.utility:.3g}</span>'
        f'<div class="da-browse-scores">{scores}</div>{caption}</figcaption></figure>'
    )
