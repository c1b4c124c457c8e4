"""Preference pairs of the sprites world, as the gold judge decides, in Pick-a-Pic's columns."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.sprites.judge import judge
from diffalign.sprites.near_miss import changes
from diffalign.sprites.render import render
from diffalign.sprites.scene import Scene, caption, is_held_out, sample_scene

MIXTURE = {"single": 0.3, "open": 0.1, "count": 0.2, "two": 0.4}  # of the embedded models' training


def wrong_scenes(scene: Scene) -> list[Scene]:
    """Scenes for which the caption does not hold: an attribute, the number of objects or the colours' order changed."""
    found = list(changes(scene))
    if len(scene.sprites) == 2:
        first, second = scene.sprites
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        found += [replace(scene, sprites=swapped)] * 3
        found += [Scene((first,), background=scene.background), Scene((second,), background=scene.background)]
    elif scene.count == 1:
        found.append(replace(scene, count=2))
    return found


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene whose caption is of the training split."""
    while True:
        scene = sample_scene(rng, str(rng.choice(list(MIXTURE), p=list(MIXTURE.values()))))
        if not is_held_out(caption(scene)):
            return scene


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def rendered_pairs(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """Pairs in Pick-a-Pic's columns: two renderings for one caption, each right or wrong in up to three ways."""
    for index in range(num):
        rng = np.random.default_rng([seed, 12, index])
        scene = training_scene(rng)
        text = caption(scene)
        pictures = []
        for faults in rng.choice(4, size=2, replace=bool(rng.random() < 0.3), p=[0.4, 0.35, 0.15, 0.1]):
            shown = scene
            for _ in range(int(faults)):
                options = wrong_scenes(shown)
                shown = options[int(rng.integers(len(options)))]
            pictures.append(render(shown, rng))
        yield pair(text, *pictures)


def pair(text: str, first: Image.Image, second: Image.Image) -> dict[str, Any]:
    """One row as the gold judge decides; equal scores are a tie."""
    return _row(text, *((_png(picture), judge(picture, text).score) for picture in (first, second)))


def _row(text: str, first: tuple[bytes, float], second: tuple[bytes, float]) -> dict[str, Any]:
    gap = first[1] - second[1]
    label = 0.5 if gap == 0 else float(gap > 0)
    return {"caption": text, "jpg_0": first[0], "jpg_1": second[0], "label_0": label}


def generated_pairs(folder: Path) -> Iterator[dict[str, Any]]:
    """All pairs of each prompt's pictures in a folder that `diffalign generate` wrote."""
    with (folder / "manifest.jsonl").open() as lines:
        for _, rows in itertools.groupby(map(json.loads, lines), key=lambda row: row["prompt_id"]):
            of_prompt = list(rows)
            text = of_prompt[0]["prompt"]
            pictures = [Image.open(folder / row["file"]).convert("RGB") for row in of_prompt]
            judged = [(_png(picture), judge(picture, text).score) for picture in pictures]
            for first, second in itertools.combinations(judged, 2):
                yield _row(text, first, second)


def write_pairs(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """A Parquet file in groups of 256 rows, there whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    columns = [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64())]
    with pq.ParquetWriter(temporary, pa.schema(columns)) as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(row)
            if len(group) == 256:
                writer.write_table(pa.Table.from_pylist(group, pa.schema(columns)))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, pa.schema(columns)))
    temporary.replace(path)
