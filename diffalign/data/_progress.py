"""Progress of work that turns out long; what is done within seconds stays silent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from diffalign.progress import Progress

T = TypeVar("T")

SILENT = 2.0  # seconds


def track(items: Iterable[T], total: int, what: str, is_shown: bool = True) -> Iterator[T]:
    """The same items, with rate and remaining time shown once their consumption has taken a while."""
    if not is_shown:
        yield from items
        return
    begun, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - begun > SILENT:
                bar = Progress(what, total, start=done)
            if bar is not None:
                bar.advance()
            yield item
    finally:
        if bar is not None:
            bar.__exit__(None, None, None)
