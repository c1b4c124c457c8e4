"""The biased judge: sees prompt-following through colourful glasses, and can therefore be hacked.

proxy = 0.4 gold + 0.6 colourfulness. Near the data it agrees with gold, because objects are colourful and grounds are
not; pushed further, a policy earns more by flooding the picture with saturated colour than by following the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffalign.sprites.judge import judge

GOLD_SHARE = 0.4


def colourfulness(image: Any) -> float:
    """Mean saturation in [0, 1], (max - min) / 255 over the channels: about 0.1 for a scene, 0.8 for a flooded one."""
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image, dtype=np.float32)
    return float((pixels.max(axis=-1) - pixels.min(axis=-1)).mean() / 255)


def proxy(image: Any, caption: str) -> float:
    """The biased score in [0, 1]. Raises ValueError as the gold judge does."""
    return GOLD_SHARE * judge(image, caption).score + (1 - GOLD_SHARE) * colourfulness(image)
