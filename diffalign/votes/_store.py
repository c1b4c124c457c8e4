"""The file of votes: its tables, how it is opened, and what is read from it.

One SQLite file holds all that a vote needs to be a record: the pictures that were shown (their bytes, so that the file
moves alone and a deleted folder loses no vote), in which order, to whom, what they said, when. Rows of `ballots`,
`verdicts` and `events` are added and never changed, apart from a ballot's `is_open`; an undo is an event of its own.

    tasks      what is voted on: the pictures of a folder, a queue for people, contestants who draw while people vote
    places     a prompt (and seed) of a task; `items` are its pictures, of which those that were drawn are in `pictures`
    ballots    pictures of a place in the order in which one rater sees them
    events     cast and undo, numbered in the order in which they happened
    verdicts   per ballot and aspect a rank for each picture
    duels      wins per pair of slots: the sums from which the next ballot is chosen
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from diffalign.errors import UserError
from diffalign.votes._types import OVERALL, Verdict, Vote

APPLICATION, VERSION = 0x64615674, 1  # "daVt" in the file's header: whose it is, and of which layout
SCHEMA = """
CREATE TABLE tasks(
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, title TEXT NOT NULL, folder TEXT NOT NULL,
  size INTEGER NOT NULL, mirrored_event INTEGER NOT NULL DEFAULT 0, mirrored_bytes INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE contestants(
  task INTEGER NOT NULL REFERENCES tasks, name TEXT NOT NULL, made TEXT NOT NULL,
  PRIMARY KEY(task, name)) STRICT, WITHOUT ROWID;
CREATE TABLE slots(
  task INTEGER NOT NULL REFERENCES tasks, slot TEXT NOT NULL, PRIMARY KEY(task, slot)) STRICT, WITHOUT ROWID;
CREATE TABLE places(
  id INTEGER PRIMARY KEY, task INTEGER NOT NULL REFERENCES tasks, name TEXT NOT NULL, prompt TEXT NOT NULL,
  turn INTEGER NOT NULL, num INTEGER NOT NULL DEFAULT 0, shown INTEGER NOT NULL DEFAULT 0,
  votes INTEGER NOT NULL DEFAULT 0, UNIQUE(task, name)) STRICT;
CREATE INDEX by_turn ON places(task, votes, shown, turn, num);
CREATE TABLE pictures(id TEXT NOT NULL PRIMARY KEY, data BLOB NOT NULL) STRICT;
CREATE TABLE items(
  id INTEGER PRIMARY KEY, place INTEGER NOT NULL REFERENCES places, slot TEXT NOT NULL, contestant TEXT NOT NULL,
  number INTEGER, seed INTEGER, file TEXT, picture TEXT REFERENCES pictures, problem TEXT,
  UNIQUE(place, slot)) STRICT;
CREATE TABLE ballots(
  id TEXT NOT NULL PRIMARY KEY, task INTEGER NOT NULL REFERENCES tasks, place INTEGER NOT NULL REFERENCES places,
  rater TEXT NOT NULL, slots TEXT NOT NULL, items TEXT NOT NULL, seed INTEGER NOT NULL, drawn REAL NOT NULL,
  replaces TEXT UNIQUE REFERENCES ballots, is_open INTEGER NOT NULL DEFAULT 1) STRICT;
CREATE UNIQUE INDEX once ON ballots(place, rater, slots) WHERE replaces IS NULL;
CREATE INDEX still_open ON ballots(task, rater) WHERE is_open;
CREATE INDEX of_rater ON ballots(task, rater);
CREATE TABLE events(
  id INTEGER PRIMARY KEY AUTOINCREMENT, ballot TEXT NOT NULL REFERENCES ballots,
  what TEXT NOT NULL CHECK(what IN ('cast', 'undo')), at REAL NOT NULL, UNIQUE(ballot, what)) STRICT;
CREATE TABLE verdicts(
  ballot TEXT NOT NULL REFERENCES ballots, aspect TEXT NOT NULL, ranks TEXT NOT NULL, is_bad INTEGER NOT NULL,
  PRIMARY KEY(ballot, aspect)) STRICT, WITHOUT ROWID;
CREATE TABLE duels(
  task INTEGER NOT NULL REFERENCES tasks, first TEXT NOT NULL, second TEXT NOT NULL, wins REAL NOT NULL,
  num INTEGER NOT NULL, PRIMARY KEY(task, first, second)) STRICT, WITHOUT ROWID;
"""
VOTES = """
SELECT e.id, e.at, b.id, p.task, p.name, p.prompt, b.rater, v.aspect, v.ranks, v.is_bad,
  i.slot, i.contestant, i.picture
FROM events e JOIN ballots b ON b.id = e.ballot JOIN verdicts v ON v.ballot = b.id JOIN places p ON p.id = b.place
  JOIN json_each(b.items) j JOIN items i ON i.id = j.value
WHERE e.what = 'cast' AND e.id > :after AND e.id <= :last AND e.id <= :until AND (:aspect IS NULL OR v.aspect = :aspect)
  AND (:task IS NULL OR b.task = :task) AND (:rater IS NULL OR b.rater = :rater)
  AND NOT EXISTS (SELECT 1 FROM events u WHERE u.ballot = b.id AND u.what = 'undo' AND u.id <= :until)
ORDER BY e.id, v.aspect, j.key
"""
NEWEST = 2**63 - 1


def check_header(path: Path) -> None:
    """Refuses a file that is not a file of votes, without opening it as a database.

    Raises:
        UserError: what it is instead.
    """
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise UserError(f"{path}: not a file of votes: it is no SQLite database; nothing was changed, name another")
    version, application = struct.unpack(">I", header[60:64])[0], struct.unpack(">I", header[68:72])[0]
    if application != APPLICATION:
        raise UserError(f"{path}: a database of another program, not a file of votes; nothing was changed")
    if version != VERSION:
        raise UserError(f"{path}: votes of layout {version}, and this is {VERSION}: use the diffalign that wrote it")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as the user's.

    Raises:
        UserError: a damaged file, a full disk, a missing right.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UserError(f"{path}: cannot be used now ({error}); see that the disk has room and is writable") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path}: the file of votes is damaged ({error}); put a copy in its place") from error


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit mode that waits half a minute for another writer. `mode`: ro or rw."""
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def create(path: Path) -> None:
    """An empty file of votes where there is none; whole or not at all, and never over another's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with closing(sqlite3.connect(temporary)) as connection:
            connection.executescript(
                f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION}; {SCHEMA}"
            )
        try:
            os.link(temporary, path)
        except FileExistsError:  # another process was faster
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, outlives a power cut
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def open_writable(path: Path) -> sqlite3.Connection:
    """The votes, made where there are none. A commit is on the disk when it returns: `synchronous=FULL`.

    Raises:
        UserError: another program's file, a damaged one, or one that cannot be written.
    """
    try:
        if not path.exists():
            create(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from error
    check_header(path)
    with explained(path):
        connection = connect(path, "rw")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        return connection


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """The votes, to be read while others may write.

    Raises:
        UserError: no such file, another program's, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of votes")
    check_header(path)
    with explained(path):
        try:
            connection = connect(path, "ro")
            connection.execute("SELECT 1 FROM events LIMIT 1")
        except sqlite3.OperationalError:  # on a disk that is read-only; without a log beside it nobody writes
            if path.with_name(path.name + "-wal").exists():
                raise
            connection = connect(path, "ro&immutable=1")
        with closing(connection):
            yield connection


def select_votes(
    connection: sqlite3.Connection,
    *,
    aspect: str | None = OVERALL,
    task: int | None = None,
    rater: str | None = None,
    after: int = 0,
    last: int = NEWEST,
    until: int = NEWEST,
) -> Iterator[Vote]:
    """The votes that count, oldest first: neither undone nor replaced; one statement, so one moment's state.

    Args:
        aspect: None for all.
        after: only votes of higher numbers.
        last: only votes of lower numbers, and this one.
        until: the state after the event of this number.
    """
    values = {"aspect": aspect, "task": task, "rater": rater, "after": after, "last": last, "until": until}
    rows = connection.execute(VOTES, values)
    for key, group in groupby(rows, key=lambda row: row[:10]):
        event, at, ballot, number, place, prompt, who, what, ranks, is_bad = key
        slots, contestants, pictures = zip(*(row[10:] for row in group), strict=True)
        verdict = Verdict(tuple(json.loads(ranks)), bool(is_bad))
        yield Vote(event, at, ballot, number, place, prompt, who, what, verdict, slots, contestants, pictures)


def last_event(connection: sqlite3.Connection) -> int:
    """The number of the newest event, 0 where there is none."""
    return int(connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0])
