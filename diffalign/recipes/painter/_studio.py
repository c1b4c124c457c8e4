"""All that an app needs to compare: what there is, what a form begins with, and comparisons on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.config import Config
from diffalign.recipes.generate._prompts import open_prompts
from diffalign.recipes.painter import shared
from diffalign.recipes.painter._comparison import Comparison
from diffalign.recipes.painter._found import Contestant, contestants
from diffalign.recipes.painter._judges import Judges
from diffalign.recipes.painter._plan import first_view, plan
from diffalign.recipes.painter._view import View
from diffalign.recipes.painter._written import archive, write
from diffalign.sampling import SAMPLERS
from diffalign.types import UserError

SETS = {"sprites, held out": "sprites:heldout:{}", "sprites, two things": "sprites:heldout:{}:two", "smoke": "smoke"}


class Studio:
    """One for all visitors: it holds nothing of theirs.

    Args:
        config: of the app.
        folder: what is written goes to `comparisons` and `exports` in it.
        roots: where runs are looked for.
        below: resolves a path that a visitor named, or refuses it.
    """

    def __init__(self, config: Config, folder: Path, roots: Sequence[Path], below: Callable[[str], Path]) -> None:
        self.config, self.folder, self.roots, self.below = config, folder, roots, below
        self.painter, self.judges = shared(config.generate.device), Judges(config)
        self.samplers, self.sets = SAMPLERS, tuple(SETS)
        self.found: Mapping[str, Contestant] = {}
        self._looked = -float("inf")
        self.refresh()

    def refresh(self, max_age: float = 0.0) -> list[str]:
        """The names of what can be painted; looked for anew where the last look was so many seconds ago."""
        if time.monotonic() - self._looked >= max_age:
            self.found, self._looked = contestants(self.config, self.roots), time.monotonic()
        return list(self.found)

    def load(self) -> None:
        """Loads the config's model in a thread, if it is small enough to do so unasked: an embedded one."""
        if self.config.model.path.startswith("package:"):
            threading.Thread(target=self.painter.load, args=(self.config,), daemon=True).start()

    def first_view(self) -> View:
        """What a form begins with."""
        is_embedded = self.config.model.path.startswith("package:diffalign.sprites")
        name = "sprites, two things" if is_embedded else "smoke"
        return first_view(self.config, self.found, self.prompts_of(name, 3))

    def view(self, values: Mapping[str, Any]) -> View:
        """The view of a form's values by field.

        Raises:
            UserError: a value that does not fit.
        """
        return View.of(values)

    def view_of_link(self, words: Sequence[tuple[str, str]]) -> View:
        """The view of a link's words.

        Raises:
            UserError: an unknown word, or a value that does not fit.
        """
        return View.from_link(words)

    def prompts_of(self, name: str, num: int) -> list[str]:
        """The first `num` prompts of a set.

        Raises:
            UserError: no such set, or too many.
        """
        limit = self.config.app.max_pictures
        if name not in SETS or not 1 <= num <= limit:
            raise UserError(f"prompts: choose a set, and 1 to {limit} prompts of it")
        return list(islice(open_prompts(SETS[name].format(num), "prompts"), num))

    def prompts_in(self, file: Path) -> list[str]:
        """The prompts of a text or JSONL file that a visitor sent, each on one line, no more than a comparison takes.

        Raises:
            UserError: no prompts in it.
        """
        found = open_prompts(str(file), "file")
        return [" ".join(prompt.split()) for prompt in islice(found, self.config.app.max_pictures)]

    def start(self, view: View) -> Comparison:
        """Begins to paint what the view asks for.

        Raises:
            UserError: nothing or too much to paint, or something that is not there.
        """
        limit = self.config.app.max_pictures
        exports = self.folder / "exports"
        made = plan(view, self.config, self.found, exports=exports, below=self.below, limit=limit)
        return Comparison(made, self.painter, self.judges)

    def save(self, comparison: Comparison) -> Path:
        """Keeps a comparison in `comparisons`, where people vote on it; returns its folder.

        Raises:
            UserError: there are no pictures.
        """
        name = time.strftime("%Y%m%d-%H%M%S")
        names = (f"{name}-{number}" if number else name for number in range(1000))
        folders = (self.folder / "comparisons" / each for each in names)
        return write(comparison, next(folder for folder in folders if not folder.exists()))

    def archive(self, comparison: Comparison) -> Path:
        """A zip of a comparison; it goes when the comparison does.

        Raises:
            UserError: there are no pictures.
        """
        return archive(comparison, comparison.folder / "comparison.zip")
