"""Scores generated images with any number of scorers; a killed run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.progress import Progress
from diffalign.recipes.generate import read_manifest
from diffalign.registry import build
from diffalign.types import Scorer, UserError

BATCH = 64  # images decoded at a time


def batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of up to `size` rows."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def open_image(path: Path) -> Image.Image:
    """An RGB picture.

    Raises:
        UserError: missing or broken; the file is named.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable image: generate it again or take it out of the manifest") from error


def judge(
    images: Sequence[Image.Image], prompts: Sequence[str], scorers: Mapping[str, Scorer], names: Sequence[str]
) -> dict[str, list[float]]:
    """scorer -> a score per picture; `names` are what the pictures are called in errors.

    Raises:
        UserError: a scorer that cannot judge a prompt or picture, or gave no finite number.
    """
    values: dict[str, list[float]] = {}
    for scorer_name, scorer in scorers.items():
        try:
            scores = scorer.score(list(images), list(prompts))
        except ValueError as error:
            raise UserError(f"scorer {scorer_name}: {error}") from error
        values[scorer_name] = [float(score) for score in scores]
        for name, value in zip(names, values[scorer_name], strict=True):
            if not float("-inf") < value < float("inf"):
                raise UserError(f"scorer {scorer_name} gave {value} for {name}")
    return values


def score_rows(rows: Sequence[dict[str, Any]], root: Path, scorers: dict[str, Scorer]) -> list[dict[str, float]]:
    """scorer -> score, per row of a manifest.

    Raises:
        UserError: see `judge`, or a picture that cannot be read.
    """
    images = [open_image(root / row["file"]) for row in rows]
    values = judge(images, [row["prompt"] for row in rows], scorers, [row["file"] for row in rows])
    return [{name: values[name][index] for name in scorers} for index in range(len(rows))]


def build_scorers(specs: Sequence[str | Mapping[str, Any]]) -> dict[str, Scorer]:
    """Scorers by what they are called; a spec is a name, or {name: ..., as: ..., the scorer's fields}.

    Raises:
        UserError: an unknown scorer or field, none, or two of one name.
    """
    if not specs:
        raise UserError("no scorers named: see `diffalign list scorers`")
    built: dict[str, Scorer] = {}
    for spec in specs:
        fields = {"name": spec} if isinstance(spec, str) else {key: spec[key] for key in spec if key != "as"}
        key = scorer_key(spec)
        if key in built and not isinstance(spec, str):
            raise UserError(f"two scorers are called {key!r}: give one another name with `as`")
        built[key] = build("scorer", fields)
    return built


def scorer_key(spec: str | Mapping[str, Any]) -> str:
    """What a scorer of that config name, or mapping (`as`, else `name`), is called in files and metrics."""
    name = spec if isinstance(spec, str) else spec.get("as", spec.get("name", ""))
    return str(name).replace("-", "_")


def score(config: Config, quiet: bool = False) -> Path:
    """Writes scores.jsonl (a manifest row plus `scores`) beside the images, and what the scores mean in scores.json.

    Raises:
        UserError: see `score_rows`, or scores of other scorers are there already.
    """
    settings = config.score
    if settings.images is None:
        raise UserError("score.images is missing: a folder that `diffalign generate` wrote")
    source = Path(settings.images)
    root = source if source.is_dir() else source.parent
    path = Path(settings.out or root / "scores.jsonl")
    scorers = build_scorers(settings.scorers)
    info = {"images": str(source), "scorers": [dataclasses.asdict(scorer.info) for scorer in scorers.values()]}
    info_path = path.with_suffix(".json")
    old = read_json(info_path)
    if old and old != json.loads(json.dumps(info)):
        raise UserError(f"{path} holds scores of other scorers or images: choose another score.out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(info_path, info)
    done = keep_whole_lines(path)
    rows = read_manifest(source)
    total = sum(1 for _ in read_manifest(source))
    with Progress("score", total, done, "img", quiet) as progress, path.open("a", encoding="utf-8") as out:
        for batch in batched(islice(rows, done, None), BATCH):
            for row, scores in zip(batch, score_rows(batch, root, scorers), strict=True):
                out.write(json.dumps(row | {"scores": scores}) + "\n")
            out.flush()
            progress.advance(len(batch))
    return path


def keep_whole_lines(path: Path) -> int:
    """How many whole lines a score file holds; what a kill left of the last one is cut off."""
    if not path.is_file():
        return 0
    done, end = 0, 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            done, end = done + 1, end + len(line)
    os.truncate(path, end)
    return done
