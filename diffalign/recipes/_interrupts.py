"""Ending a run between two of its steps when it is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """SIGINT and SIGTERM become a KeyboardInterrupt that never comes inside a `step`, so that the weights are always
    those after a whole number of steps. A second signal ends the process at once, as the system does.

    Args:
        is_alone: of several processes, which would have to agree on the step, each is interrupted where it is.
        save: what is done at an interrupt of a process that is alone.
    """

    def __init__(self, is_alone: bool, save: Callable[[], None]) -> None:
        self.is_alone, self._save = is_alone, save
        self._old: dict[int, Any] = {}
        self._in_step = self._is_asked = False

    def __enter__(self) -> Interrupts:
        if self.is_alone and threading.current_thread() is threading.main_thread():  # Python's rule for handlers
            self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.is_alone:
            self._save()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        for each in self._old:
            signal.signal(each, signal.SIG_DFL)
        self._is_asked = True
        if not self._in_step:
            raise KeyboardInterrupt

    @contextmanager
    def step(self) -> Iterator[None]:
        """What is finished before the interrupt comes."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
        if self._is_asked:
            raise KeyboardInterrupt
