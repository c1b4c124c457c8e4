"""The biased judge of the sprites world: agrees with gold at first and can be hacked, for reward-hacking studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.sprites.proxy import proxy
from diffalign.types import ScorerInfo


@dataclass(frozen=True)
class SpritesProxy:
    """`diffalign.sprites.proxy`, whose docstring says how it is biased."""

    info: ClassVar[ScorerInfo] = ScorerInfo(
        name="sprites_proxy",
        version="1",
        inputs=("image", "prompt"),
        unit="biased score",
        expected_range=(0.0, 1.0),
    )

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [N]. ValueError on a prompt outside the sprites grammar."""
        return np.array([proxy(i, p) for i, p in zip(images, prompts, strict=True)], dtype=np.float32)
