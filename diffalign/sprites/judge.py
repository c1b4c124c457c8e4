"""The gold judge: which of a caption's attributes a picture shows, by segmentation and template matching.

A pure function of the pixels. Objects are what differs from the background's colour; each gets the palette colour, the
shape and the size that explain it best, whatever the caption says, and only then is compared with the caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffalign.sprites.render import RADII, distance
from diffalign.sprites.scene import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, Sprite, parse

FOREGROUND = 0.35  # of the way from the background's colour to an object's: where the mask begins
CONTRAST = 70.0  # RGB distance from the background that an object reaches somewhere
MIN_AREA = 24.0  # pixels; a small cross covers about 110
COLOUR_TOLERANCE = 75.0  # RGB distance from the palette beyond which a colour is none of it
MIN_FIT = 0.70  # overlap (intersection over union) below which a blob is none of the shapes
AREA = {"circle": 3.1416, "square": 3.24, "triangle": 2.0, "cross": 2.3616}  # over radius squared
CENTRE = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}  # centroid below the centre, in radii
SIZE_BORDER = (RADII["small"][1] + RADII["large"][0]) / 2


@dataclass(frozen=True)
class Found:
    """One object in a picture; `colour` and `shape` are None where nothing of the world fits."""

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Judgement:
    """A verdict: `attributes` names what the caption asks for, True where the picture shows it."""

    attributes: dict[str, bool]

    @property
    def score(self) -> float:
        """Prompt-following: the share of the attributes that are right, in [0, 1]."""
        return sum(self.attributes.values()) / len(self.attributes)

    @property
    def correct(self) -> bool:
        """Whether every attribute is right."""
        return all(self.attributes.values())


def _pixels(image: Any) -> NDArray[np.float32]:
    pixels = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image, dtype=np.float32)
    if pixels.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the sprites judge reads {SIZE} x {SIZE} RGB pictures, got shape {pixels.shape}")
    return pixels


def _background(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], str | None]:
    """The colour of the frame, and the name of the ground it is."""
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3),
                            pixels[:, -2:].reshape(-1, 3)])
    colour = np.median(frame, axis=0)
    gaps = {name: float(np.linalg.norm(colour - np.array(ground))) for name, ground in BACKGROUNDS.items()}
    best = min(gaps, key=gaps.__getitem__)
    return colour, best if gaps[best] < COLOUR_TOLERANCE else None


@cache
def _palette() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    return tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)


def _nearest_colour(colour: NDArray[np.float32]) -> str | None:
    names, palette = _palette()
    gaps = np.linalg.norm(palette - colour, axis=1)
    return names[int(gaps.argmin())] if gaps.min() < COLOUR_TOLERANCE else None


def _shape(cover: NDArray[np.float32]) -> tuple[str | None, float]:
    """The shape whose template of the same area overlaps best with a soft mask, and its radius in pixels."""
    area = float(cover.sum())
    ys, xs = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]].astype(np.float32) + 0.5
    x, y = float((cover * xs).sum()) / area, float((cover * ys).sum()) / area
    best, best_fit, best_radius = None, 0.0, 0.0
    for shape in SHAPES:
        radius = (area / AREA[shape]) ** 0.5
        centre = y - CENTRE[shape] * radius
        for scale in (0.94, 1.0, 1.06):
            template = np.clip(0.5 - distance(shape, xs - x, ys - centre, scale * radius), 0.0, 1.0)
            fit = float(np.minimum(template, cover).sum() / np.maximum(template, cover).sum())
            if fit > best_fit:
                best, best_fit, best_radius = shape, fit, radius
    return (best if best_fit >= MIN_FIT else None), best_radius


def _describe(cover: NDArray[np.float32], colour: NDArray[np.float32], top: int, left: int) -> Found:
    padded = np.pad(cover, 3)
    shape, radius = _shape(padded)
    area = float(cover.sum())
    ys, xs = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]].astype(np.float32) + 0.5
    return Found(
        shape=shape,
        colour=_nearest_colour(colour),
        size="small" if radius < SIZE_BORDER else "large",
        x=left + float((cover * xs).sum()) / area,
        y=top + float((cover * ys).sum()) / area,
        area=area,
    )


def _core_colour(pixels: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The median colour of a mask's inside, where antialiasing does not reach."""
    inside = ndimage.binary_erosion(mask, iterations=2)
    if inside.sum() < 6:
        inside = ndimage.binary_erosion(mask)
    return np.median(pixels[inside if inside.any() else mask], axis=0)


