"""Scores for pictures in memory: chosen scorers are loaded once and kept, and nothing is scored twice."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffalign.config import Config
from diffalign.recipes.score._fill import Asker, open_cache
from diffalign.score_cache import image_id
from diffalign.scorers._build import Spec, build_scorers, scorer_key
from diffalign.sections import Score
from diffalign.types import Scorer

EMBEDDED = ("sprites_gold", "sprites_proxy", "sprites_sparse", "sprites_clip")


class Judges:
    """The scorers that may be chosen, by name: those of `score.scorers`, `evaluate.scorers`, and the embedded ones.

    Threads may share it; one scorer answers at a time.
    """

    def __init__(self, config: Config) -> None:
        specs: list[Spec] = [*config.score.scorers, *config.evaluate.scorers, *EMBEDDED]
        self._specs: dict[str, Spec] = {}
        for spec in specs:
            self._specs.setdefault(scorer_key(spec), spec)
        self._settings: Score = config.score
        self._scorers: dict[str, Scorer] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """In the order in which they are configured."""
        return list(self._specs)

    def judge(
        self, name: str, images: Sequence[Image.Image], prompts: Sequence[str], beside: Path
    ) -> list[float | str] | str:
        """A score, or why there is none, per picture; one text where the scorer itself fails.

        `beside` is where answers are kept if `score.cache` is off.
        """
        if name not in self._specs:
            return f"no scorer is called {name!r} here: choose among {', '.join(self.names)}"
        with self._lock:
            try:
                if name not in self._scorers:
                    self._scorers |= build_scorers([self._specs[name]])
                with open_cache(self._settings, beside) as cache:
                    asker = Asker(name, self._scorers[name], cache, self._settings)
                    ids = [image_id(image.size, image.tobytes()) for image in images]
                    for mark, image, prompt in zip(ids, images, prompts, strict=True):
                        if asker.lacks(mark, prompt):
                            asker.add(mark, image, prompt, prompt)
                    asker.flush()
                    answers = [asker.answer(mark, prompt) for mark, prompt in zip(ids, prompts, strict=True)]
            except Exception as error:  # a scorer may be anybody's code: the pictures stay, whatever it does
                return " ".join(f"{error}".split())[:300] or type(error).__name__
        return ["never asked" if answer is None else answer for answer in answers]
