"""A place to vote: folders of pictures, queues that runs wait for, and contestants that paint while people vote."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffalign.recipes.painter._plan import plan
from diffalign.recipes.voting import _folders as folders
from diffalign.recipes.voting._live import Live, live_task
from diffalign.recipes.voting._mirror import mirror
from diffalign.sources._votes import TALLY
from diffalign.types import UserError
from diffalign.votes import OVERALL, Ballot, Progress, Receipt, Task, VoteBook, verdicts_of

AHEAD = 2  # ballots of a rater that are drawn before they are seen
MAX_LIVE = 2  # tasks painted at the same time


@dataclass(frozen=True)
class Turn:
    """What a rater gets now.

    state: vote; wait, while pictures are painted; done, where the rater has seen all; counted, where the run has
        taken the votes of a queue and goes on.
    """

    state: Literal["vote", "wait", "done", "counted"]
    ballot: Ballot | None
    progress: Progress
    problem: str | None = None  # why no more pictures come


class Voting:
    """The votes of one file, and what is voted on.

    Args:
        path: the file of votes; see `VoteBook`.
        aspects: that a vote may judge beside the overall one.

    Raises:
        UserError: the file is another program's or damaged, or cannot be written.
    """

    def __init__(self, path: str | Path, aspects: Sequence[str] = ()) -> None:
        self.book, self.aspects = VoteBook(path), tuple(aspects)
        self._lives: dict[int, Live] = {}
        self._stamps: dict[tuple[Path, int], tuple[tuple[int, int], Task]] = {}
        self._lock = threading.Lock()
        for task in self.book.tasks():
            if task.kind == folders.QUEUE:
                mirror(self.book, task)  # what a crash left out

    def close(self) -> None:
        """Ends painting and writing."""
        for live in self._lives.values():
            live.stop()
        self.book.close()

    @staticmethod
    def found(roots: Sequence[Path]) -> list[Path]:
        """Folders below `roots` that can be voted on, the newest first."""
        return folders.find(roots)

    def open_folder(self, folder: Path, title: str, size: int = 2) -> Task:
        """The task of a folder with pictures, or with a queue; all that is in it now.

        Raises:
            UserError: nothing to vote on there, or a broken line.
        """
        kind = folders.kind_of(folder)
        status = (folder / (folders.BALLOT if kind == folders.QUEUE else folders.MANIFEST)).stat()
        key, stamp = (folder.resolve(), size), (status.st_mtime_ns, status.st_size)
        with self._lock:
            known = self._stamps.get(key)
            if known is None or known[0] != stamp or not known[1].key.startswith(folders.key_of(folder)):
                known = stamp, folders.open_folder(self.book, folder, title, size)
                self._stamps[key] = known
        return known[1]

    def open_live(self, studio: Any, contestants: Sequence[str], prompts: Sequence[str], size: int = 2) -> Task:
        """The task of contestants that paint while people vote; painting begins.

        Args:
            studio: knows contestants by name, and paints; see `diffalign.recipes.painter._studio.Studio`.
            prompts: texts, or sets of them.

        Raises:
            UserError: fewer than two contestants, an unknown one, no prompt, or too many tasks that paint.
        """
        view = replace(studio.first_view(), contestants=tuple(contestants), prompts=tuple(prompts), seeds="0")
        limit = studio.config.app.max_pictures
        made = plan(
            view, studio.config, studio.found, exports=studio.folder / "exports", below=studio.below, limit=limit
        )
        task = live_task(self.book, [column.variant for column in made.columns], made.prompts, size)
        with self._lock:
            running = [live for live in self._lives.values() if live.is_running]
            if not any(live.task == task for live in running):
                if len(running) >= MAX_LIVE:
                    raise UserError(f"{len(running)} others paint already: stop one first")
                parts = [column.variant for column in made.columns]
                self._lives[task.id] = Live(self.book, task, studio.painter, parts, made.prompts)
        return task

    def stop_live(self, task: int) -> None:
        """No more pictures for this task; those that are there can be voted on."""
        live = self._lives.get(task)
        if live is not None:
            live.stop(timeout=0)

    def turn(self, task: int, rater: str) -> Turn:
        """What the rater votes on now: the same until it is voted on.

        Raises:
            UserError: no such task, or no name.
        """
        told, live = self.book.task(task), self._lives.get(task)
        if told.kind == folders.QUEUE and (Path(told.folder) / TALLY).is_file():
            return Turn("counted", None, self.book.progress(task, rater))
        ballots = self.book.draw(task, rater, AHEAD)
        if live is not None:
            live.wake()
        progress, problem = self.book.progress(task, rater), live.problem if live else None
        if ballots:
            return Turn("vote", ballots[0], progress, problem)
        return Turn("wait" if live is not None and live.is_running else "done", None, progress, problem)

    def cast(self, ballot: str, said: object) -> Receipt:
        """Puts a vote on record, once, and where a run waits for it into its votes.jsonl.

        Args:
            said: plain JSON, see `diffalign.votes.verdicts_of`.

        Raises:
            UserError: an unknown ballot or aspect, or a verdict that does not fit.
        """
        verdicts = verdicts_of(said)
        for unknown in set(verdicts) - {OVERALL, *self.aspects}:
            raise UserError(f"there is no aspect {unknown[:80]!r} here: see app.aspects")
        receipt = self.book.cast(ballot, verdicts)
        self._mirror(receipt.task)
        return receipt

    def undo(self, ballot: str) -> Ballot:
        """Takes a vote back; the ballot comes again, the same one however often this is called.

        Raises:
            UserError: an unknown ballot, or one without a vote.
        """
        again = self.book.undo(ballot)
        self._mirror(again.task)
        return again

    def _mirror(self, number: int) -> None:
        task = self.book.task(number)
        if task.kind == folders.QUEUE:
            mirror(self.book, task)
