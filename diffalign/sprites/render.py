"""Draws a scene: flat antialiased shapes on a plain background, placed at random so that the caption clearly holds.

Shapes are signed distance functions, so the antialiasing is exact and a shape's size is a real number of pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from diffalign.sprites.scene import BACKGROUNDS, COLOURS, SIZE, SIZES, Scene, Sprite

RADII = {"small": (6.5, 7.7), "large": (12.0, 13.8)}  # pixels, half the extent of a circle
MARGIN = 1.5  # pixels between a shape and the border
GAP = 4.0  # pixels between two shapes
ARM = 0.36  # half the width of a cross's arms over its radius
SQUARE = 0.9  # half a square's side over its radius: about as heavy to the eye as the circle
JITTER = 6  # each sprite's colour varies by up to this many levels a channel

_YX = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def _box(x: np.ndarray, y: np.ndarray, half_x: float | np.ndarray, half_y: float | np.ndarray) -> np.ndarray:
    dx, dy = np.abs(x) - half_x, np.abs(y) - half_y
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Signed distance in pixels (negative inside) from points (x right, y down) to a shape centred at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return _box(x, y, SQUARE * radius, SQUARE * radius)
    if shape == "triangle":
        # An upright isosceles triangle that fills the box of the circle: apex (0, -r), base from (-r, r) to (r, r).
        sides = (2 * np.abs(x) - y - radius) / np.sqrt(5.0)
        return np.maximum(sides, y - radius)
    if shape == "cross":
        return np.minimum(_box(x, y, radius, ARM * radius), _box(x, y, ARM * radius, radius))
    raise ValueError(f"no shape {shape!r}")


def coverage(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel the shape covers: (SIZE, SIZE) in [0, 1]; `centre` is (x, y) in pixels."""
    return np.clip(0.5 - distance(shape, _YX[1] - centre[0], _YX[0] - centre[1], radius), 0.0, 1.0)


def _place_one(radius: float, rng: np.random.Generator) -> tuple[float, float]:
    low, high = radius + MARGIN, SIZE - radius - MARGIN
    return float(rng.uniform(low, high)), float(rng.uniform(low, high))


def _place_two(relation: str, radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres with the relation along one axis: a clear gap there, and less offset across than along."""
    while True:
        points = [_place_one(radius, rng) for radius in radii]
        along = 0 if relation in ("left of", "right of") else 1
        step = points[1][along] - points[0][along]
        step = step if relation in ("left of", "above") else -step
        across = abs(points[1][1 - along] - points[0][1 - along])
        if step >= sum(radii) + GAP and across <= 0.5 * step:
            return points


def _place_many(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres whose bounding boxes keep GAP apart: tried at random, and on a 2 x 2 grid where there is no room."""
    for _ in range(60):
        points: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(20):
                point = _place_one(radius, rng)
                apart = (
                    max(abs(point[0] - x), abs(point[1] - y)) >= radius + other + GAP
                    for (x, y), other in zip(points, radii, strict=False)
                )
                if all(apart):
                    points.append(point)
                    break
        if len(points) == len(radii):
            return points
    cells = rng.permutation(4)[: len(radii)]
    return [(16.0 + 32 * (cell % 2), 16.0 + 32 * (cell // 2)) for cell in cells]


def _complete(sprite: Sprite, rng: np.random.Generator) -> Sprite:
    colour = sprite.colour or str(rng.choice(list(COLOURS)))
    return Sprite(sprite.shape, colour, sprite.size or str(rng.choice(SIZES)))


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A SIZE x SIZE RGB picture of the scene; what the scene leaves open is drawn at random from `rng`."""
    background = scene.background or str(rng.choice(list(BACKGROUNDS)))
    sprites = [_complete(sprite, rng) for sprite in scene.sprites]
    if scene.count > 1:
        sprites = sprites * scene.count
    radii = [float(rng.uniform(*RADII[str(sprite.size)])) for sprite in sprites]
    if scene.count > 1:
        radii = [min(radius, 13.0) for radius in radii]  # so that four large ones fit with a gap
        points = _place_many(radii, rng)
    elif len(sprites) == 2:
        points = _place_two(str(scene.relation), radii, rng)
    else:
        points = [_place_one(radii[0], rng)]
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = BACKGROUNDS[background]
    for sprite, radius, point in zip(sprites, radii, points, strict=True):
        colour = np.array(COLOURS[str(sprite.colour)], np.float32) + rng.integers(-JITTER, JITTER + 1, 3)
        cover = coverage(sprite.shape, point, radius)[..., None]
        canvas += cover * (colour - canvas)
    return Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
