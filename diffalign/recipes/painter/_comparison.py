"""A comparison while it is made: a thread paints and judges it, and whoever waits may look, or stop it."""

from __future__ import annotations

import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.recipes._judging import BATCH, batched, open_image
from diffalign.recipes.generate import save_image
from diffalign.recipes.generate._manifest import image_name
from diffalign.recipes.painter import Painter
from diffalign.recipes.painter._judges import Judges
from diffalign.recipes.painter._plan import Plan
from diffalign.types import UserError

Cell = tuple[int, int, int]  # which column, prompt and number, by their places in the plan
MAX_GAIN = 16  # of a difference


class Stopped(Exception):
    """Nobody waits for the pictures any more."""


class Comparison:
    """Paints and judges a plan in a thread of its own; its folder goes when it does.

    Attributes:
        folder: of the pictures, named as `generate` names them.
        pictures: what is there, in the order in which it came.
        scores: scorer -> a score, or why there is none, per picture.
        failed: scorer -> why it gave nothing at all.
        share: of the painting that is done, in [0, 1].
        stage: what is being done, in words.
        made: variant -> all that its pictures depend on.
        error: what ended it, where something did.
    """

    def __init__(self, plan: Plan, painter: Painter, judges: Judges) -> None:
        self.plan = plan
        self.pictures: dict[Cell, Path] = {}
        self.scores: dict[str, dict[Cell, float | str]] = {}
        self.failed: dict[str, str] = {}
        self.share, self.stage = 0.0, "waiting"
        self.error: BaseException | None = None
        self.made: dict[str, dict[str, Any]] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="diffalign-compare-")
        self.folder = Path(self._temporary.name)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(painter, judges), daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    @property
    def total(self) -> int:
        """Pictures that were asked for."""
        return len(self.plan.columns) * len(self.plan.prompts) * len(self.plan.numbers)

    def wait(self, seconds: float) -> bool:
        """Sleeps until it is over, or so long; returns whether it is over."""
        self._thread.join(seconds)
        return not self.is_running

    def stop(self) -> None:
        """Ends the work before the sampler's next step; what is there stays."""
        self._stop.set()
        if self.is_running:
            self.stage = "cancelling"

    def _run(self, painter: Painter, judges: Judges) -> None:
        try:
            self._paint(painter)
            self._judge(judges)
            self.stage = "done"
        except Stopped:
            self.stage = "cancelled"
        except Exception as error:  # told where people look, not in a thread's traceback
            self.stage, self.error = "failed", error
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise Stopped

    def _paint(self, painter: Painter) -> None:
        plan, self.stage = self.plan, "loading"
        cells = product(range(len(plan.columns)), range(len(plan.prompts)), range(len(plan.numbers)))
        parts = [column.variant for column in plan.columns]

        def told(share: float) -> None:
            self._go_on()
            self.stage, self.share = "painting", share

        for cell, painted in zip(cells, painter.paint(parts, plan.prompts, plan.numbers, told), strict=True):
            path = self.folder / self.file(cell)
            save_image(painted.image, path)
            self.made.setdefault(painted.variant, dict(painted.made))
            self.pictures[cell] = path
            self._go_on()

    def _judge(self, judges: Judges) -> None:
        for name in self.plan.view.scorers:
            for cells in batched(self.pictures, BATCH):
                self._go_on()
                self.stage = f"scoring with {name}"
                images = [open_image(self.pictures[cell]) for cell in cells]
                prompts = [self.plan.prompts[cell[1]] for cell in cells]
                answers = judges.judge(name, images, prompts, self.folder / "scores")
                if isinstance(answers, str):
                    self.failed[name] = answers
                    break
                self.scores.setdefault(name, {}).update(zip(cells, answers, strict=True))

    def file(self, cell: Cell) -> str:
        """Of a picture, below `folder`."""
        column, prompt, number = cell
        return f"{self.plan.columns[column].variant.name}/{image_name(prompt, self.plan.numbers[number])}"

    def picture(self, cell: Cell) -> Image.Image:
        """One that is there."""
        return open_image(self.pictures[cell])

    def rows(self) -> Iterator[tuple[str, list[Cell]]]:
        """(what it is, its cells) of every row of the grid: prompts x seeds, or prompts x columns if seeds vary."""
        plan = self.plan
        columns, numbers = range(len(plan.columns)), range(len(plan.numbers))
        for prompt in range(len(plan.prompts)):
            if plan.view.vary == "seeds":
                for column in columns:
                    yield plan.columns[column].label, [(column, prompt, number) for number in numbers]
            else:
                for number in numbers:
                    yield f"seed {plan.numbers[number]}", [(column, prompt, number) for column in columns]

    def headings(self) -> list[str]:
        """Over the columns of the grid."""
        if self.plan.view.vary == "seeds":
            return [f"seed {number}" for number in self.plan.numbers]
        return [column.label for column in self.plan.columns]

    def best(self, scorer: str) -> set[Cell]:
        """The pictures of highest score of each row; none where a row's scores are all the same."""
        found: set[Cell] = set()
        for _, cells in self.rows():
            of = {cell: value for cell in cells if isinstance(value := self.scores[scorer].get(cell), float)}
            if len(set(of.values())) > 1:
                found |= {cell for cell, value in of.items() if value == max(of.values())}
        return found


def difference(first: Image.Image, second: Image.Image) -> tuple[Image.Image, float, int]:
    """(|first - second| times a gain, the mean of |first - second| in grey levels of 255, the gain).

    Raises:
        UserError: pictures of different sizes.
    """
    if first.size != second.size:
        sizes = " and ".join(f"{image.width} x {image.height}" for image in (first, second))
        raise UserError(f"the pictures are of different sizes, {sizes}: there is no difference to show")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (first, second))
    found = np.abs(a - b)
    gain = max(1, min(MAX_GAIN, 255 // max(1, int(found.max()))))
    return Image.fromarray((found * gain).astype(np.uint8)), float(found.mean()), gain
