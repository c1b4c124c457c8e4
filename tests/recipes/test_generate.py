"""Pictures at scale: variants, kills, processes, single rows, and what a folder refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign._json import read_json
from diffalign.config import resolve
from diffalign.recipes import generate as recipe
from diffalign.recipes.generate import generate
from diffalign.recipes.generate._manifest import image_name, read_manifest
from diffalign.registry import find
from diffalign.types import ScorerInfo, UserError

PROMPTS = ("a thing", "another thing", "a third thing")
ALL = [{"as": "plain"}, {"sampling": {"num_steps": 3, "eta": 0.5}}, {"seed": 7}]
NAMES = ["plain", "num_steps3-eta0.5", "seed7"]


@dataclass
class Bright:
    """Mean brightness, read from the pixels."""

    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image",), "grey level", (0.0, 1.0))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.array([np.asarray(image).mean() / 255 for image in images])


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight pipeline on disk."""
    family: Any = find("model", "sd15")
    return family.family.build_tiny(tmp_path_factory.mktemp("twin") / "sd15", seed=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def made(twin: Path, prompts: Path, tmp_path: Path) -> Callable[..., Path]:
    """made(name, generate keys) -> a folder."""

    def run(name: str, num_steps: int = 2, **settings: Any) -> Path:
        values = {"prompts": str(prompts), "out": str(tmp_path / name), "images_per_prompt": 2, "device": "cpu"}
        model = {"name": "sd15", "path": str(twin), "dtype": "float32"}
        sampling = {"num_steps": num_steps, "cfg_scale": 2.0, "batch_size": 4}
        return generate(resolve([{"model": model, "sampling": sampling, "generate": values | settings}]), quiet=True)

    return run


@dataclass
class Alone:
    """One process of several, as far as this recipe can see; the others run before or after."""

    rank: int
    size: int
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None: ...

    def close(self) -> None: ...


def content(folder: Path) -> dict[str, bytes]:
    """All files but run.json, which has the time of day, and config.yaml, which names the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", "config.yaml")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def die_after(pictures: int) -> None:
    """This process ends in the middle of writing a picture, after so many whole ones."""
    original, left = Image.Image.save, [pictures]

    def save(image: Image.Image, path: Any, **options: Any) -> None:
        if not left[0]:
            Path(path).write_bytes(b"half a picture")
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        original(image, path, **options)

    Image.Image.save = save  # type: ignore[method-assign, assignment]


def selecting(**more: Any) -> dict[str, Any]:
    return {"scorers": [{"name": "test_generate:Bright"}], "candidates": 3, **more}


def test_rows_of_all_variants_are_neighbours_and_say_how_they_were_made(made):
    folder = made("out", vary=ALL)
    rows = list(read_manifest(folder))
    expected = [(p, name, k) for p in range(3) for name in NAMES for k in range(2)]
    assert [(row["prompt_id"], row["variant"], row["number"]) for row in rows] == expected
    assert all((folder / row["file"]).is_file() for row in rows) and len(rows) == 18
    assert rows[0]["file"] == "plain/00000/0000000-000.png" and rows[0]["prompt"] == "a thing"
    assert [row["seed"] for row in rows[:6:2]] == [0, 0, 7]
    assert [row["made"]["sampling"]["num_steps"] for row in rows[:6:2]] == [2, 3, 2]
    assert rows[0]["made"]["resolution"] == [32, 32] and set(rows[0]["made"]["fingerprints"]) == {
        "denoiser",
        "text",
        "vae",
    }
    assert len({(folder / row["file"]).read_bytes() for row in rows}) == 18
    plain = made("plain")
    assert content(plain)["00000/0000001-001.png"] == content(folder)["plain/00000/0000001-001.png"]
    assert all(
        "variant" not in row and row["file"] == image_name(row["prompt_id"], row["number"])
        for row in read_manifest(plain)
    )


@pytest.mark.parametrize("how", [{"vary": ALL[:2]}, selecting(select="best-of-n"), selecting(select="parm")])
def test_sigkill_anywhere_then_the_same_command_gives_the_same_bytes(made, how):
    whole = content(made("whole", **how))
    for survives in (1, 4):
        child = os.fork()
        if child == 0:
            die_after(survives)
            try:
                made(f"killed-{survives}", **how)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        resumed = made(f"killed-{survives}", **how)
        assert content(resumed) == whole


@pytest.mark.parametrize("how", [{"vary": ALL[:2]}, selecting(select="parm")])
def test_two_processes_make_what_one_makes(made, monkeypatch, how):
    one = made("one", **how)
    for rank in (1, 0):
        monkeypatch.setattr(recipe, "World", lambda *_, rank=rank: Alone(rank, 2))
        two = made("two", **how)
        if rank == 1:
            assert 0 < len(content(two)) < len(content(one))
    assert content(two) == content(one)


def test_a_row_alone_is_the_same_file(made):
    folder = made("out", vary=ALL[:2])
    rows = list(read_manifest(folder))
    wanted = [rows[1]["file"], rows[6]["file"]]
    again = made("again", vary=ALL[:2], only=wanted)
    assert content(again).keys() == {*wanted, "manifest.jsonl"}
    assert all(content(again)[file] == content(folder)[file] for file in wanted)
    assert list(read_manifest(again)) == [rows[1], rows[6]]
    how = {"generate": {"out": f"{again}-by-config", "only": wanted}}
    by_config = generate(resolve([str(folder / "config.yaml"), how]), quiet=True)
    assert content(by_config) == content(again)


def test_another_batch_moves_a_picture_by_rounding_alone(made, prompts):
    folder = made("out")
    prompts.write_text(PROMPTS[2] + "\n")  # one prompt, so other neighbours
    alone = made("alone")
    for k in range(2):
        a, b = (np.asarray(Image.open(f / image_name(p, k))).astype(int) for f, p in ((folder, 2), (alone, 0)))
        assert np.abs(a - b).max() <= 1


def test_a_selected_picture_is_a_plain_one_of_its_number(made):
    folder = made("best", select="best-of-n", **selecting())
    assert read_json(folder / "selection.json")["share_of_best_of_n"] == 1
    plain = made("plain", images_per_prompt=6)
    for row in read_manifest(folder):
        chosen = np.asarray(Image.open(folder / row["file"])).astype(int)
        candidate = np.asarray(Image.open(plain / image_name(row["prompt_id"], row["selected"]["candidate"])))
        assert np.abs(chosen - candidate).max() <= 1
        numbers = [row["number"] + 2 * c for c in range(3)]
        grey = [np.asarray(Image.open(plain / image_name(row["prompt_id"], number))).mean() for number in numbers]
        assert row["selected"]["score"] == pytest.approx(max(grey) / 255, abs=1 / 255)


def test_selection_of_one_gives_the_pixels_of_plain_generation(made):
    plain, one = made("plain"), made("one", select="best-of-n", **selecting(candidates=1))
    for row in read_manifest(plain):
        a, b = (np.asarray(Image.open(folder / row["file"])) for folder in (plain, one))
        assert (a == b).all()


def test_selection_is_summed_up(made):
    folder = made("parm", num_steps=4, **selecting(select={"name": "parm", "keep": [0.3]}))
    summary = read_json(folder / "selection.json")
    rows = [row["selected"] for row in read_manifest(folder)]
    assert summary["pictures"] == len(rows) == 6 and summary["candidates"] == 18
    assert summary["evaluations"] == sum(row["evaluations"] for row in rows) == 6 * 2 * (3 * 2 + 1 * 2)
    assert summary["evaluations_best_of_n"] == 6 * 2 * 3 * 4
    assert summary["judged_potential"] == 18 and summary["judged_outcome"] == 6 and summary["unjudged"] == 0


# Resuming, and refusing


def test_a_finished_folder_loads_no_model_again(made, monkeypatch):
    folder = made("out")
    before = content(folder)
    monkeypatch.setattr(recipe, "load_for_images", lambda *_: pytest.fail("nothing is missing"))
    assert content(made("out")) == before


def test_weights_that_changed_under_the_folder_are_refused(made, twin):
    folder = made("out")
    (folder / image_name(0, 0)).unlink()
    facts = read_json(folder / "run.json")
    facts["made"][""]["fingerprints"]["denoiser"] = "of other weights"
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="fingerprints changed since .* began"):
        made("out")


def test_other_prompts_of_the_same_number_are_refused(made, prompts):
    made("out")
    prompts.write_text("x\ny\nz\n")
    with pytest.raises(UserError, match="the prompts changed"):
        made("out")


def test_an_older_folder_without_the_new_facts_goes_on(made):
    folder = made("out")
    old = {key: value for key, value in read_json(folder / "run.json").items() if key not in ("made", "prompts_digest")}
    (folder / "run.json").write_text(json.dumps(old))
    before = content(folder)
    (folder / image_name(1, 0)).unlink()
    assert content(made("out")) == before


def test_a_selected_picture_that_lost_its_facts_is_named(made):
    folder = made("best", select="best-of-n", **selecting())
    file = folder / image_name(1, 1)
    Image.open(file).copy().save(file)
    with pytest.raises(UserError, match=r"0000001-001\.png does not say how it was selected"):
        made("best", select="best-of-n", **selecting())


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"vary": [{"adaptor": "x"}]}, r"generate\.vary\[0\]\.adaptor.*Did you mean 'adapter'"),
        ({"vary": [{}, {}]}, r"two variants are called 'base'"),
        ({"vary": [{"as": "../x"}]}, r"generate\.vary\[0\]\.as='\.\./x'"),
        ({"vary": [{}, {"sampling": {"stepz": 3}}]}, r"generate\.vary\[1\]: unknown key sampling\.stepz"),
        ({"vary": [{"model": "sprites-sd4"}]}, r"generate\.vary\[0\]: no config named 'sprites-sd4'"),
        ({"only": ["00000/0000003-000.png"]}, r"generate\.only: 00000/0000003-000\.png is no picture"),
        ({"only": ["00000/0000000-002.png"]}, "is no picture of this command"),
        ({"only": ["x/00000/0000000-000.png"]}, "is no picture of this command"),
        ({"images_per_prompt": 0}, r"generate\.images_per_prompt must be at least 1"),
        (selecting(select={"name": "parm", "checks": [0.9]}), r"generate\.select\.checks=\[0\.9\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(made, monkeypatch, tmp_path, settings, match):
    monkeypatch.setattr(recipe, "load_for_images", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=match):
        made("out", **settings)
    assert not (tmp_path / "out").exists()
