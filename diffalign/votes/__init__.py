"""Votes of people on pictures: who sees what next, what they said, and how they take it back.

    with VoteBook("votes.db") as book:
        [ballot] = book.draw(task.id, "ann")
        book.cast(ballot.id, {"overall": Verdict((0, 1))})     # the left one is better

A vote is on the disk when `cast` returns, and stays when the process is killed or the power fails. A ballot's id is
the proof that it was given out: casting it again, after an answer that was lost, changes nothing and gives the first
answer. An undo is an event, too; the ballot comes back under a new id, and both votes stay in the history.

Which ballot a rater gets: of the sets of slots (contestants, or pictures of one contestant) the one whose verdict is
expected to teach most (`_choice`), equals at random; of its places that this rater has not seen with these
slots the one with the fewest votes, then the least shown, then the first. The order of the pictures is random. Both
draws come from the ballot's recorded seed. Nobody gets the same pictures twice; pictures equal byte by byte are not
compared. A rater who asks again without having voted gets the same ballots again.

Thread-safe; several processes may share a file.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, islice
from math import comb
from pathlib import Path
from types import TracebackType

from diffalign._json import to_json
from diffalign.errors import UserError
from diffalign.votes import _draw as drawing
from diffalign.votes import _store as store
from diffalign.votes._types import (
    OVERALL,
    Ballot,
    Picture,
    Place,
    Progress,
    Receipt,
    Task,
    Verdict,
    Vote,
    check,
    clean_name,
    verdicts_of,
)

__all__ = [
    "OVERALL",
    "Ballot",
    "Picture",
    "Place",
    "Progress",
    "Receipt",
    "Task",
    "Verdict",
    "Vote",
    "VoteBook",
    "verdicts_of",
]

PLACES_AT_ONCE = 500  # of one transaction


class VoteBook:
    """The votes of one file, made where there is none.

    Raises:
        UserError: the file is another program's or damaged, or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._db, self._lock = store.open_writable(self.path), threading.RLock()

    def close(self) -> None:
        """Ends writing; what lies in the log beside the file moves into it."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> VoteBook:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, alone in the file: all of it is there afterwards, or nothing."""
        with self._lock, store.explained(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._lock, store.explained(self.path):
            return self._db.execute(sql, values).fetchall()

    # What is voted on

    def add_task(self, key: str, kind: str, title: str, folder: str = "", size: int = 2) -> Task:
        """The task of this key, made where there is none; an old one keeps what it is."""
        if size < 2:
            raise UserError(f"a ballot has at least 2 pictures (got size {size})")
        sql = "INSERT OR IGNORE INTO tasks(key, kind, title, folder, size) VALUES (?, ?, ?, ?, ?)"
        with self.writing() as db:
            db.execute(sql, (key, kind, title, folder, size))
        return next(task for task in self.tasks() if task.key == key)

    def tasks(self) -> list[Task]:
        """All tasks, oldest first."""
        return [Task(*row) for row in self._rows("SELECT id, key, kind, title, folder, size FROM tasks ORDER BY id")]

    def task(self, number: int) -> Task:
        """The task of this number.

        Raises:
            UserError: there is none.
        """
        found = self._rows("SELECT id, key, kind, title, folder, size FROM tasks WHERE id = ?", number)
        if not found:
            raise UserError(f"{self.path}: there is no task {number}")
        return Task(*found[0])

    def add_contestant(self, task: int, name: str, made: Mapping[str, object]) -> None:
        """How a contestant makes its pictures, for the record."""
        with self.writing() as db:
            db.execute("INSERT OR IGNORE INTO contestants VALUES (?, ?, ?)", (task, name, to_json(made)))

    def contestants(self, task: int) -> dict[str, dict]:
        """name -> how it makes its pictures."""
        rows = self._rows("SELECT name, made FROM contestants WHERE task = ? ORDER BY name", task)
        return {name: json.loads(made) for name, made in rows}

    def add_places(self, task: int, places: Iterable[Place]) -> None:
        """Places and pictures that the task does not have yet."""
        rest = iter(places)
        while some := list(islice(rest, PLACES_AT_ONCE)):
            with self.writing() as db:
                for place in some:
                    drawing.add_place(db, task, place.name, place.prompt, place.turn, place.pictures)

    def fresh(self, task: int) -> list[tuple[str, ...]]:
        """The slots of every place that nobody has seen yet."""
        rows = self._rows(
            """SELECT p.id, i.slot FROM places p JOIN items i ON i.place = p.id
            WHERE p.task = ? AND p.votes = 0 AND p.shown = 0 AND p.num > 1 ORDER BY p.id, i.slot""",
            task,
        )
        return [tuple(slot for _, slot in group) for _, group in groupby(rows, key=lambda row: row[0])]

    def num_places(self, task: int) -> int:
        """How many there are."""
        return int(self._rows("SELECT count(*) FROM places WHERE task = ?", task)[0][0])

    def duels(self, task: int) -> dict[tuple[str, str], tuple[float, int]]:
        """(first slot, second slot) -> (wins of the first with ties half, comparisons)."""
        rows = self._rows("SELECT first, second, wins, num FROM duels WHERE task = ?", task)
        return {(first, second): (wins, num) for first, second, wins, num in rows}

    # What a rater does

    def draw(self, task: int, rater: str, ahead: int = 1) -> list[Ballot]:
        """The rater's next ballots: those not voted on yet, filled up to `ahead`; fewer where there are no more.

        Raises:
            UserError: no such task, or no name.
        """
        told, name = self.task(task), clean_name(rater)
        with self.writing() as db:
            found = drawing.open_ballots(db, task, name)
            while len(found) < ahead:
                drawn = drawing.draw_one(db, task, told.folder, told.size, name)
                if drawn is None:
                    break
                found.append(drawn)
            return [self._ballot(db, ballot) for ballot in found]

    @staticmethod
    def _ballot(db: sqlite3.Connection, ballot: str) -> Ballot:
        sql = """SELECT b.task, b.rater, p.prompt, i.picture FROM ballots b JOIN places p ON p.id = b.place
          JOIN json_each(b.items) j JOIN items i ON i.id = j.value WHERE b.id = ? ORDER BY j.key"""
        rows = db.execute(sql, (ballot,)).fetchall()
        task, rater, prompt, _ = rows[0]
        return Ballot(ballot, task, rater, prompt, tuple(row[3] for row in rows))

    def picture(self, number: str) -> bytes:
        """An encoded picture that was shown.

        Raises:
            UserError: there is none of this id.
        """
        found = self._rows("SELECT data FROM pictures WHERE id = ?", number)
        if not found:
            raise UserError(f"{self.path}: there is no picture {number[:40]!r}")
        return bytes(found[0][0])

    def cast(self, ballot: str, verdicts: Mapping[str, Verdict]) -> Receipt:
        """Puts a vote on record, once: a ballot that was cast before gives what was said then.

        Args:
            verdicts: aspect -> verdict; `overall` is one of them.

        Raises:
            UserError: an unknown ballot, no overall verdict, or one that does not fit the pictures.
        """
        with self.writing() as db:
            task, place, items = self._known(db, ballot)
            said = self._said(db, task, ballot)
            if said is not None:
                return said
            check(verdicts, len(items))
            for aspect, verdict in verdicts.items():
                row = (ballot, aspect, json.dumps(verdict.ranks), int(verdict.is_bad))
                db.execute("INSERT INTO verdicts VALUES (?, ?, ?, ?)", row)
            db.execute("INSERT INTO events(ballot, what, at) VALUES (?, 'cast', ?)", (ballot, time.time()))
            db.execute("UPDATE ballots SET is_open = 0 WHERE id = ?", (ballot,))
            drawing.count(db, task, place, items, verdicts[OVERALL], 1)
            return Receipt(ballot, task, dict(verdicts), True, False)

    def undo(self, ballot: str) -> Ballot:
        """Takes a vote back; returns the ballot that replaces it, the same one however often this is called.

        Raises:
            UserError: an unknown ballot, or no vote on it.
        """
        with self.writing() as db:
            task, place, items = self._known(db, ballot)
            said = self._said(db, task, ballot)
            if said is None:
                raise UserError("there is no vote on this ballot to take back")
            if not said.is_undone:
                db.execute("INSERT INTO events(ballot, what, at) VALUES (?, 'undo', ?)", (ballot, time.time()))
                drawing.count(db, task, place, items, said.verdicts[OVERALL], -1)
                db.execute(
                    """INSERT INTO ballots(id, task, place, rater, slots, items, seed, drawn, replaces)
                    SELECT ?, task, place, rater, slots, items, seed, ?, id FROM ballots WHERE id = ?""",
                    (secrets.token_urlsafe(16), time.time(), ballot),
                )
            [(again,)] = db.execute("SELECT id FROM ballots WHERE replaces = ?", (ballot,)).fetchall()
            return self._ballot(db, again)

    def last_vote(self, task: int, rater: str) -> str | None:
        """The ballot of the rater's newest vote that counts: what an undo takes back."""
        sql = """SELECT e.ballot FROM ballots b JOIN events e ON e.ballot = b.id WHERE b.task = ? AND b.rater = ?
          GROUP BY e.ballot HAVING count(*) = 1 ORDER BY e.id DESC LIMIT 1"""
        found = self._rows(sql, task, clean_name(rater))
        return found[0][0] if found else None

    def progress(self, task: int, rater: str) -> Progress:
        """How far a rater is."""
        [(slots,)] = self._rows("SELECT count(*) FROM slots WHERE task = ?", task)
        size = min(self.task(task).size, max(2, slots))
        rows = self._rows("SELECT num, count(*), sum(votes) FROM places WHERE task = ? GROUP BY num", task)
        total = sum(count * comb(num, size) for num, count, _ in rows)
        sql = """SELECT count(*) FROM (SELECT 1 FROM ballots b JOIN events e ON e.ballot = b.id
          WHERE b.task = ? AND b.rater = ? GROUP BY e.ballot HAVING count(*) = 1)"""
        mine = self._rows(sql, task, clean_name(rater))[0][0]
        return Progress(int(mine), total, sum(votes for _, _, votes in rows))

    @staticmethod
    def _known(db: sqlite3.Connection, ballot: str) -> tuple[int, int, list[int]]:
        row = db.execute("SELECT task, place, items FROM ballots WHERE id = ?", (ballot,)).fetchone()
        if row is None:
            raise UserError("this ballot is not known here: load the page again")
        return row[0], row[1], json.loads(row[2])

    @staticmethod
    def _said(db: sqlite3.Connection, task: int, ballot: str) -> Receipt | None:
        rows = db.execute("SELECT aspect, ranks, is_bad FROM verdicts WHERE ballot = ?", (ballot,)).fetchall()
        if not rows:
            return None
        undone = db.execute("SELECT 1 FROM events WHERE ballot = ? AND what = 'undo'", (ballot,)).fetchone()
        verdicts = {aspect: Verdict(tuple(json.loads(ranks)), bool(bad)) for aspect, ranks, bad in rows}
        return Receipt(ballot, task, verdicts, False, undone is not None)

    # What was said

    def votes(
        self, *, aspect: str | None = OVERALL, task: int | None = None, rater: str | None = None, after: int = 0
    ) -> Iterator[Vote]:
        """The votes that count now, oldest first: one moment's state however long the reading takes."""
        with store.reading(self.path) as connection:
            yield from store.select_votes(connection, aspect=aspect, task=task, rater=rater, after=after)

    def last_event(self) -> int:
        """A number that grows with every vote and every undo."""
        with self._lock, store.explained(self.path):
            return store.last_event(self._db)
