"""One record as people look at it: edits applied, pictures shrunk, and what is wrong with it said in words."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from diffalign.browsing._edits import Edit
from diffalign.data import BadRow
from diffalign.data._images import decode, probe
from diffalign.errors import UserError

MAX_BYTES = 64 * 2**20  # of an image file
MAX_IMAGES = 32  # of a card
MAX_PIXELS = 8192  # of a side: a decompression bomb is not opened


@dataclass(frozen=True)
class Shown:
    """One image of a card: a thumbnail, or why there is none."""

    utility: float
    rank: int  # 1 is best; equal utilities share a rank
    picture: Any = None  # PIL image
    problem: str = ""
    caption: str | None = None  # where it differs from the prompt
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Card:
    """A record with its edits; `problem` says why training cannot use it. No `images`: nothing of it can be read."""

    row: int
    place: str  # file and row
    edit: Edit
    prompt: str = ""
    images: tuple[Shown, ...] = ()
    user: str | None = None
    split: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    margin: float = 0.0  # utility of the best image minus that of the worst


def flipped(utility: tuple[float, ...]) -> tuple[float, ...]:
    """The best value changes places with the worst, the second best with the second worst, and so on."""
    values = sorted(set(utility))
    opposite = dict(zip(values, reversed(values), strict=True))
    return tuple(opposite[value] for value in utility)


def edited(draft: Any, edit: Edit) -> Any:
    """A draft of a record with flips and captions; whether it is dropped is for the caller to heed."""
    texts = dict(edit.captions)
    captions = draft.captions and tuple(texts.get(k, caption) for k, caption in enumerate(draft.captions))
    utility = flipped(draft.utility) if edit.is_flipped else draft.utility
    return replace(draft, prompt=texts.get(None, draft.prompt), captions=captions, utility=utility)


def image_bytes(image: Any, below: Callable[[Path], Path]) -> bytes:
    """The encoded image of a draft.

    Raises:
        BadRow: none there, a path that `below` refuses, or a file too large to be a picture.
    """
    if image is None:
        raise BadRow("missing image")
    if isinstance(image, bytes):
        return image
    try:
        path = below(image)
        if not path.is_file():
            raise BadRow("missing image", f"{image.name}: no such file")
        if path.stat().st_size > MAX_BYTES:
            raise BadRow("absurd size", f"{image.name}: more than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except (UserError, OSError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("missing image", f"{image.name}: {getattr(error, 'strerror', None) or error}") from error


def thumbnail(data: bytes, side: int) -> Any:
    """An RGB image of at most `side` pixels.

    Raises:
        BadRow: not an image, broken, or absurdly large.
    """
    height, width = probe(data)
    if max(height, width) > MAX_PIXELS:
        raise BadRow("absurd size", f"{width} x {height} pixels")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "JPEG":
                found = decode(data)
            else:
                image.draft("RGB", (2 * side, 2 * side))  # decodes at an eighth to the whole of the size
                found = ImageOps.exif_transpose(image).convert("RGB")
    except BadRow:
        raise
    except Exception as error:  # hostile bytes make decoders raise anything
        raise BadRow("broken image", str(error)[:120]) from error
    found.thumbnail((side, side), Image.Resampling.LANCZOS)
    return found


def card(row: int, place: str, draft: Any, edit: Edit, below: Callable[[Path], Path], side: int) -> Card:
    """The card of a draft that was parsed and edited."""
    num, values = len(draft.utility), sorted(draft.utility, reverse=True)
    images = []
    for k, image in enumerate((*draft.images, *[None] * num)[: min(num, MAX_IMAGES)]):
        try:
            picture, problem = thumbnail(image_bytes(image, below), side), ""
        except BadRow as error:
            picture, problem = None, str(error)
        caption = draft.captions[k] if draft.captions and k < len(draft.captions) else None
        scores = {name: of[k] for name, of in draft.scores.items() if k < len(of)}
        rank = 1 + values.index(draft.utility[k])
        images.append(Shown(draft.utility[k], rank, picture, problem, caption, scores))
    is_text = isinstance(draft.prompt, str) and bool(draft.prompt.strip())
    problems = [] if is_text else ["missing caption"]
    if num > MAX_IMAGES:
        problems.append(f"the first {MAX_IMAGES} of {num} images are shown")
    return Card(
        row, place, edit, draft.prompt if is_text else "", tuple(images), draft.user, draft.split, draft.meta,
        "; ".join(problems), values[0] - values[-1],
    )  # fmt: skip
