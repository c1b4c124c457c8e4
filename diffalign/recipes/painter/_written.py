"""A comparison as files: a folder as `generate` and `score` would have made it, or a zip of one."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from diffalign._atomic import write_atomic
from diffalign._json import to_json, write_json
from diffalign.recipes import _run
from diffalign.recipes._judging import open_image
from diffalign.recipes.generate._manifest import read_manifest, write_manifest
from diffalign.recipes.generate._prompts import digest
from diffalign.recipes.painter._comparison import Comparison
from diffalign.report import image_grid
from diffalign.types import UserError

COMMAND = "diffalign generate config.yaml generate.out=again"  # in the folder: the pictures anew
GRID_SIDE = 256  # pixels of a picture in grid.png, at most
HEADING = 22  # pixels


def write(comparison: Comparison, folder: Path) -> Path:
    """Copies what is there to a new folder, as `generate` would have made it, with scores and grid.png.

    Raises:
        UserError: there are no pictures, or the folder exists.
    """
    if not comparison.pictures:
        raise UserError("there are no pictures yet: compare first")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another name (nothing was overwritten)")
    writing = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        _write(comparison, writing)
        writing.rename(folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


def archive(comparison: Comparison, path: Path) -> Path:
    """`write` as one zip file."""
    with tempfile.TemporaryDirectory(prefix="diffalign-compare-") as temporary:
        folder = write(comparison, Path(temporary) / "comparison")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:  # PNG is compressed
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                out.write(file, f"{path.stem}/{file.relative_to(folder).as_posix()}")
    return path


def _write(comparison: Comparison, folder: Path) -> None:
    plan, there = comparison.plan, dict(comparison.pictures)
    for cell, path in there.items():
        target = folder / comparison.file(cell)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    settings = plan.config.generate
    if len(there) < comparison.total:  # cancelled: the same command makes the rest
        settings = replace(settings, only=tuple(comparison.file(cell) for cell in there))
    made = {column.variant.name: comparison.made.get(column.variant.name, {}) for column in plan.columns}
    write_manifest(folder, plan.prompts, settings, made)
    rows = "".join(to_json({"prompt": prompt}) + "\n" for prompt in plan.prompts)
    write_atomic(folder / "prompts.jsonl", rows)
    resolved = plan.config.to_dict(("model", "sampling", "generate"))
    write_atomic(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    device = plan.config.generate.device
    facts = {"made": comparison.made, "prompts": len(plan.prompts), "prompts_digest": digest(plan.prompts)}
    write_json(folder / "run.json", _run.environment(device) | facts)
    command = "cd into this folder; these are the same pictures, made anew:\n\n    " + COMMAND + "\n"
    write_atomic(folder / "README.txt", command)
    _write_scores(comparison, folder)
    _write_grid(comparison, folder / "grid.png")


def _write_scores(comparison: Comparison, folder: Path) -> None:
    """scores.jsonl and scores.skipped.jsonl, as `score` writes them."""
    if not comparison.scores:
        return
    of_file = {comparison.file(cell): cell for cell in comparison.pictures}
    kept: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for row in read_manifest(folder):
        answers = {name: of.get(of_file[row["file"]], "not judged") for name, of in comparison.scores.items()}
        numbers = {name: answer for name, answer in answers.items() if not isinstance(answer, str)}
        reasons = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
        row["scores"] = numbers
        (skipped if reasons else kept).append(row | ({"reasons": reasons} if reasons else {}))
    for name, rows in (("scores.jsonl", kept), ("scores.skipped.jsonl", skipped)):
        if rows:
            write_atomic(folder / name, "".join(to_json(row) + "\n" for row in rows))


def _write_grid(comparison: Comparison, path: Path) -> None:
    """All pictures as one, each at most 256 pixels high and wide, with the columns' names above."""
    headings, rows = comparison.headings(), list(comparison.rows())
    blank = Image.new("RGB", open_image(next(iter(comparison.pictures.values()))).size, "white")
    images, labels = [], []
    for label, cells in rows:
        labels.append(f"{label}: {comparison.plan.prompts[cells[0][1]]}")
        for cell in cells:
            image = open_image(comparison.pictures[cell]) if cell in comparison.pictures else blank.copy()
            image.thumbnail((GRID_SIDE, GRID_SIDE))
            images.append(image)
    image_grid(images, len(rows), len(headings), labels, path)
    grid = Image.open(path).convert("RGB")
    canvas = Image.new("RGB", (grid.width, grid.height + HEADING), "white")
    canvas.paste(grid, (0, HEADING))
    draw, width = ImageDraw.Draw(canvas), (grid.width - 4) / len(headings)
    font = ImageFont.load_default(14)
    for index, heading in enumerate(headings):
        left = round(4 + index * width)
        while heading and left + draw.textlength(heading, font) > 4 + (index + 1) * width:
            heading = heading[:-1]
        draw.text((left, 4), heading, fill="black", font=font)
    canvas.save(path)
