"""The list of a folder's pictures: what each is, and all that is needed to make it again."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign._atomic import atomic_path
from diffalign._json import write_json
from diffalign.config import Generate
from diffalign.recipes.generate._prompts import PromptSequence
from diffalign.types import UserError

MANIFEST = "manifest.jsonl"
SELECTION = "selection.json"
PNG_KEY = "diffalign"  # of the text in a PNG that says how it was selected
FILE = re.compile(r"(?:(?P<variant>[^/]+)/)?\d{5,}/(?P<prompt_id>\d{7,})-(?P<number>\d{3,})\.png")


def image_name(prompt_id: int, number: int) -> str:
    """Folders of a thousand prompts: file systems dislike a million files in one."""
    return f"{prompt_id // 1000:05d}/{prompt_id:07d}-{number:03d}.png"


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `generate` wrote, one at a time: file, prompt, prompt_id, number, seed, and in newer ones `made`.

    Raises:
        UserError: no manifest there, or a broken line.
    """
    manifest = path / MANIFEST if path.is_dir() else path
    if not manifest.is_file():
        raise UserError(f"{path} holds no {MANIFEST}: name a folder that `diffalign generate` finished")
    with manifest.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{manifest}: line {number} is not JSON: generate again or delete the line") from error


def write_manifest(
    folder: Path, prompts: PromptSequence, settings: Generate, made: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """A row per picture, prompt by prompt; the pictures of a prompt by all variants are neighbours.

    With `generate.select` also `selection.json`, what it took of the network against plain best-of-N.

    Args:
        made: variant -> what `made_by` says; the command's own has an empty name.
    """
    tally: defaultdict[str, Any] = defaultdict(int)
    with atomic_path(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as out:
        for row in _rows(folder, prompts, settings, made or {"": {}}):
            out.write(json.dumps(row) + "\n")
            if "selected" in row:
                _count(tally, row["selected"])
        out.flush()
        os.fsync(out.fileno())
    if settings.select is not None:
        write_json(folder / SELECTION, _summary(tally))


def _rows(
    folder: Path, prompts: PromptSequence, settings: Generate, made: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    only = set(settings.only)
    for prompt_id, prompt in enumerate(prompts):
        for name, how in made.items():
            for number in range(settings.images_per_prompt):
                file = (Path(name) / image_name(prompt_id, number)).as_posix()
                if only and file not in only:
                    continue
                row = {"file": file, "prompt": prompt, "prompt_id": prompt_id, "number": number}
                row["seed"] = how.get("seed", settings.seed)
                row |= {"variant": name} if name else {}
                row |= {"made": {key: value for key, value in how.items() if key != "seed"}} if how else {}
                row |= {"selected": _selected(folder / file)} if settings.select is not None else {}
                yield row


def _selected(path: Path) -> dict[str, Any]:
    """What a picture says of its selection.

    Raises:
        UserError: nothing; it is none of ours, or was written by another program since.
    """
    try:
        with Image.open(path) as image:
            return dict(json.loads(image.info[PNG_KEY]))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} does not say how it was selected: delete it, and the same command makes it") from error


def _count(tally: defaultdict[str, Any], facts: Mapping[str, Any]) -> None:
    tally["pictures"] += 1
    for key in ("candidates", "finished", "evaluations", "evaluations_best_of_n", "reflections"):
        tally[key] += facts.get(key, 0)
    tally["unjudged"] += facts["score"] is None
    tally["score"] += facts["score"] or 0
    tally["revised"] += "sampled_prompt" in facts
    for question, number in facts["judged"].items():
        tally[f"judged_{question}"] += number


def _summary(tally: defaultdict[str, Any]) -> dict[str, Any]:
    pictures, judged = tally["pictures"], tally["pictures"] - tally["unjudged"]
    return {
        **{key: value for key, value in sorted(tally.items()) if key != "score"},
        "mean_score": tally["score"] / judged if judged else None,
        "evaluations_per_picture": tally["evaluations"] / pictures,
        "share_of_best_of_n": tally["evaluations"] / tally["evaluations_best_of_n"],
    }


def check_only(settings: Generate, names: Sequence[str], num_prompts: int) -> None:
    """Refuses files in `generate.only` that the command does not make.

    Raises:
        UserError: names the first.
    """
    for file in settings.only:
        found = FILE.fullmatch(file)
        if found is not None:
            prompt_id, number = int(found["prompt_id"]), int(found["number"])
            name = (Path(found["variant"] or "") / image_name(prompt_id, number)).as_posix()
            is_ours = name == file and (found["variant"] or "") in names
            if is_ours and prompt_id < num_prompts and number < settings.images_per_prompt:
                continue
        raise UserError(f"generate.only: {file} is no picture of this command: give `file` of rows of its manifest")
