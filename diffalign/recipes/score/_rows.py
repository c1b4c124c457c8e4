"""What `score` judges: the rows of a manifest, or the pictures of any folder with prompts from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.recipes.generate import MANIFEST, read_manifest
from diffalign.sections import Score
from diffalign.types import UserError

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"))

Row = dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """`rows()` reads them anew, one at a time: file (below `root`), prompt, prompt_id, number, and what else is known.

    Without a manifest, prompt_id counts the runs of pictures that follow each other with one prompt, and number the
    pictures in a run.
    """

    root: Path
    rows: Callable[[], Iterator[Row]]
    num: int


def open_pictures(settings: Score, need_prompts: bool) -> Pictures:
    """The pictures of `score.images`; prompts may be missing only where no scorer reads them.

    Raises:
        UserError: no such folder, no pictures, no prompts, another number of prompts, or a row without file or prompt.
    """
    if settings.images is None:
        raise UserError("score.images is missing: a folder that `diffalign generate` wrote, or a folder of pictures")
    source = Path(settings.images)
    root = source if source.is_dir() else source.parent
    rows: Callable[[], Iterator[Row]]
    if settings.prompts is not None:
        prompts = Path(settings.prompts)
        if not source.is_dir():
            raise UserError(f"score.images={source} is no folder: score.prompts goes with a folder of pictures")
        if not prompts.is_file():
            raise UserError(f"score.prompts: no such file: {prompts}")
        if prompts.suffix == ".jsonl":
            rows = lambda: _numbered(_jsonl(prompts))  # noqa: E731
        else:
            names = picture_names(source)
            _check_number(prompts, len(names), source)
            rows = lambda: _numbered(_named(names, _lines(prompts)))  # noqa: E731
    elif source.is_file() or (source / MANIFEST).is_file():
        rows = lambda: _manifest(source)  # noqa: E731
    elif not source.is_dir():
        raise UserError(f"score.images={source}: no such folder")
    elif need_prompts:
        raise UserError(
            f"{source} holds no {MANIFEST}: name a folder that `diffalign generate` finished, or give the prompts as"
            " score.prompts (a line per picture in the order of their names, or JSONL with `file` and `prompt`)"
        )
    else:
        names = picture_names(source)
        rows = lambda: _numbered({"file": name, "prompt": ""} for name in names)  # noqa: E731
    num = sum(1 for _ in rows())
    if not num:
        raise UserError(f"{source} holds no pictures")
    return Pictures(root, rows, num)


def picture_names(folder: Path) -> list[str]:
    """The pictures under a folder by their suffix, as paths below it, sorted; hidden ones are left out."""
    found = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = Path(inside).relative_to(folder)
        names = (name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        found += [(place / name).as_posix() for name in names]
    return sorted(found)


def _check_number(prompts: Path, num: int, folder: Path) -> None:
    given = sum(1 for _ in _lines(prompts))
    if given != num:
        raise UserError(
            f"score.prompts: {prompts} holds {given} lines for the {num} pictures of {folder}: one for each"
        )


def _lines(path: Path) -> Iterator[str]:
    """A prompt per line, nothing stripped but the line's end; an empty line is an empty prompt."""
    try:
        with path.open(encoding="utf-8-sig") as lines:  # universal newlines only: other separators are part of a prompt
            yield from (line.removesuffix("\n") for line in lines)
    except UnicodeDecodeError as error:
        raise UserError(f"score.prompts: {path} is not UTF-8 text") from error


def _named(names: list[str], prompts: Iterator[str]) -> Iterator[Row]:
    return ({"file": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True))


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"score.prompts: {path}, line {number} is not JSON") from error
        yield _checked(row, f"score.prompts: {path}, line {number}")


def _manifest(source: Path) -> Iterator[Row]:
    for number, row in enumerate(read_manifest(source), start=1):
        yield _checked(row, f"{source}: row {number} of the manifest")


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object")
    for key in ("file", "prompt"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where} has no text `{key}`")
    return row


def _numbered(rows: Iterator[Row]) -> Iterator[Row]:
    prompt_id, number, last = -1, 0, None
    for row in rows:
        is_same = prompt_id >= 0 and row["prompt"] == last
        prompt_id, number = (prompt_id, number + 1) if is_same else (prompt_id + 1, 0)
        last = row["prompt"]
        yield {**row, "prompt_id": row.get("prompt_id", prompt_id), "number": row.get("number", number)}
