"""Asks scorers for what the cache lacks: pictures decoded ahead in threads, full batches, every answer kept."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffalign.data import BadRow
from diffalign.distributed import World
from diffalign.progress import Progress
from diffalign.recipes._judging import answers, batched, read_picture
from diffalign.recipes.score._rows import Row
from diffalign.score_cache import FILE, ScoreCache, address, default_folder, image_id, versions
from diffalign.sections import Score
from diffalign.types import Scorer, UserError

HELD_PIXELS = 1 << 28  # decoded pictures wait in memory up to about this, 3 bytes a pixel, twice: read and unjudged

MISSING, UNREADABLE = "missing: no such file", "unreadable"


def open_cache(settings: Score, beside: Path) -> ScoreCache:
    """The cache of all runs; without it one `beside` the output, so that a killed run resumes.

    Raises:
        UserError: see `ScoreCache`.
    """
    if settings.cache:
        return ScoreCache(Path(settings.cache_dir or default_folder()) / FILE)
    return ScoreCache(beside.with_suffix(".partial.sqlite"))


def share(rows: Iterable[Row], num: int, size: int, world: World) -> tuple[Iterator[Row], int]:
    """This process's rows of `num`, in whole batches of `size`, and how many they are."""
    blocks = islice(batched(rows, size), world.rank, None, world.size)
    mine = sum(min(size, num - start) for start in range(world.rank * size, num, world.size * size))
    return (row for block in blocks for row in block), mine


class Waiting(NamedTuple):
    """A picture that a scorer is to be asked about."""

    image: Image.Image
    prompt: str
    file: str


class Asker:
    """One scorer, what it has answered, and what it is still to be asked.

    Args:
        name: what it is called in files.
        cache: where its answers are and go.
        settings: the section.

    Attributes:
        versions: of the libraries when its first score was asked for.
    """

    def __init__(self, name: str, scorer: Scorer, cache: ScoreCache, settings: Score) -> None:
        self.name, self.scorer, self.cache, self.settings = name, scorer, cache, settings
        self.reads_prompt = "prompt" in scorer.info.inputs
        self._number, self.versions = cache.scorer(scorer)
        self._waiting: dict[bytes, Waiting] = {}
        self._pixels = 0

    def answer(self, image: bytes, prompt: str) -> float | str | None:
        """The kept score of a picture, why there is none, or None: never asked."""
        if self.reads_prompt and (why := _no_prompt(prompt)):
            return why
        return self.cache.score(self._number, self._address(image, prompt))

    def lacks(self, image: bytes, prompt: str) -> bool:
        """Whether it is to be asked: it never was, or gave a reason that this run does not take."""
        answer = self.answer(image, prompt)
        return answer is None or (self.settings.retry and isinstance(answer, str) and answer != _no_prompt(prompt))

    def add(self, image: bytes, picture: Image.Image, prompt: str, file: str) -> None:
        """Queues a picture, and asks once the batch is full or holds many pixels.

        Raises:
            UserError, RuntimeError: see `flush`.
        """
        where = self._address(image, prompt)
        if where in self._waiting:
            return
        self._waiting[where] = Waiting(picture, prompt, file)
        self._pixels += picture.width * picture.height
        if len(self._waiting) >= self.settings.batch_size or self._pixels >= HELD_PIXELS:
            self.flush()

    def flush(self) -> None:
        """Asks about what waits, and keeps the answers.

        Raises:
            UserError: what the scorer needs is not there, or, in a strict run, a picture that it cannot judge.
            RuntimeError: another number of scores than pictures.
        """
        if not self._waiting:
            return
        rows = list(self._waiting.values())
        given = answers(self.name, self.scorer, [row.image for row in rows], [row.prompt for row in rows])
        self.cache.put(self._number, dict(zip(self._waiting, given, strict=True)))
        self._waiting, self._pixels = {}, 0
        for row, answer in zip(rows, given, strict=True):
            if isinstance(answer, str) and self.settings.strict:
                raise UserError(f"scorer {self.name}, {row.file}: {answer}")

    def drift(self) -> str:
        """That its scores in the cache came from other library versions, which is told; nothing is scored again."""
        now = versions()
        changed = [name for name, old in self.versions.items() if old != now.get(name)]
        if not changed:
            return ""
        then, here = (", ".join(f"{name} {of.get(name)}" for name in changed) for of in (self.versions, now))
        return f"scores of {self.name} in the cache were begun with {then}; here are {here}"

    def _address(self, image: bytes, prompt: str) -> bytes:
        return address(image, prompt if self.reads_prompt else "")


class _Pending(NamedTuple):
    row: Row
    status: os.stat_result
    picture: Future[tuple[Image.Image, bytes]]


