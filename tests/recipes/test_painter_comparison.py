"""Comparisons on the embedded model: pictures, scores, cancelling, and what is left on disk."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffalign import checkpoint
from diffalign.config import resolve
from diffalign.recipes.generate._manifest import read_manifest
from diffalign.recipes.painter._comparison import Comparison, difference
from diffalign.recipes.painter._studio import Studio
from diffalign.recipes.painter._written import write
from diffalign.types import ScorerInfo, UserError

RED, BLUE = "a small red circle on a dark background", "a large blue square on a light background"


@dataclass
class Moody:
    """Counts what it is asked; refuses blue, and breaks where it is told to."""

    mood: str = "fair"
    asked: ClassVar[list[str]] = []
    info: ClassVar[ScorerInfo] = ScorerInfo("moody", "1", ("image", "prompt"), "grey level", (0.0, 255.0))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        if self.mood == "broken":
            raise RuntimeError("out of order")
        if any("blue" in prompt for prompt in prompts):
            raise ValueError("blue is nothing I judge")
        self.asked.extend(prompts)
        return np.array([np.asarray(image).mean() for image in images])


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The embedded model, an adapter of it and a checkpoint of a run."""
    root = tmp_path_factory.mktemp("studio")
    config = resolve(["sprites-sdxl", {"generate": {"device": "cpu"}}])
    run, model = root / "run", config.model.load()
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.export(run / "export")
    weights = checkpoint.as_tensors(model.state_dict_trainable())
    for step in (1, 2):
        checkpoint.save(run, checkpoint.Checkpoint(step, weights, {}, {}, {}), "mark", keep=2)
    (run / "config.yaml").write_text(yaml.safe_dump({**config.to_dict(("model",)), "train": {}}))
    scorers = ["sprites_gold", {"name": "test_painter_comparison:Moody", "as": "moody"}]
    broken = {"name": "test_painter_comparison:Moody", "as": "broken", "mood": "broken"}
    told = resolve(["sprites-sdxl", {"generate": {"device": "cpu"}, "score": {"scorers": [*scorers, broken]}}])
    return Studio(told, root / "app", [root], lambda path: Path(path))


def compared(studio: Studio, **view: Any) -> Comparison:
    asked = {"contestants": ["sprites-sdxl", "run"], "prompts": [RED, BLUE], "steps": 3, "cfg": 1.0, **view}
    comparison = studio.start(studio.view(asked))
    assert comparison.wait(300)
    return comparison


def near(left: Image.Image, right: Image.Image) -> bool:
    """Up to the rounding of another batch."""
    return np.abs(np.asarray(left, int) - np.asarray(right, int)).max() <= 1


@pytest.fixture(scope="module")
def done(studio: Studio) -> Comparison:
    return compared(studio, scorers=["sprites_gold", "moody", "broken", "os:system"])


def test_every_picture_and_score_is_there(done: Comparison) -> None:
    assert (done.stage, done.error, done.share) == ("done", None, 1.0)
    assert len(done.pictures) == done.total == 8
    assert all(isinstance(score, float) for score in done.scores["sprites_gold"].values())
    answers = done.scores["moody"]
    assert all(isinstance(answer, float) == (cell[1] == 0) for cell, answer in answers.items())
    assert answers[0, 1, 0] == "blue is nothing I judge"
    assert done.failed["broken"] == "out of order"
    assert "no scorer is called" in done.failed["os:system"]  # names of a link are looked up, never imported
    of_row = {cell: answers[cell] for cell in ((0, 0, 0), (1, 0, 0))}
    assert max(of_row, key=lambda cell: of_row[cell]) in done.best("moody")


def test_nothing_is_scored_twice(studio: Studio, done: Comparison) -> None:
    before = len(Moody.asked)
    assert compared(studio, scorers=["moody"]).scores["moody"] == done.scores["moody"]
    assert len(Moody.asked) == before


def test_rows_and_headings_turn_where_seeds_are_columns(studio: Studio, done: Comparison) -> None:
    assert done.headings() == ["sprites-sdxl", "run"]
    assert [label for label, _ in done.rows()] == ["seed 0", "seed 1"] * 2
    turned = compared(studio, vary="seeds", prompts=[RED])
    assert turned.headings() == ["seed 0", "seed 1"]
    assert list(turned.rows()) == [("sprites-sdxl", [(0, 0, 0), (0, 0, 1)]), ("run", [(1, 0, 0), (1, 0, 1)])]
    assert near(turned.picture((1, 0, 1)), done.picture((1, 0, 1)))


def test_a_checkpoint_is_exported_once_and_paints_what_was_trained(studio: Studio, done: Comparison) -> None:
    first, second = (compared(studio, contestants=["run:1"], prompts=[RED]) for _ in range(2))
    assert first.picture((0, 0, 0)).tobytes() == second.picture((0, 0, 0)).tobytes()
    assert len(list((studio.folder / "exports").iterdir())) == 1
    assert near(first.picture((0, 0, 0)), done.picture((1, 0, 0)))


