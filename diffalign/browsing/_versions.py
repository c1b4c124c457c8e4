"""An edited data set as a new one: streamed, resumable, and never over an old one."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffalign._json import read_json, to_json, write_json
from diffalign.browsing._cards import edited, image_bytes
from diffalign.browsing._edits import Edit, EditLog
from diffalign.data import BadRow, RecordWriter
from diffalign.data._images import probe
from diffalign.data._reader import check_texts
from diffalign.errors import UserError
from diffalign.types import Record

EVERY = 64  # rows between looks at the progress
VERSION = "version.json"
NAME = re.compile(r"[\w+-]{1,100}", re.ASCII)  # no dots: an ending would make it another kind of data


def version_folder(parent: Path, root: Path, name: str | None = None) -> Path:
    """`root/NAME`; without a name the parent's with the next free number: pairs, pairs-v2, pairs-v3.

    Raises:
        UserError: a name that is no plain file name.
    """
    if name is not None:
        if not NAME.fullmatch(name):
            raise UserError(f"{name[:100]!r}: a version's name has 1 to 100 letters, digits and + - _")
        return root / name
    stem = re.sub(r"[^\w+-]", "-", parent.stem if parent.is_file() else parent.name, flags=re.ASCII)
    stem, number = re.sub(r"-v\d+$", "", stem)[:80] or "data", 2
    while (root / f"{stem}-v{number}").exists():
        number += 1
    return root / f"{stem}-v{number}"


def save_version(browser: Any, log: EditLog, target: Path, below: Callable[[Path], Path]) -> Iterator[tuple[int, int]]:
    """Writes the records as they are after the edits of `log` into the new folder `target`; yields (rows done, rows).

    Until all are there the folder is called `target`.partial; the same call goes on with it. version.json says what
    the parent was and what was done to it. Rows that no reader could use are left out, counted by reason.

    Raises:
        UserError: the folder is there, an unfinished one is of other edits, no record is left, or a full disk.
    """
    partial = target.with_name(f"{target.name}.partial")
    edits = {row: log.of(row) for row in log.rows()}
    plan = {"parent": str(browser.path), "fingerprint": browser.fingerprint, "edits": log.entries}
    if target.exists():
        raise UserError(f"{target} is there already: give the version another name (nothing was overwritten)")
    partial.mkdir(parents=True, exist_ok=True)
    with _alone(partial):
        begun = read_json(partial / VERSION)
        if begun and {key: begun.get(key) for key in plan} != json.loads(to_json(plan)):
            raise UserError(f"{partial} is an unfinished version with other edits: remove it or give another name")
        write_json(partial / VERSION, plan)
        num, dropped, bad = len(browser), 0, Counter[str]()
        with RecordWriter(partial, resume=True) as writer:
            start = 0
            if writer.state:
                start, dropped, bad = writer.state["row"] + 1, writer.state["dropped"], Counter(writer.state["bad"])
            for row in range(start, num):
                if row % EVERY == 0:
                    yield row, num
                edit = edits.get(row, Edit())
                if edit.is_dropped:
                    dropped += 1
                    continue
                try:
                    record = _record(edited(browser.draft(row), edit), below)
                except BadRow as error:
                    bad[error.reason] += 1
                    continue
                writer.write(record, {"row": row, "dropped": dropped, "bad": dict(bad)})
        if not writer.num_written:
            raise UserError(f"{browser.path.name}: no record is left of {num}: undo some edits")
        facts = {"records": writer.num_written, "dropped": dropped, "left_out": dict(bad)}
        write_json(partial / VERSION, plan | facts | {"saved": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        os.rename(partial, target)
    yield num, num


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock ends with the process.

    Raises:
        UserError: another one is at work.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder} is being written already") from error
    finally:
        os.close(lock)


def _record(draft: Any, below: Callable[[Path], Path]) -> Record:
    """The record of an edited draft; its id is not written.

    Raises:
        BadRow: no reader could use it.
    """
    check_texts(draft)
    images = tuple(image_bytes(image, below) for image in draft.images)
    if len(images) != len(draft.utility):
        raise BadRow("missing image", f"{len(images)} images for {len(draft.utility)} utilities")
    for image in images:
        probe(image)
    names = ("prompt", "utility", "captions", "user", "split", "scores", "meta", "user_embedding")
    return Record(id=0, images=images, **{name: getattr(draft, name) for name in names})
