"""Inside one transaction of the file of votes: new places, the next ballot, and the sums that it is chosen by."""

from __future__ import annotations

import hashlib
import io
import json
import random
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from diffalign.votes._choice import choices, with_ties
from diffalign.votes._types import Verdict

FORMATS = ("PNG", "JPEG", "WEBP")
RECENT = 600  # seconds for which a ballot that is out counts as a tie, so that raters at one time get different pairs
MAX_BYTES, MAX_SIDE = 64 * 2**20, 8192  # of a picture

# A place where these slots have pictures that can be shown and differ, and that the rater has not seen with them.
FREE = """
SELECT p.id FROM places p WHERE p.task = :task AND p.num >= :size AND :size = (
    SELECT count(DISTINCT coalesce(i.picture, i.id)) FROM items i
    WHERE i.place = p.id AND i.problem IS NULL AND i.slot IN (SELECT value FROM json_each(:slots)))
  AND NOT EXISTS (SELECT 1 FROM ballots b WHERE b.place = p.id AND b.rater = :rater AND b.slots = :slots)
ORDER BY p.votes, p.shown, p.turn LIMIT 1
"""
# Different pictures that can be shown: what a place's ballots are counted by.
NUM = """
UPDATE places SET num = (SELECT count(DISTINCT coalesce(i.picture, i.id)) FROM items i
  WHERE i.place = places.id AND i.problem IS NULL) WHERE id = ?
"""


def add_place(db: sqlite3.Connection, task: int, name: str, prompt: str, turn: int, pictures: Iterable[Any]) -> None:
    """A place with its pictures, as far as they are not there yet."""
    values = (task, name, prompt, turn)
    db.execute("INSERT OR IGNORE INTO places(task, name, prompt, turn) VALUES (?, ?, ?, ?)", values)
    [place] = db.execute("SELECT id FROM places WHERE task = ? AND name = ?", (task, name)).fetchone()
    for picture in pictures:
        db.execute("INSERT OR IGNORE INTO slots VALUES (?, ?)", (task, picture.slot))
        stored = None if picture.data is None else _store(db, picture.data)
        db.execute(
            """INSERT OR IGNORE INTO items(place, slot, contestant, number, seed, file, picture)
            VALUES (?, ?, ?, ?, ?, ?, ?)""",
            (place, picture.slot, picture.contestant, picture.number, picture.seed, picture.file, stored),
        )
    db.execute(NUM, (place,))


def open_ballots(db: sqlite3.Connection, task: int, rater: str) -> list[str]:
    """The rater's ballots without a vote: those taken back first, then in the order drawn."""
    sql = """SELECT id FROM ballots WHERE task = ? AND rater = ? AND is_open
      ORDER BY replaces IS NULL, CASE WHEN replaces IS NULL THEN rowid ELSE -rowid END"""
    return [row[0] for row in db.execute(sql, (task, rater))]


def draw_one(db: sqlite3.Connection, task: int, folder: str, size: int, rater: str) -> str | None:
    """A new ballot's id; None where the rater has seen all there is.

    Files are read here, when a picture is first drawn: one that cannot be read is left out from then on, and one that
    equals its rival is not compared with it; each such find is kept, so that the search ends.
    """
    seed = secrets.randbits(62)
    rng = random.Random(seed)
    slots = [row[0] for row in db.execute("SELECT slot FROM slots WHERE task = ? ORDER BY slot", (task,))]
    rows = db.execute("SELECT first, second, wins, num FROM duels WHERE task = ?", (task,))
    duels = {(first, second): (wins, num) for first, second, wins, num in rows}
    recent = (task, time.time() - RECENT)
    out = db.execute("SELECT slots FROM ballots WHERE task = ? AND is_open AND drawn > ?", recent)
    duels = with_ties(duels, (json.loads(row[0]) for row in out))
    for chosen in choices(slots, duels, min(size, max(2, len(slots))), rng):
        names = json.dumps(chosen)
        values = {"task": task, "size": len(chosen), "slots": names, "rater": rater}
        while (row := db.execute(FREE, values).fetchone()) is not None:
            sql = """SELECT id, file, picture FROM items WHERE place = ? AND slot IN (SELECT value FROM json_each(?))
              ORDER BY id"""
            items = db.execute(sql, (row[0], names)).fetchall()
            if _take_in(db, row[0], items, folder):
                shown = [item[0] for item in items]
                rng.shuffle(shown)
                ballot = secrets.token_urlsafe(16)
                db.execute(
                    """INSERT INTO ballots(id, task, place, rater, slots, items, seed, drawn)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                    (ballot, task, row[0], rater, names, json.dumps(shown), seed, time.time()),
                )
                db.execute("UPDATE places SET shown = shown + 1 WHERE id = ?", (row[0],))
                return ballot
    return None


def _take_in(db: sqlite3.Connection, place: int, items: Sequence[tuple], folder: str) -> bool:
    """Whether all pictures are in the database now, and differ."""
    found = set()
    for number, file, picture in items:
        if picture is None:
            data, problem = _read(folder, file)
            picture = None if data is None else _store(db, data)
            db.execute("UPDATE items SET picture = ?, problem = ? WHERE id = ?", (picture, problem, number))
        found.add(picture)
    is_good = None not in found and len(found) == len(items)
    if not is_good:
        db.execute(NUM, (place,))
    return is_good


def _store(db: sqlite3.Connection, data: bytes) -> str:
    number = hashlib.blake2b(data, digest_size=16).hexdigest()
    db.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?)", (number, data))
    return number


def _read(folder: str, file: str | None) -> tuple[bytes | None, str | None]:
    """A picture's bytes, or why it is left out. Nothing outside the folder is read, whatever the list of it says."""
    from PIL import Image

    root = Path(folder).resolve()
    try:
        path = (root / str(file)).resolve()
        if not folder or not path.is_relative_to(root):
            return None, "outside its folder"
        if path.stat().st_size > MAX_BYTES:
            return None, f"larger than {MAX_BYTES // 2**20} MB"
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE:
                return None, f"wider or higher than {MAX_SIDE} pixels"
            image.load()
    except Exception as error:  # hostile bytes make decoders raise anything
        return None, (f"{type(error).__name__}: {error}")[:200]
    return data, None


def count(db: sqlite3.Connection, task: int, place: int, items: Sequence[int], verdict: Verdict, by: int) -> None:
    """Adds a vote to the sums, or takes it away (`by` -1)."""
    db.execute("UPDATE places SET votes = votes + ? WHERE id = ?", (by, place))
    marks = dict(db.execute(f"SELECT id, slot FROM items WHERE id IN ({','.join('?' * len(items))})", items))
    ranked = sorted(zip((marks[item] for item in items), verdict.ranks, strict=True))
    for (first, rank), (second, other) in combinations(ranked, 2):
        wins = by * ((rank < other) + 0.5 * (rank == other))
        db.execute(
            """INSERT INTO duels VALUES (?, ?, ?, ?, ?) ON CONFLICT(task, first, second)
            DO UPDATE SET wins = wins + excluded.wins, num = num + excluded.num""",
            (task, first, second, wins, by),
        )
