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
PAD = 3  # pixels around a crop: templates and dilation reach past a blob's box
_SCALES = np.array([0.94, 1.0, 1.06], np.float32)[:, None, None]  # of the radius that the area says
_CROSS = ndimage.generate_binary_structure(2, 1)
_FULL = ndimage.generate_binary_structure(2, 2)
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
    frame = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    colour = np.median(frame, axis=0)
    gaps = {name: float(np.linalg.norm(colour - np.array(ground))) for name, ground in BACKGROUNDS.items()}
    best = min(gaps, key=gaps.__getitem__)
    return colour, best if gaps[best] < COLOUR_TOLERANCE else None


@cache
def _palette() -> tuple[tuple[str, ...], NDArray[np.float32]]:
    return tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)


def _gaps(colours: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared RGB distances (..., K) of colours (..., 3) to the K colours of a palette."""
    return np.square(colours[..., None, :] - palette).sum(axis=-1)


def _nearest_colour(colour: NDArray[np.float32]) -> str | None:
    names, palette = _palette()
    gaps = np.linalg.norm(palette - colour, axis=1)
    return names[int(gaps.argmin())] if gaps.min() < COLOUR_TOLERANCE else None


def _centroid(cover: NDArray[np.float32]) -> tuple[float, float, float]:
    """A soft mask's area in pixels and its centroid (x, y), pixel centres at halves."""
    columns, rows = cover.sum(axis=0), cover.sum(axis=1)
    area = float(columns.sum())
    x = float((columns * (np.arange(len(columns), dtype=np.float32) + 0.5)).sum()) / area
    y = float((rows * (np.arange(len(rows), dtype=np.float32) + 0.5)).sum()) / area
    return area, x, y


def _shape(cover: NDArray[np.float32], area: float, x: float, y: float) -> tuple[str | None, float]:
    """The shape whose template of the same area overlaps best with a soft mask, and its radius in pixels.

    `cover` is the mask, `area` its sum, (x, y) its centroid. All of a shape's scales are drawn in one call.
    """
    columns = (np.arange(cover.shape[1], dtype=np.float32) + 0.5 - x)[None, None, :]
    rows = (np.arange(cover.shape[0], dtype=np.float32) + 0.5)[None, :, None]
    best, best_fit, best_radius = None, 0.0, 0.0
    for shape in SHAPES:
        radius = (area / AREA[shape]) ** 0.5
        radii = _SCALES * np.float32(radius)
        template = np.clip(0.5 - distance(shape, columns, rows - (y - CENTRE[shape] * radius), radii), 0.0, 1.0)
        # |A and B| / |A or B|, where |A or B| = |A| + |B| - |A and B|
        shared = np.minimum(template, cover).sum(axis=(1, 2))
        fit = float((shared / (template.sum(axis=(1, 2)) + area - shared)).max())
        if fit > best_fit:
            best, best_fit, best_radius = shape, fit, radius
    return (best if best_fit >= MIN_FIT else None), best_radius


def _describe(cover: NDArray[np.float32], colour: NDArray[np.float32], top: int, left: int) -> Found:
    area, x, y = _centroid(cover)
    shape, radius = _shape(np.pad(cover, PAD), area, x + PAD, y + PAD)
    return Found(
        shape=shape,
        colour=_nearest_colour(colour),
        size="small" if radius < SIZE_BORDER else "large",
        x=left + x,
        y=top + y,
        area=area,
    )


def _erode(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels whose four neighbours are in the mask too; outside the array is outside the mask."""
    inside = np.zeros_like(mask)
    inside[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    return inside


def _dilate(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its four-neighbours."""
    reach = mask.copy()
    reach[1:] |= mask[:-1]
    reach[:-1] |= mask[1:]
    reach[:, 1:] |= mask[:, :-1]
    reach[:, :-1] |= mask[:, 1:]
    return reach


def _extent(line: Any) -> slice:
    """From the first True to the last."""
    return slice(int(line.argmax()), len(line) - int(line[::-1].argmax()))


def _core_colour(pixels: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The median colour of a mask's inside, where antialiasing does not reach."""
    once = _erode(mask)
    inside = _erode(once)
    if np.count_nonzero(inside) < 6:
        inside = once
    return np.median(pixels[inside if inside.any() else mask], axis=0)


def _split_by_colour(pixels: NDArray[np.float32], mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """A blob of two touching objects as one mask per palette colour; a blob of one colour as it is."""
    names, palette = _palette()
    inside = pixels[_erode(mask)]
    counts = np.bincount(_gaps(inside, palette).argmin(-1), minlength=len(names))
    strong = [index for index in np.argsort(-counts) if counts[index] >= max(MIN_AREA, 0.15 * counts.sum())]
    if len(strong) < 2:
        return [mask]
    chosen = _gaps(pixels, palette[strong]).argmin(-1)
    parts = []
    for position in range(len(strong)):
        part = _dilate(_erode(mask & (chosen == position)))
        labels, num = ndimage.label(part, structure=_CROSS)
        parts += [labels == number for number in range(1, num + 1)]
    return parts


def find(image: Any) -> tuple[list[Found], str | None]:
    """The objects of a 64 x 64 picture, largest first, and the name of its background.

    Raises ValueError on a picture of another size.
    """
    pixels = _pixels(image)
    ground, name = _background(pixels)
    away = np.sqrt(np.square(pixels - ground).sum(axis=-1))
    # A frame of ground around the picture, so that a blob's crop has room on all sides.
    pixels, away = np.pad(pixels, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="edge"), np.pad(away, PAD)
    inside = np.pad(np.ones((SIZE, SIZE), np.bool_), PAD)
    labels, _ = ndimage.label(away > CONTRAST * 0.6, structure=_FULL)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        # Blobs are judged on crops of the picture: most of it is ground.
        top, left = rows.start - PAD, columns.start - PAD
        crop = slice(top, rows.stop + PAD), slice(left, columns.stop + PAD)
        blob, near, far = labels[crop] == number, pixels[crop], away[crop]
        if np.count_nonzero(blob) < MIN_AREA or far[blob].max() < CONTRAST:
            continue
        for part in _split_by_colour(near, blob):
            if np.count_nonzero(part) < MIN_AREA:
                continue
            colour = _core_colour(near, part)
            reach = _dilate(part) & inside[crop]
            y, x = _extent(np.any(reach, axis=1)), _extent(np.any(reach, axis=0))
            # Antialiased rims count by how far they are from the ground.
            depth = np.float32(max(float(np.linalg.norm(colour - ground)), CONTRAST))
            cover = np.minimum(far[y, x] / depth, 1) * reach[y, x]
            found.append(_describe(cover, colour, top - PAD + y.start, left - PAD + x.start))
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


def compare(scene: Scene, items: Sequence[Found], ground: str | None) -> Judgement:
    """What `find` saw against what a caption asks for."""
    if scene.kind == "two":
        attributes = _of_two(scene, items)
        attributes["count"] = len(items) == 2
    else:
        attributes = _of_sprite(scene.sprites[0], items)
        attributes["count"] = len(items) == scene.count
    if scene.background:
        attributes["background"] = ground == scene.background
    return Judgement(attributes)


def judge(image: Any, caption: str) -> Judgement:
    """Judges a 64 x 64 RGB picture (PIL or uint8 array) against a caption of the grammar, in one to two milliseconds.

    Raises ValueError on a caption outside the grammar or a picture of another size.
    """
    return compare(parse(caption), *find(image))
