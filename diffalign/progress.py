"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_S = 15.0


class Progress:
    """Counts `total` units of work on stderr; `start` of them were done before (a resumed run)."""

    def __init__(self, what: str, total: int, start: int = 0, unit: str = "it", quiet: bool = False) -> None:
        self.what, self.total, self.start, self.unit, self.quiet = what, total, start, unit, quiet
        self.done = start
        self.begun = self.last_line = time.monotonic()
        interactive = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total, initial=start, desc=what, unit=unit) if interactive else None

    def advance(self, num: int = 1, note: str = "") -> None:
        """`num` more units are done; `note` is shown beside the count."""
        self.done += num
        if self.bar is not None:
            self.bar.update(num)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
        elif not self.quiet and (time.monotonic() - self.last_line > LINE_EVERY_S or self.done >= self.total):
            self.last_line = time.monotonic()
            print(self._line(note), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line on stderr that does not tear the bar; said even where progress is not shown."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self, note: str) -> str:
        seconds = time.monotonic() - self.begun
        rate = (self.done - self.start) / max(seconds, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        text = f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {left:.0f} s left"
        return f"{text}, {note}" if note else text

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
