"""One editor's changes to a data set: an append-only log whose last entries can be taken back and done again."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign._json import to_json
from diffalign.errors import UserError

LONGEST_CAPTION = 10_000  # characters
KINDS = ("flip", "drop", "caption", "undo", "redo")


@dataclass(frozen=True)
class Edit:
    """What became of a record: `captions` has new texts, by image; the key None is the prompt."""

    is_flipped: bool = False
    is_dropped: bool = False
    captions: tuple[tuple[int | None, str], ...] = ()


class EditLog:
    """Lines of JSON in a file; nothing that is written is ever changed. Thread-safe; follows other writers of the file.

    An entry {"do": "flip" | "drop", "row"} is its own opposite; {"do": "caption", "row", "image", "text"} sets a text;
    {"do": "undo"} and {"do": "redo"} move between the entries that count and those that were taken back, which a
    new edit forgets.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._read = 0  # bytes
        self._done: list[dict[str, Any]] = []
        self._undone: list[dict[str, Any]] = []
        self._of: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self._follow()

    def flip(self, row: int) -> None:
        """The best image becomes the worst and the reverse."""
        self._append({"do": "flip", "row": row})

    def drop(self, row: int) -> None:
        """Leaves the record out, or brings it back."""
        self._append({"do": "drop", "row": row})

    def caption(self, row: int, text: str, image: int | None = None) -> None:
        """Another prompt, or another caption of one image.

        Raises:
            UserError: no text, or too long a one.
        """
        text = text.strip()
        if not 0 < len(text) <= LONGEST_CAPTION:
            raise UserError(f"a caption has 1 to {LONGEST_CAPTION} characters (got {len(text)})")
        self._append({"do": "caption", "row": row, "image": image, "text": text})

    def undo(self) -> int | None:
        """Takes the last edit back; its row, None where there is none."""
        with self._lock:
            self._follow()
            row = int(self._done[-1]["row"]) if self._done else None
            if row is not None:
                self._append({"do": "undo"})
            return row

    def redo(self) -> int | None:
        """Does again what was taken back last; its row, None where there is nothing."""
        with self._lock:
            self._follow()
            row = int(self._undone[-1]["row"]) if self._undone else None
            if row is not None:
                self._append({"do": "redo"})
            return row

    def of(self, row: int) -> Edit:
        """What became of a record."""
        with self._lock:
            self._follow()
            edit, texts = Edit(), {}
            for entry in self._of.get(row, ()):
                if entry["do"] == "flip":
                    edit = replace(edit, is_flipped=not edit.is_flipped)
                elif entry["do"] == "drop":
                    edit = replace(edit, is_dropped=not edit.is_dropped)
                else:
                    texts[entry["image"]] = entry["text"]
            return replace(edit, captions=tuple(texts.items()))

    def rows(self) -> list[int]:
        """The records that are not as they were, in order."""
        with self._lock:
            self._follow()
            return sorted(row for row in self._of if self.of(row) != Edit())

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The edits that count, in order."""
        with self._lock:
            self._follow()
            return list(self._done)

    @property
    def num_undone(self) -> int:
        """Edits that can be done again."""
        with self._lock:
            self._follow()
            return len(self._undone)

    def _append(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = to_json(entry | {"time": round(time.time(), 3)}) + "\n"
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # half a line of a process that was killed: it was never acknowledged
                        line = "\n" + line
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self._follow()

    def _follow(self) -> None:
        """Takes in the whole lines that were added to the file."""
        if not self.path.is_file() or self.path.stat().st_size == self._read:
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, IndexError):
                    continue  # half a line: see _append

    def _take(self, entry: dict[str, Any]) -> None:
        kind = entry["do"]
        if kind not in KINDS:
            raise ValueError(kind)
        if kind == "undo":
            self._undone.append(self._done.pop())
            self._of[int(self._undone[-1]["row"])].pop()
        else:
            if kind == "redo":
                entry = self._undone.pop()
            else:
                self._undone.clear()
            self._done.append(entry)
            self._of[int(entry["row"])].append(entry)
