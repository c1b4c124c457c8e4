"""Pictures before scorers: how they are read and asked about, and what a run does that needs every score."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.data import BadRow
from diffalign.data._images import check_size, decode
from diffalign.types import Scorer, UserError

BATCH = 64  # images decoded at a time
MIN_SIDE, MAX_SIDE = 16, 8192  # pixels: what the readers of preference data allow


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` rows."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def read_picture(path: Path) -> Image.Image:
    """A picture as every scorer sees it: RGB, upright by its EXIF orientation, transparency over white, first frame.

    The same rule as for training pictures. For opaque, upright ones it is Pillow's `convert("RGB")`.

    Raises:
        BadRow: not a picture, a truncated one, or a side under 16 or over 8192 pixels (by the header: what is larger is
            not decoded).
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:  # not `probe`, which decodes a PNG to look for its EXIF
            check_size((image.height, image.width), MIN_SIDE, MAX_SIDE)
    except BadRow:
        raise
    except Exception:  # hostile bytes make Pillow raise anything, and `decode` say what
        return decode(data)
    return decode(data)


def open_image(path: Path) -> Image.Image:
    """`read_picture` where the run needs the picture.

    Raises:
        UserError: missing or broken; the file is named.
    """
    try:
        return read_picture(path)
    except (OSError, BadRow) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is no readable image ({why}): make it again or take it out of the manifest") from error


class Refusal(str):
    """Why there is no answer about a picture, in place of one."""


def asked(
    name: str,
    ask: Callable[[list[Image.Image], list[str]], Iterable[Any]],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
) -> list[Any]:
    """What `ask` says of each picture, or a `Refusal`; a refused batch is halved until the culprits are alone.

    Raises:
        UserError: from `ask`: what it needs is not there.
        RuntimeError: another number of answers than pictures.
    """
    try:
        found = list(ask(list(images), list(prompts)))
    except UserError:
        raise
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(images) > 1:
            half = len(images) // 2
            return asked(name, ask, images[:half], prompts[:half]) + asked(name, ask, images[half:], prompts[half:])
        if not isinstance(error, ValueError):
            raise
        return [Refusal(" ".join(str(error).split()) or "ValueError")]
    if len(found) != len(images):
        raise RuntimeError(f"scorer {name} gave {len(found)} scores for {len(images)} images")
    return found


def answers(name: str, scorer: Scorer, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | str]:
    """A finite score, or why there is none, per picture.

    Raises:
        UserError, RuntimeError: see `asked`.
    """
    given = asked(name, scorer.score, images, prompts)
    values = [value if isinstance(value, Refusal) else float(value) for value in given]
    return [
        value if isinstance(value, Refusal) or float("-inf") < value < float("inf") else f"gave {value}"
        for value in values
    ]


def judge(
    images: Sequence[Image.Image], prompts: Sequence[str], scorers: Mapping[str, Scorer], names: Sequence[str]
) -> dict[str, list[float]]:
    """scorer -> a score per picture; `names` are what the pictures are called in errors.

    Raises:
        UserError: a scorer that cannot judge a prompt or picture, or gave no finite number.
    """
    values: dict[str, list[float]] = {}
    for scorer_name, scorer in scorers.items():
        try:
            scores = scorer.score(list(images), list(prompts))
        except ValueError as error:
            raise UserError(f"scorer {scorer_name}: {error}") from error
        values[scorer_name] = [float(score) for score in scores]
        for name, value in zip(names, values[scorer_name], strict=True):
            if not float("-inf") < value < float("inf"):
                raise UserError(f"scorer {scorer_name} gave {value} for {name}")
    return values


def keep_whole_lines(path: Path) -> int:
    """How many whole lines a file of results holds; what a kill left of the last one is cut off."""
    if not path.is_file():
        return 0
    done, end = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            done, end = done + 1, end + len(line)
    os.truncate(path, end)
    return done