def test_generate_remakes_what_was_kept_bit_for_bit(studio: Studio, done: Comparison, tmp_path: Path) -> None:
    folder = write(done, tmp_path / "kept")
    rows = list(read_manifest(folder))
    assert [row["prompt"] for row in rows] == [RED] * 4 + [BLUE] * 4
    assert {row["variant"] for row in rows} == {"sprites-sdxl", "run"}
    scored = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    skipped = [json.loads(line) for line in (folder / "scores.skipped.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in scored] == [RED] * 4 and [row["prompt"] for row in skipped] == [BLUE] * 4
    assert set(scored[0]["scores"]) == {"sprites_gold", "moody"}
    assert Image.open(folder / "grid.png").width > 2 * 128
    command = (folder / "README.txt").read_text().split("\n\n")[1].split()
    assert command[0] == "diffalign"
    subprocess.run([sys.executable, "-m", *command], cwd=folder, check=True, capture_output=True)
    for row in rows:
        assert (folder / "again" / row["file"]).read_bytes() == (folder / row["file"]).read_bytes()
    again = {row["file"]: row["made"] for row in read_manifest(folder / "again")}
    assert again == {row["file"]: row["made"] for row in rows}
    with pytest.raises(UserError, match="nothing was overwritten"):
        write(done, folder)


def test_an_archive_holds_the_folder(studio: Studio, done: Comparison) -> None:
    with zipfile.ZipFile(studio.archive(done)) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    assert {"config.yaml", "README.txt", "manifest.jsonl", "scores.jsonl", "grid.png", "prompts.jsonl"} <= names
    assert sum(name.endswith(".png") for name in names) == 9


def test_cancelled_in_the_middle_of_sampling_it_keeps_what_is_there(studio: Studio, tmp_path: Path) -> None:
    asked = {"contestants": ["sprites-sdxl", "run"], "prompts": [RED], "cfg": 1.0, "steps": 60, "seeds": "0"}
    comparison = studio.start(studio.view(asked))
    while not comparison.pictures:
        assert not comparison.wait(0.02)
    comparison.stop()
    assert comparison.wait(30)
    assert (comparison.stage, comparison.error, len(comparison.pictures)) == ("cancelled", None, 1)
    folder = write(comparison, tmp_path / "part")
    assert [row["variant"] for row in read_manifest(folder)] == ["sprites-sdxl"]
    assert list(json.loads((folder / "run.json").read_text())["made"]) == ["sprites-sdxl"]
    never = studio.start(studio.view(asked))
    never.stop()
    assert never.wait(30)
    if not never.pictures:
        with pytest.raises(UserError, match="no pictures yet"):
            write(never, tmp_path / "nothing")


def test_what_goes_wrong_is_told_and_pictures_stay(studio: Studio) -> None:
    comparison = compared(studio, prompts=[RED], sampler="flow-euler")
    assert comparison.stage == "failed"
    assert isinstance(comparison.error, UserError) and "does not fit this model" in str(comparison.error)


def test_pictures_go_with_their_comparison(studio: Studio) -> None:
    comparison = compared(studio, prompts=[RED], seeds="0", contestants=["sprites-sdxl"])
    folder = comparison.folder
    assert folder.is_dir()
    del comparison
    gc.collect()
    assert not folder.exists()


def test_saved_comparisons_are_never_overwritten(studio: Studio, done: Comparison) -> None:
    assert len({studio.save(done) for _ in range(2)}) == 2


def test_prompts_of_sets_and_files_are_bounded(studio: Studio, tmp_path: Path) -> None:
    assert len(studio.prompts_of("smoke", 3)) == 3
    for name, num in (("smoke", 0), ("smoke", 100_000), ("/etc/passwd", 1)):
        with pytest.raises(UserError, match="choose a set"):
            studio.prompts_of(name, num)
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"two\nlines {index}"}) + "\n" for index in range(1000)))
    assert studio.prompts_in(file)[0] == "two lines 0"
    assert len(studio.prompts_in(file)) == studio.config.app.max_pictures
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        studio.prompts_in(file)


def test_a_difference_is_what_it_says() -> None:
    left = Image.new("RGB", (4, 2), (10, 20, 30))
    right = left.copy()
    right.putpixel((0, 0), (14, 20, 30))
    image, mean, gain = difference(left, right)
    assert mean == pytest.approx(4 / (4 * 2 * 3))
    assert gain == 16 and image.getpixel((0, 0)) == (64, 0, 0) and image.getpixel((1, 1)) == (0, 0, 0)
    assert difference(left, left)[1] == 0
    assert difference(Image.new("RGB", (1, 1), "white"), Image.new("RGB", (1, 1)))[1:] == (255.0, 1)
    with pytest.raises(UserError, match="4 x 2 and 1 x 1"):
        difference(left, Image.new("RGB", (1, 1)))
