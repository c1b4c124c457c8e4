"""The ballot as HTML: prompt, pictures, aspects, buttons and progress; nothing in it tells who made a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from gradio_app._parts import data_uri, empty, escape

WIDTH = 1024  # pixels of a picture as it is sent
PIXEL_ART = 96  # pictures up to this side are drawn with hard pixels
PAIR = (
    ("left", '<i class="da-wide">Left</i><i class="da-narrow">Upper</i> is better', "1 or &larr;"),
    ("tie", "Tie", "0 or &darr;"),
    ("right", '<i class="da-wide">Right</i><i class="da-narrow">Lower</i> is better', "2 or &rarr;"),
    ("bad", "Both bad", "x"),
)
RANKING = (
    ("submit", "Submit", "Enter"),
    ("unpick", "One back", "&#9003;"),
    ("tie", "Tie", "0"),
    ("bad", "All bad", "x"),
)
START = '<div class="da-vote" data-state="start"></div>'


def shown(data: bytes) -> dict[str, Any]:
    """A picture as the page and the HTTP interface give it: made anew, so that nothing its file says comes along."""
    image = Image.open(io.BytesIO(data))
    return {"uri": data_uri(image, WIDTH), "width": image.width, "height": image.height}


def nothing() -> str:
    """The page where no folder holds anything to vote on."""
    return _state(
        "empty",
        empty(
            "Nothing to vote on yet",
            "Make pictures with several models, here in the tab Compare (<i>Keep for voting</i>) or with<br>"
            "<code>diffalign generate sprites-sdxl generate.prompts=smoke 'generate.vary=[{as: base}, {as: mine,"
            " adapter: runs/mine/export}]'</code><br>"
            "or let them be painted while you vote, below. Runs that wait for people (<code>source.votes</code>,"
            " <code>label.humans</code>) are offered by themselves.",
        ),
    )


def _state(name: str, inner: str, last: str | None = None) -> str:
    return f'<div class="da-vote" data-state="{name}" data-last="{escape(last or "")}">{inner}</div>'


def page(turn: Any, pictures: Sequence[dict[str, Any]], aspects: Sequence[str], last: str | None) -> str:
    """What a rater sees now.

    Args:
        turn: of `Voting.turn`.
        pictures: `shown`, in the ballot's order.
        last: the ballot of the rater's newest vote, which an undo takes back.
    """
    foot = _progress(turn) + (f'<p class="da-vote-problem">{escape(turn.problem)}</p>' if turn.problem else "")
    if turn.state == "wait":
        return _state("wait", empty("Pictures are being painted", "The first ones come in a moment.") + foot, last)
    if turn.state == "counted":
        return _state("counted", empty("These votes were counted", "The run has taken them and goes on.") + foot, last)
    if turn.state == "done":
        undo = f'<div class="da-vote-bar"><div class="da-vote-buttons">{_undo(last)}</div></div>'
        why = "Thank you. Choose something else to vote on, or take your last vote back."
        return _state("done", empty("You have seen all there is", why) + foot + undo, last)
    size = len(pictures)
    is_pair = size == 2
    cells = "".join(_picture(place, picture, is_pair) for place, picture in enumerate(pictures))
    buttons = _buttons(is_pair) + _undo(last)
    return (
        f'<div class="da-vote" data-state="vote" data-ballot="{escape(turn.ballot.id)}" data-size="{size}"'
        f' data-last="{escape(last or "")}">'
        f'<div class="da-vote-prompt" dir="auto">{escape(turn.ballot.prompt)}</div>'
        f'<div class="da-vote-pictures da-vote-of-{min(size, 5)}">{cells}</div>'
        f"{''.join(_aspect(number, name, size) for number, name in enumerate(aspects))}"
        f'<div class="da-vote-bar"><div class="da-vote-buttons">{buttons}</div>{foot}</div></div>'
    )


def _picture(place: int, picture: dict[str, Any], is_pair: bool) -> str:
    hard = " da-pixels" if max(picture["width"], picture["height"]) <= PIXEL_ART else ""
    name = ("Left picture", "Right picture")[place] if is_pair else f"Picture {place + 1}"
    image = (
        f'<img class="da-vote-image{hard}" src="{picture["uri"]}" alt="{name}" decoding="sync"'
        f' width="{picture["width"]}" height="{picture["height"]}" draggable="false"'
        f' style="--da-ratio:{picture["width"] / picture["height"]:.4f}">'
    )
    if is_pair:
        return f'<figure class="da-vote-picture">{image}</figure>'
    return (
        f'<button type="button" class="da-vote-picture da-vote-pick" id="da-vote-pick-{place}" data-place="{place}"'
        f' aria-label="{name}">{image}<span class="da-vote-rank"></span><kbd>{place + 1}</kbd></button>'
    )


def _aspect(number: int, name: str, size: int) -> str:
    """The best picture of one aspect, or none better: nothing chosen, nothing said."""
    labels = [label.removesuffix(" is better") for _, label, _ in (PAIR[0], PAIR[2])]
    if size > 2:
        labels = [str(place + 1) for place in range(size)]
    choices = "".join(
        f'<label><input type="radio" name="da-vote-aspect-{number}" value="{value}">'
        f'<span id="da-vote-aspect-{number}-{value}">{label}</span></label>'
        for value, label in [*enumerate(labels), ("tie", "Same")]
    )
    return f'<div class="da-vote-aspect" role="radiogroup" aria-label="{escape(name)}" data-aspect="{escape(name)}">' \
        f"<b>{escape(name)}</b>{choices}</div>"  # fmt: skip


def _buttons(is_pair: bool) -> str:
    return "".join(
        f'<button type="button" class="da-vote-button" id="da-vote-{name}" data-did="{name}">'
        f"<span>{label}</span><kbd>{key}</kbd></button>"
        for name, label, key in (PAIR if is_pair else RANKING)
    )


def _undo(last: str | None) -> str:
    off = "" if last else " disabled"
    return (
        f'<button type="button" class="da-vote-button da-vote-undo" id="da-vote-undo" data-did="undo"{off}>'
        "<span>Undo</span><kbd>u</kbd></button>"
    )


def _progress(turn: Any) -> str:
    of = turn.progress
    share = round(100 * of.mine / max(1, of.total))
    left = "" if turn.state == "counted" else f", {max(0, of.total - of.mine)} left by you"
    return (
        f'<div class="da-vote-progress" id="da-vote-progress"><div><i style="width:{min(100, share)}%"></i></div>'
        f'<span>{of.mine} of {of.total}{left}<i class="da-wide">; {of.everybody} by everybody</i></span></div>'
    )
