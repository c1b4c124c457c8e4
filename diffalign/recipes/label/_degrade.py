"""Corrupted copies of an image, each worse than the one before: a ranking that needs no judge (DegreePO's ladder)."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from diffalign import randomness

Corruption = Literal["blur", "jpeg", "noise", "downscale", "fade"]
SHARES = {  # of the strongest level, as a number of the corruption's own; weaker ones are even shares of it
    "blur": 0.04,  # Gaussian radius, of the longer side
    "noise": 0.30,  # standard deviation, of the range
    "downscale": 0.875,  # of the side that is thrown away
    "fade": 0.8,  # of contrast and colour that is thrown away
}
JPEG_QUALITIES = (40, 2)  # of the weakest and the strongest level


def degrade(image: Image.Image, kind: Corruption, level: int, levels: int, *key: int | str) -> Image.Image:
    """An RGB copy at `level` of `levels`, 0 being the image itself; noise is addressed by `key`."""
    assert 0 <= level <= levels
    image = image.convert("RGB")
    if level == 0:
        return image
    share = level / levels
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(share * SHARES["blur"] * max(image.size)))
    if kind == "jpeg":
        best, worst = JPEG_QUALITIES
        quality = round(best + (worst - best) * ((level - 1) / max(1, levels - 1) if levels > 1 else 1))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")
    if kind == "downscale":
        small = [max(1, round(side * (1 - share * SHARES["downscale"]))) for side in image.size]
        return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32)
    if kind == "noise":
        # one noise for all levels: a stronger level is the weaker one gone further
        rng = np.random.default_rng(randomness.address("degrade", *key))
        pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * 255 * share * SHARES["noise"]
    else:
        grey = pixels.mean()
        pixels = grey + (pixels - grey) * (1 - share * SHARES["fade"])
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def ladder(data: bytes, kind: Corruption, levels: int, *key: int | str) -> tuple[bytes, ...]:
    """The encoded image as it is, then `levels` corrupted copies as PNG, each worse than the one before."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    made = [data]
    for level in range(1, levels + 1):
        buffer = io.BytesIO()
        degrade(image, kind, level, levels, *key).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return tuple(made)
