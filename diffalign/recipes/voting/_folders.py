"""Folders that people can vote on: pictures with a manifest, and queues (a ballot) of rollouts and labels."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from diffalign.recipes.generate._manifest import MANIFEST, read_manifest
from diffalign.sources._votes import BALLOT, TALLY, VOTES
from diffalign.types import UserError
from diffalign.votes import Picture, Place, Task, VoteBook

PICTURES, QUEUE = "pictures", "queue"
DEPTH, MAX_VISITED, MAX_FOUND = 8, 20_000, 200  # of the search for folders


def find(roots: Sequence[Path]) -> list[Path]:
    """Folders below `roots` to vote on, newest first, at most 200; links are not followed, nor counted queues found."""
    found: dict[Path, float] = {}
    for root in roots:
        visited = 0
        for here, folders, files in os.walk(root):
            visited += 1
            path, is_end = Path(here), False
            for name in (BALLOT, MANIFEST):
                if name in files and not (name == BALLOT and TALLY in files):
                    found[path] = (path / name).stat().st_mtime
                is_end = is_end or name in files
            depth = len(path.relative_to(root).parts)
            folders[:] = [] if is_end or depth >= DEPTH else sorted(f for f in folders if not f.startswith("."))
            if visited >= MAX_VISITED:
                break
    return sorted(found, key=lambda path: -found[path])[:MAX_FOUND]


def kind_of(folder: Path) -> str:
    """What lies in a folder.

    Raises:
        UserError: neither pictures nor a queue.
    """
    if (folder / BALLOT).is_file():
        return QUEUE
    if (folder / MANIFEST).is_file():
        return PICTURES
    raise UserError(f"{folder}: neither a {MANIFEST} of `diffalign generate` nor a {BALLOT} that waits for votes")


def inside(folder: Path, name: str) -> Path:
    """A file of the folder.

    Raises:
        UserError: a link that leads out of it: nothing there is read or written.
    """
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise UserError(f"{path}: a link that leads elsewhere: put the file itself there")
    return path


def key_of(folder: Path) -> str:
    """What a folder is known by: its path and its first picture's name, size and time.

    A folder that was made anew under an old name is thus another task, and old votes do not count for it.
    """
    kind = kind_of(folder)
    row = next(_lines(folder, kind), None)
    if row is None:
        raise UserError(f"{folder}: there are no pictures in it")
    first = row["images"][0] if kind == QUEUE else row["file"]
    try:
        status = (folder / first).stat()
        stamp = f"{status.st_size}|{status.st_mtime_ns}"
    except OSError:
        stamp = "missing"
    mark = hashlib.blake2b(json.dumps([row, stamp], sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{kind}:{folder.resolve()}:{mark}"


def open_folder(book: VoteBook, folder: Path, title: str, size: int) -> Task:
    """The task of a folder with all that is in it now; pictures are read when they are drawn.

    Args:
        size: pictures on a ballot; a queue shows all of an entry.

    Raises:
        UserError: no such folder, nothing to vote on, or a broken line.
    """
    kind, key = kind_of(folder), key_of(folder)
    if kind == QUEUE:
        return _open_queue(book, folder, title, key)
    is_varied = _is_varied(folder)
    task = book.add_task(f"{key}:{size}", kind, title, str(folder.resolve()), size)
    makers: dict[str, Mapping[str, Any]] = {}

    def places() -> Iterator[Place]:
        for row in _lines(folder, kind):
            makers.setdefault(_maker(row, folder), row.get("made") or {})
            yield _place(row, _maker(row, folder), is_varied)

    book.add_places(task.id, places())
    for name, made in makers.items():
        book.add_contestant(task.id, name, made)
    return task


def _open_queue(book: VoteBook, folder: Path, title: str, key: str) -> Task:
    inside(folder, VOTES)
    sizes = {len(row["images"]) for row in _lines(folder, QUEUE)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise UserError(f"{folder / BALLOT}: entries of {sorted(sizes)} pictures; all have the same number, 2 or more")
    task = book.add_task(key, QUEUE, title, str(folder.resolve()), sizes.pop())
    book.add_places(
        task.id,
        (
            Place(
                row["id"], row["prompt"], tuple(Picture(f"{n:03d}", "", file=f) for n, f in enumerate(row["images"])), i
            )
            for i, row in enumerate(_lines(folder, QUEUE))
        ),
    )
    return task


def _lines(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Checked rows of the list in a folder.

    Raises:
        UserError: a line that is none of ours; it is named.
    """
    path = inside(folder, BALLOT if kind == QUEUE else MANIFEST)
    for number, row in enumerate(read_manifest(path), start=1):
        if not (_is_entry(row) if kind == QUEUE else _is_picture(row)):
            keys = "id, prompt and images" if kind == QUEUE else "file, prompt and number"
            raise UserError(f"{path}: line {number} lacks {keys}: it is not what this toolkit writes")
        yield row


def _is_entry(row: Any) -> bool:
    """Whether a line is one of a ballot."""
    if not isinstance(row, dict) or not isinstance(row.get("images"), list) or not row["images"]:
        return False
    return all(isinstance(text, str) and text for text in (row.get("id"), row.get("prompt"), *row["images"]))


def _is_picture(row: Any) -> bool:
    """Whether a line is one of a manifest."""
    if not isinstance(row, dict) or not isinstance(row.get("number", 0), int):
        return False
    return all(isinstance(text, str) and text for text in (row.get("file"), row.get("prompt")))


def _maker(row: Mapping[str, Any], folder: Path) -> str:
    return str(row.get("variant") or folder.name)


def _is_varied(folder: Path) -> bool:
    """Whether the first prompt has pictures of several makers: then theirs of one noise are compared, else its own."""
    _, rows = next(groupby(_lines(folder, PICTURES), key=lambda row: row.get("prompt_id")))
    return len({row.get("variant") for row in rows}) > 1


def _place(row: Mapping[str, Any], maker: str, is_varied: bool) -> Place:
    prompt_id, number, seed = row.get("prompt_id", row["prompt"]), row.get("number", 0), row.get("seed")
    name = f"{prompt_id}/{number}" if is_varied else f"{prompt_id}"
    slot = maker if is_varied else f"{number:03d}"
    picture = Picture(slot, maker, file=row["file"], number=number, seed=seed if isinstance(seed, int) else None)
    return Place(name, row["prompt"], (picture,), zlib.crc32(name.encode()))  # prompts in an order of no meaning
