"""Bad rows and the report of them: counted by reason, listed by file and row, never lost and never a crash."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign._atomic import write_atomic
from diffalign.types import UserError

MAX_LISTED = 1000  # rows named one by one; the counts cover all


class BadRow(UserError):
    """One row cannot be used: `reason` is its class for the counts, `detail` what exactly was found.

    `file` and `row` (0-based row of a Parquet file, 1-based line of a JSONL file) are filled in by the reader.
    """

    def __init__(self, reason: str, detail: str = "", file: str = "", row: int | str = "") -> None:
        self.reason, self.detail, self.file, self.row = reason, detail, file, row
        where = f"{file} row {row}: " if file else ""
        super().__init__(f"{where}{reason}{f': {detail}' if detail else ''}")

    def at(self, file: str, row: int | str) -> BadRow:
        """The same with its place."""
        return BadRow(self.reason, self.detail, file, row)

    def entry(self) -> dict[str, Any]:
        """What the report lists."""
        return {"file": self.file, "row": self.row, "reason": self.reason, "detail": self.detail}


@dataclass
class Report:
    """What became of the rows: `bad` (broken data) and `dropped` (good data the settings leave out) by reason."""

    num_rows: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add_bad(self, error: BadRow) -> None:
        """Counts a bad row, and lists it while the list is short."""
        self.bad[error.reason] += 1
        if len(self.rows) < MAX_LISTED:
            self.rows.append(error.entry())

    @property
    def num_bad(self) -> int:
        """Rows that are broken."""
        return sum(self.bad.values())

    def merged(self, bad: list[dict[str, Any]]) -> Report:
        """A copy with bad rows (as `BadRow.entry` gives them) added."""
        report = Report(self.num_rows, Counter(self.bad), Counter(self.dropped), list(self.rows))
        for entry in bad:
            report.add_bad(BadRow(entry["reason"], entry["detail"], entry["file"], entry["row"]))
        return report

    def summary(self) -> str:
        """One line: '3 of 100 rows bad (broken image 2, missing caption 1); left out: tie 12'."""
        bad = ", ".join(f"{reason} {count}" for reason, count in sorted(self.bad.items()))
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(self.dropped.items()))
        line = f"{self.num_bad} of {self.num_rows} rows bad" + (f" ({bad})" if bad else "")
        return line + (f"; left out: {dropped}" if dropped else "")

    def as_dict(self) -> dict[str, Any]:
        """The content of `report.json`."""
        return {
            "num_rows": self.num_rows,
            "num_kept": self.num_rows - self.num_bad - sum(self.dropped.values()),
            "bad": dict(sorted(self.bad.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "rows": self.rows,
            "is_list_complete": self.num_bad <= MAX_LISTED,
        }

    def save(self, path: Path) -> None:
        """Writes `report.json`, atomically."""
        write_atomic(path, (json.dumps(self.as_dict(), indent=1, sort_keys=True) + "\n").encode())
