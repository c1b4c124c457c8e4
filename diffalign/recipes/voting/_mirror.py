"""The votes on a queue, in the file that the run waits for: votes.jsonl beside its ballot.

The file of votes is the truth, votes.jsonl follows it: what was cast since the last time is appended, and what a crash
left out or half written is put right the next time. Lines that somebody else wrote stay. All of it happens inside a
transaction of the file of votes, so that servers do not write at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign._atomic import write_atomic
from diffalign._json import to_json
from diffalign.recipes.voting._folders import inside, key_of
from diffalign.sources._votes import VOTES
from diffalign.types import UserError
from diffalign.votes import Task, Vote, VoteBook
from diffalign.votes._store import last_event, select_votes

OURS = b'{"ballot": "'  # how our lines begin, whole or torn


def mirror(book: VoteBook, task: Task) -> bool:
    """Brings votes.jsonl to what the votes are now; returns False where the folder is gone or another's."""
    try:
        path = inside(Path(task.folder), VOTES)
        if key_of(path.parent) != task.key:
            return False
    except UserError:
        return False
    with book.writing() as db:
        sql = "SELECT mirrored_event, mirrored_bytes FROM tasks WHERE id = ?"
        event, size = db.execute(sql, (task.id,)).fetchone()
        tail = _tail(path, size)
        undone = """SELECT 1 FROM events u JOIN ballots b ON b.id = u.ballot JOIN events e ON e.ballot = b.id
          WHERE u.what = 'undo' AND u.id > ? AND e.what = 'cast' AND e.id <= ? AND b.task = ? LIMIT 1"""
        is_behind = db.execute(undone, (event, event, task.id)).fetchone() is not None
        if is_behind or tail is None or any(map(_is_torn, tail.splitlines())):
            ours = {row[0] for row in db.execute("SELECT id FROM ballots WHERE task = ?", (task.id,))}
            kept = [line for line in _read(path).splitlines() if not (_ballot(line) in ours or _is_torn(line))]
            votes = [_line(vote) for vote in select_votes(db, task=task.id)]
            write_atomic(path, b"".join(line + b"\n" for line in [*kept, *votes]))
        else:
            there = {_ballot(line) for line in tail.splitlines()}
            new = [vote for vote in select_votes(db, task=task.id, after=event) if vote.ballot not in there]
            if new:
                start = b"\n" if _lacks_end(path) else b""
                _append(path, start + b"".join(_line(vote) + b"\n" for vote in new))
        values = (last_event(db), path.stat().st_size if path.is_file() else 0, task.id)
        db.execute("UPDATE tasks SET mirrored_event = ?, mirrored_bytes = ? WHERE id = ?", values)
    return True


def _line(vote: Vote) -> bytes:
    """In the format of `source.votes`, whose places are those of the ballot's images."""
    utility = dict(zip(vote.slots, vote.verdict.utility, strict=True))
    values = [utility[slot] for slot in sorted(utility)]
    said: Mapping[str, Any] = {"utility": values}
    if len(values) == 2 and not vote.verdict.is_bad:
        said = {"winner": None if values[0] == values[1] else int(values[1] > values[0])}
    return to_json({"ballot": vote.ballot, "id": vote.place, **said, "rater": vote.rater}).encode()


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _tail(path: Path, size: int) -> bytes | None:
    """What was written after the first `size` bytes; None where the file is shorter."""
    if not path.is_file():
        return b"" if size == 0 else None
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) < size:
            return None
        file.seek(size)
        return file.read()


def _ballot(line: bytes) -> str | None:
    """The ballot that a line of ours is about."""
    if not line.startswith(OURS):
        return None
    try:
        return str(json.loads(line)["ballot"])
    except ValueError:
        return None


def _is_torn(line: bytes) -> bool:
    """Whether a line is one of ours that was cut off."""
    return line != b"" and OURS.startswith(line[: len(OURS)]) and _ballot(line) is None


def _lacks_end(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
