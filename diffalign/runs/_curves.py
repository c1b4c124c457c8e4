"""The curves of a run: `metrics.jsonl` read as it grows, and thinned so that a long run stays small in memory."""

from __future__ import annotations

import json
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.metrics import FILE_NAME

MAX_STRETCHES = 1000  # of a series; half as many stay when it would have more
SLICE = 8 << 20  # bytes read at a time, so that a page answers while a long file is being read
TAIL = 512  # bytes before the end of what was read, by which a rewritten file is told from one that grew


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a series: (step, value) of the lowest and the highest, in the order of their steps, and
    their mean."""

    points: tuple[tuple[int, float], ...]  # one or two
    step: float  # mean step
    mean: float
    count: int = 1

    def join(self, other: Stretch) -> Stretch:
        """Both as one; `other` comes after. The extremes are kept exactly."""
        points = [*self.points, *other.points]
        ends = {min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])}
        count = self.count + other.count
        step = (self.count * self.step + other.count * other.step) / count
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Stretch(tuple(sorted(ends)), step, mean, count)


@dataclass
class Series:
    """One metric over steps. Neighbours are joined pairwise whenever it grows beyond MAX_STRETCHES."""

    stretches: list[Stretch] = field(default_factory=list)

    def append(self, step: int, value: float) -> None:
        """A point after all others."""
        self.stretches.append(Stretch(((step, value),), step, value))
        if len(self.stretches) > MAX_STRETCHES:
            pairs = zip(self.stretches[:-1:2], self.stretches[1:-1:2], strict=True)  # the newest stays as it is
            self.stretches = [first.join(second) for first, second in pairs] + self.stretches[-1:]

    @property
    def points(self) -> tuple[list[int], list[float]]:
        """Steps and values: every point of a short series, the extremes of each stretch of a long one."""
        points = [point for stretch in self.stretches for point in stretch.points]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def last(self) -> float:
        return self.stretches[-1].points[-1][1]

    def smooth(self, share: float = 0.05) -> tuple[list[float], list[float]]:
        """Steps and exponential moving averages over about `share` of the run, without the usual bias at the start."""
        stretches = list(self.stretches)  # another thread may be reading on
        total = weight = 0.0
        window = max(1.0, share * sum(stretch.count for stretch in stretches))
        smooth = []
        for stretch in stretches:
            keep = (1 - 1 / window) ** stretch.count
            total, weight = keep * total + (1 - keep) * stretch.mean, keep * weight + (1 - keep)
            smooth.append(total / weight)
        return [stretch.step for stretch in stretches], smooth


class Curves:
    """What metrics.jsonl holds, by metric. `refresh` reads what was added since; several threads may call it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.series: dict[str, Series] = {}
        self.alarms: list[int] = []  # steps at which the over-optimisation alarm rang
        self.step = -1  # the last one logged
        self.num_bad = 0  # lines that are no rows
        self.version = 0  # counts changes
        self.unread = 0  # bytes
        self._offset = 0
        self._tail = b""  # the bytes before the offset
        self._inode = -1
        self._lock = threading.Lock()

    def refresh(self) -> bool:
        """Reads at most SLICE bytes on; whether anything changed. A file that was cut or replaced is read anew."""
        with self._lock:
            try:
                file = open(self.path, "rb")
            except OSError:
                found = bool(self.series)
                self._forget()
                return found
            with file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset or not self._continues(file):
                    self._forget()
                    self._inode = facts.st_ino
                file.seek(self._offset)
                data = file.read(SLICE)
            end = data.rfind(b"\n") + 1  # a half-written last line is for the next time
            if not end and len(data) == SLICE:
                end = SLICE  # no line of ours is that long: skip it
            for line in data[:end].splitlines():
                self._row(line)
            self._offset += end
            self._tail = (self._tail + data[:end])[-TAIL:]
            self.unread = max(0, facts.st_size - self._offset)
            self.version += bool(end)
            return bool(end)

    def _continues(self, file: Any) -> bool:
        """Whether what was read last is still there: a resumed run cuts its file and writes other bytes."""
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _forget(self) -> None:
        self.series, self.alarms, self.step, self.num_bad = {}, [], -1, 0
        self._offset, self._tail, self._inode, self.unread = 0, b"", -1, 0
        self.version += 1

    def _row(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            self.num_bad += bool(line.strip())
            return
        self.step = step
        if row.get("alarm"):
            self.alarms.append(step)
        for name, value in row.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if is_number and name not in ("step", "alarm"):
                self.series.setdefault(name, Series()).append(step, float(value))