class Filler:
    """Brings the cache up to rows, and says what it then holds of each.

    Args:
        root: of the rows' files.
        askers: the scorers.
        cache: theirs.
        settings: the section.
    """

    def __init__(self, root: Path, askers: Sequence[Asker], cache: ScoreCache, settings: Score) -> None:
        self.root, self.askers, self.cache, self.settings = root, askers, cache, settings

    def fill(self, rows: Iterable[Row], progress: Progress) -> None:
        """Asks for what is missing; rows are read one at a time.

        What is asked together depends only on the rows and on what the cache lacked. A run that was killed had kept
        whole batches, so it goes on in the same batches, and no score differs by a rounding.

        Raises:
            UserError, RuntimeError: see `Asker.flush`; in a strict run also what cannot be read.
        """
        waiting: deque[_Pending] = deque()
        largest = 1
        with ThreadPoolExecutor(self.settings.workers, "decode") as threads:
            for row in rows:
                if (pending := self._begin(row, threads)) is None:
                    progress.advance()
                    continue
                waiting.append(pending)
                if len(waiting) >= max(self.settings.workers, min(self.settings.batch_size, HELD_PIXELS // largest)):
                    largest = max(largest, self._settle(waiting.popleft()))
                    progress.advance()
            while waiting:
                self._settle(waiting.popleft())
                progress.advance()
        for asker in self.askers:
            asker.flush()

    def outcome(self, row: Row) -> tuple[dict[str, float], dict[str, str]]:
        """(scores, reasons) by scorer; the reason is called `picture` where that cannot be read.

        Raises:
            RuntimeError: `fill` has not seen the picture as it is now.
        """
        path = self.root / row["file"]
        status = _status(path)
        if status is None:
            return {}, {"picture": MISSING}
        image = self.cache.file(path, status)
        if image is None:
            image = self._unreadable(path)
        if isinstance(image, str):
            return {}, {"picture": image}
        scores: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for asker in self.askers:
            answer = asker.answer(image, row["prompt"])
            if answer is None:
                raise _changed(path)
            if isinstance(answer, str):
                reasons[asker.name] = answer
            else:
                scores[asker.name] = answer
        return scores, reasons

    def _begin(self, row: Row, threads: ThreadPoolExecutor) -> _Pending | None:
        """A picture on its way; None where nothing is to be asked about it."""
        path = self.root / row["file"]
        status = _status(path)
        if status is None:
            self._refuse(path, MISSING)
            return None
        known = self.cache.file(path, status)
        if isinstance(known, str) and not self.settings.retry:
            self._refuse(path, known)
            return None
        if isinstance(known, bytes) and not any(asker.lacks(known, row["prompt"]) for asker in self.askers):
            for name, reason in self.outcome(row)[1].items() if self.settings.strict else ():
                self._refuse(path, f"{name}: {reason}", "")
            return None
        return _Pending(row, status, threads.submit(_read, path))

    def _settle(self, pending: _Pending) -> int:
        """Queues a picture with the scorers that lack it; returns its pixels."""
        row = pending.row
        path = self.root / row["file"]
        try:
            picture, image = pending.picture.result()
        except BadRow as error:
            self.cache.put_files([(path, pending.status, str(error))])
            self._refuse(path, str(error))
            return 1
        except OSError as error:  # of the disk, not of the picture: not kept
            self._refuse(path, f"{UNREADABLE}: {error.strerror}")
            return 1
        self.cache.put_files([(path, pending.status, image)])
        for asker in self.askers:
            if asker.lacks(image, row["prompt"]):
                asker.add(image, picture, row["prompt"], row["file"])
            elif self.settings.strict and isinstance(reason := asker.answer(image, row["prompt"]), str):
                self._refuse(path, f"{asker.name}: {reason}", "")
        return picture.width * picture.height

    def _unreadable(self, path: Path) -> str:
        try:
            _read(path)
        except BadRow as error:
            return str(error)
        except OSError as error:
            return f"{UNREADABLE}: {error.strerror}"
        raise _changed(path)

    def _refuse(self, path: Path, reason: str, advice: str = "; make the picture again or leave it out") -> None:
        if self.settings.strict:
            raise UserError(f"{path}: {reason}{advice}")


def _no_prompt(prompt: str) -> str | None:
    """Why no scorer that reads prompts is asked: the number would mean nothing, or a tokenizer would fail."""
    if not prompt.strip():
        return "the prompt is empty"
    return "the prompt is no Unicode text" if any("\ud800" <= letter <= "\udfff" for letter in prompt) else None


def _read(path: Path) -> tuple[Image.Image, bytes]:
    picture = read_picture(path)
    return picture, image_id(picture.size, picture.tobytes())


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):  # a name with a zero byte in it is a ValueError
        return None


def _changed(path: Path) -> RuntimeError:
    return RuntimeError(f"{path} changed while it was scored; the same command goes on with what it is now")
