"""Pictures painted while people vote: the next pair is made while the current one is judged, a few ahead."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Sequence
from typing import Any

from diffalign._json import to_json
from diffalign.recipes.generate._variants import Variant
from diffalign.types import UserError
from diffalign.votes import Picture, Place, Task, VoteBook
from diffalign.votes._choice import choices, with_ties

AHEAD = 4  # places that nobody has seen yet, at most
LIVE = "live"


class _Stopped(Exception):
    """Somebody asked for it."""


class Live:
    """Paints places of a task in a thread of its own, until it is stopped.

    Place n shows prompt n mod P with picture number n div P, by those contestants whose comparison teaches most; those
    painted and not judged yet count as ties.
    """

    def __init__(
        self, book: VoteBook, task: Task, painter: Any, parts: Sequence[Variant], prompts: Sequence[str]
    ) -> None:
        self.book, self.task, self.painter, self.prompts = book, task, painter, list(prompts)
        self.parts = {part.name: part for part in parts}
        self.problem: str | None = None  # why it ended by itself
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"live-{task.id}", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether more pictures will come."""
        return self._thread.is_alive() and not self._stop.is_set()

    def wake(self) -> None:
        """A picture may have been taken: looks whether more are wanted."""
        self._wake.set()

    def stop(self, timeout: float | None = None) -> None:
        """Ends after the current step of the sampler."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._wake.clear()
                fresh = self.book.fresh(self.task.id)
                if len(fresh) >= AHEAD:
                    self._wake.wait()
                else:
                    self._paint(fresh)
        except _Stopped:
            pass
        except UserError as error:
            self.problem = str(error)
        except Exception as error:  # the voters are told; nobody waits for a thread's traceback
            self.problem = f"{type(error).__name__}: {error}"

    def _paint(self, fresh: Sequence[Sequence[str]]) -> None:
        duels = with_ties(self.book.duels(self.task.id), fresh)
        size = min(self.task.size, len(self.parts))
        names = next(choices(sorted(self.parts), duels, size, random.Random()))
        turn = self.book.num_places(self.task.id)
        number, prompt_id = divmod(turn, len(self.prompts))
        prompt, pictures = self.prompts[prompt_id], []
        for painted in self.painter.paint([self.parts[name] for name in names], [prompt], [number], self._check):
            made = dict(painted.made)
            seed = made.pop("seed", None)
            self.book.add_contestant(self.task.id, painted.variant, made)
            out = io.BytesIO()
            painted.image.save(out, "PNG")
            pictures.append(Picture(painted.variant, painted.variant, out.getvalue(), None, number, seed))
        self.book.add_places(self.task.id, [Place(f"{prompt_id}/{number}", prompt, tuple(pictures), turn)])

    def _check(self, share: float) -> None:
        """Between two steps of the sampler."""
        if self._stop.is_set():
            raise _Stopped


def live_task(book: VoteBook, parts: Sequence[Variant], prompts: Sequence[str], size: int) -> Task:
    """The task of these contestants and prompts: the same ones go on where they were."""
    if len({part.name for part in parts}) < 2:
        raise UserError("choose two or more models to vote between")
    if not prompts:
        raise UserError("write a prompt, or name a set of prompts")
    settings = [part.config.to_dict(("model", "sampling", "generate")) for part in parts]
    told = to_json([[part.name for part in parts], settings, list(prompts), size])
    mark = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
    title = f"painted live: {len(parts)} models, {len(prompts)} prompts ({mark[:4]})"
    return book.add_task(f"{LIVE}:{mark}", LIVE, title, "", size)
