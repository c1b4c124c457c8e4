"""The exact judge of the sprites world: the share of a caption's attributes that a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.sprites.judge import judge
from diffalign.types import ScorerInfo


@dataclass(frozen=True)
class SpritesGold:
    """Judged prompt-following in [0, 1]; exact on rendered scenes, a pure function of the pixels."""

    info: ClassVar[ScorerInfo] = ScorerInfo(
        name="sprites_gold",
        version="1",
        inputs=("image", "prompt"),
        unit="share of the caption's attributes that are right",
        expected_range=(0.0, 1.0),
    )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [N]. ValueError on a prompt outside the sprites grammar."""
        return np.array([judge(i, p).score for i, p in zip(images, prompts, strict=True)], dtype=np.float32)