def _split_by_colour(pixels: NDArray[np.float32], mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """A blob of two touching objects as one mask per palette colour; a blob of one colour as it is."""
    names, palette = _palette()
    nearest = np.linalg.norm(pixels[:, :, None] - palette, axis=-1).argmin(-1)
    inside = ndimage.binary_erosion(mask)
    counts = np.bincount(nearest[inside], minlength=len(names))
    strong = [index for index in np.argsort(-counts) if counts[index] >= max(MIN_AREA, 0.15 * counts.sum())]
    if len(strong) < 2:
        return [mask]
    chosen = np.linalg.norm(pixels[:, :, None] - palette[strong], axis=-1).argmin(-1)
    parts = []
    for position in range(len(strong)):
        part = ndimage.binary_opening(mask & (chosen == position))
        labels, num = ndimage.label(part)
        parts += [labels == number for number in range(1, num + 1)]
    return parts


def find(image: Any) -> tuple[list[Found], str | None]:
    """The objects of a 64 x 64 picture, largest first, and the name of its background.

    Raises ValueError on a picture of another size.
    """
    pixels = _pixels(image)
    ground, name = _background(pixels)
    away = np.linalg.norm(pixels - ground, axis=-1)
    labels, num = ndimage.label(away > CONTRAST * 0.6, structure=np.ones((3, 3)))
    found = []
    for number in range(1, num + 1):
        blob = labels == number
        if blob.sum() < MIN_AREA or away[blob].max() < CONTRAST:
            continue
        for part in _split_by_colour(pixels, blob):
            if part.sum() < MIN_AREA:
                continue
            colour = _core_colour(pixels, part)
            reach = ndimage.binary_dilation(part)  # antialiased rims count by how far they are from the ground
            cover = np.clip(away / max(float(np.linalg.norm(colour - ground)), CONTRAST), 0, 1) * reach
            rows, columns = np.nonzero(reach)
            top, left = int(rows.min()), int(columns.min())
            cover = cover[top : rows.max() + 1, left : columns.max() + 1]
            found.append(_describe(cover, colour, top, left))
    return sorted(found, key=lambda item: -item.area), name


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    """By the centres: the stated direction dominates the other axis."""
    dx, dy = second.x - first.x, second.y - first.y
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along > 0 and along > 0.8 * abs(across)


def _of_sprite(sprite: Sprite, items: Sequence[Found], prefix: str = "") -> dict[str, bool]:
    """The stated attributes of one sprite, of all `items` that show it."""
    stated = {"shape": sprite.shape, "colour": sprite.colour, "size": sprite.size}
    return {
        prefix + key: bool(items) and all(getattr(item, key) == value for item in items)
        for key, value in stated.items()
        if value is not None
    }


def _of_two(scene: Scene, items: Sequence[Found]) -> dict[str, bool]:
    """Both sprites under the assignment of objects that flatters the picture most; colour decides first."""
    best: dict[str, bool] = {}
    padded: list[Found | None] = [*items[:4], None, None]
    for pair in permutations(padded, 2):
        verdict: dict[str, bool] = {}
        for prefix, sprite, item in zip(("first ", "second "), scene.sprites, pair, strict=True):
            verdict |= _of_sprite(sprite, [item] if item else [], prefix)
        first, second = pair
        verdict["position"] = bool(first and second and _relation_holds(str(scene.relation), first, second))

        def weight(of: dict[str, bool]) -> float:
            return sum(of.values()) + 2 * sum(of.get(f"{which} colour", False) for which in ("first", "second"))

        if not best or weight(verdict) > weight(best):
            best = verdict
    return best


def judge(image: Any, caption: str) -> Judgement:
    """Judges a 64 x 64 RGB picture (PIL or uint8 array) against a caption of the grammar.

    Raises ValueError on a caption outside the grammar or a picture of another size.
    """
    scene = parse(caption)
    items, ground = find(image)
    if scene.kind == "two":
        attributes = _of_two(scene, items)
        attributes["count"] = len(items) == 2
    else:
        attributes = _of_sprite(scene.sprites[0], items)
        attributes["count"] = len(items) == scene.count
    if scene.background:
        attributes["background"] = ground == scene.background
    return Judgement(attributes)
