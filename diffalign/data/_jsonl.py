"""Random access to the lines of JSONL files through an index of byte offsets (16 bytes per row in memory)."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffalign.data._files import open_binary, split_of_name, stamp
from diffalign.data._report import BadRow
from diffalign.types import UserError


def _parse(line: bytes, file: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadRow("bad JSON", str(error)[:120]) from error
    if not isinstance(row, dict):
        raise BadRow("bad JSON", "a line must be an object {...}")
    if row.get("split") is None:
        row["split"] = split_of_name(file)
    return row


class JsonlRows:
    """The lines of several JSONL files, one after the other; blank lines are passed over.

    Raises:
        UserError: no line in any of the files.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        offsets, lines, firsts = array("q"), array("q"), [0]
        for file in self.files:
            with open_binary(file) as handle:
                position = 0
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        offsets.append(position)
                        lines.append(number)
                    position += len(line)
            firsts.append(len(offsets))
        if not offsets:
            raise UserError(f"{self.files[0]}: the file is empty")
        self._offsets, self._lines = np.frombuffer(offsets, np.int64), np.frombuffer(lines, np.int64)
        self._firsts = np.array(firsts)

    def __len__(self) -> int:
        return len(self._offsets)

    def where(self, index: int) -> tuple[str, int]:
        """The file of row `index` and its line, from 1 as editors count."""
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        return self.files[number], int(self._lines[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises BadRow where the line is no JSON object."""
        file, _ = self.where(index)
        with open_binary(file) as handle:
            handle.seek(int(self._offsets[index]))
            return _parse(handle.readline(), file)

    def light(self) -> Iterator[dict[str, Any] | BadRow]:
        """All rows in order; a BadRow in place of a line that is no JSON object."""
        for file in self.files:
            with open_binary(file) as handle:
                for line in handle:
                    if line.strip():
                        try:
                            yield _parse(line, file)
                        except BadRow as error:
                            yield error

    def stamps(self) -> Iterator[str]:
        """What the files are recognised by."""
        return (stamp(file) for file in self.files)
