"""Sweeps: what a section lists, refusals before training, reuse, lost runs, and one small sweep through the CLI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import api
from diffalign.cli import main
from diffalign.config import resolve
from diffalign.metrics import read_metrics
from diffalign.recipes import sweep as recipe
from diffalign.recipes.sweep._points import folder_name, settings_of
from diffalign.recipes.sweep._results import Judged, front_of, quantiles, standings
from diffalign.types import UserError

KEY = "objective.score_weights.sprites_sparse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, two scorers' scores and gold's pairs on an embedded model."""
    root = tmp_path_factory.mktemp("sweep")
    options: dict[str, Any] = {
        "configs": ["sprites-sdxl"],
        "generate": {"prompts": "sprites:train:8:two", "images_per_prompt": 3, "out": str(root / "images")},
        "score": {"images": str(root / "images"), "scorers": ["sprites_gold", "sprites_sparse"]},
        "label": {"scores": str(root / "images"), "scorer": "sprites_gold", "out": str(root / "pairs")},
        "sampling": {"num_steps": 3, "cfg_scale": 1.0, "batch_size": 8},
        "quiet": True,
    }
    for verb in (api.generate, api.score, api.label):
        verb(**options)
    return root


def words(folder: Path, out: str, *more: str) -> list[str]:
    """A command line; `more` says what varies."""
    return [
        *("sprites-sdxl", "diffusion-dpo", f"source.data.path={folder / 'pairs'}", f"sweep.out={folder / out}"),
        *(f"source.cache_dir={folder / 'cache'}", "source.holdout=0.3", "objective.beta=1000", "log.trackers=[]"),
        *("train.steps=2", "train.batch_size=4", "train.warmup_steps=0", "train.lr=1e-3", "train.validate_every=2"),
        *("train.checkpoint_every=1", "sampling.num_steps=2", "sampling.cfg_scale=1", "train.device=cpu"),
        *("evaluate.prompts=sprites:heldout:4:two", "evaluate.scorers=[sprites_gold,sprites_sparse]", *more),
    ]


@pytest.fixture(scope="module")
def swept(folder: Path) -> Path:
    assert main(["sweep", "--quiet", *words(folder, "front", f"sweep.key={KEY}", "sweep.values=[0,0.5]")]) == 0
    return folder / "front"


def test_the_results_say_what_every_setting_came_to(swept):
    results = json.loads((swept / "sweep.json").read_text())
    assert [row["name"] for row in results["settings"]] == ["sprites_sparse=0", "sprites_sparse=0.5"]
    assert results["settings"][1]["values"] == {KEY: 0.5}
    assert results["axes"] == ["sprites_gold", "sprites_sparse"] and results["failed"] == []
    assert set(results["front"]) <= {"base", "sprites_sparse=0", "sprites_sparse=0.5"} and results["front"]
    for row in results["settings"]:
        assert set(row["scorers"]) == {"sprites_gold", "sprites_sparse"}
        for of in row["scorers"].values():
            assert of["mean"]["num_groups"] == 4 and of["mean"]["se"] >= 0
            assert of["win"]["low"] <= of["win"]["rate"] <= of["win"]["high"]
            assert of["seed_sd"] is None
    assert set(results["quantiles"]) == {"sprites_gold", "sprites_sparse", "held-out accuracy"}
    assert results["facts"]["environment"]["versions"]["torch"]


def test_the_page_is_self_contained_and_names_the_points(swept):
    page = (swept / "report.html").read_text()
    assert "sprites_sparse=0.5" in page and "Pareto" not in page and "On the front" in page
    assert page.count("<svg") == 6  # the front, a mean and a win rate per scorer, held-out accuracy
    assert "src=" not in page and "<link" not in page and "<script" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    root = ElementTree.parse(swept / "front.svg").getroot()
    texts = {element.text for element in root.iter() if element.tag.endswith("text")}
    assert {"base", "sprites_gold (mean)", "sprites_sparse (mean)"} <= texts
    assert (swept / "front.svg").stat().st_size < 50_000


def test_every_run_is_the_ordinary_run(folder, swept):
    """Bit for bit what `train` does with the same settings."""
    plain = [word for word in words(folder, "") if not word.startswith("sweep.")]
    api.train(configs=[*plain, f"{KEY}=0.5", f"train.out={folder / 'plain'}"], quiet=True)
    (run,) = [path for path in (swept / "runs").iterdir() if "0.5" in path.name]
    assert [row["loss"] for row in read_metrics(run)] == [row["loss"] for row in read_metrics(folder / "plain")]
    # tensors, not bytes: safetensors writes several metadata keys in any order
    ours, theirs = (load_file(path / "export" / "pytorch_lora_weights.safetensors") for path in (run, folder / "plain"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_finished_runs_are_reused_and_new_ones_added(folder, swept, monkeypatch):
    before = json.loads((swept / "sweep.json").read_text())
    trained, train = [], recipe.train
    monkeypatch.setattr(recipe, "train", lambda run, **options: trained.append(run) or train(run, **options))
    again = api.sweep(configs=words(folder, "front", f"sweep.key={KEY}", "sweep.values=[0,0.5]"), quiet=True)
    assert trained == []
    assert again.results["settings"] == before["settings"] and again.results["base"] == before["base"]
    api.sweep(configs=words(folder, "front", f"sweep.key={KEY}", "sweep.values=[0,0.5,0.25]"), quiet=True)
    assert [run.objective.score_weights for run in trained] == [{"sprites_sparse": 0.25}]
    # another base config has no business here
    with pytest.raises(UserError, match="train.steps: 2 -> 3"):
        api.sweep(configs=words(folder, "front", "sweep.key=train.lr", "sweep.values=[1]", "train.steps=3"), quiet=True)


def test_a_run_that_fails_is_reported_and_the_others_go_on(folder, capsys):
    points = "sweep.points=[{train.lr: 1.0e+30}, {train.lr: 2.0e-3}]"
    assert main(["sweep", "--quiet", *words(folder, "lost", points)]) == 1
    error = capsys.readouterr().err
    assert "lr=1e+30, seed 0 failed: FloatingPointError" in error and "1 runs failed" in error
    results = json.loads((folder / "lost" / "sweep.json").read_text())
    assert [row["name"] for row in results["settings"]] == ["lr=0.002"]
    assert results["failed"][0]["name"] == "lr=1e+30"
    assert "failed: FloatingPointError" in (folder / "lost" / "report.html").read_text()
    (trace,) = (folder / "lost" / "failures").iterdir()
    assert "Traceback" in trace.read_text()


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "sweep.key is missing"),
        (["sweep.key=objective.beta"], "sweep.values is missing"),
        (["sweep.values=[1]"], "sweep.key is missing"),
        (["sweep.key=objective.bta", "sweep.values=[1]"], "unknown key objective.bta"),
        (["sweep.key=objectiv.beta", "sweep.values=[1]"], "unknown section 'objectiv'"),
        (["sweep.key=objective.beta", "sweep.values=[1,-2]"], "objective.beta must be positive (got -2"),
        (["sweep.key=objective.beta", "sweep.values=[1,fast]"], "objective.beta: "),
        (["sweep.key=objective.beta", "sweep.values=[5,5.0]"], "beta=5.0 (objective.beta): it is the same run"),
        (["sweep.key=sampling.cfg_scale", "sweep.values=[1,2]"], "sampling cannot vary in a sweep"),
        (["sweep.key=train.seed", "sweep.values=[1,2]"], "train.seed cannot vary in a sweep: give sweep.seeds"),
        (["sweep.key=model.path", "sweep.values=[other]"], "model.path cannot vary"),
        ([f"sweep.key={KEY}", "sweep.values=[0.5,1.0]"], "objective.score_weights must add to less than 1"),
        (["sweep.key=objective.score_weights.pickscore", "sweep.values=[0.5]"], "'pickscore', but a record has"),
        (["sweep.grid={objective.beta: []}"], "sweep.grid: objective.beta has no values"),
        (["sweep.points=[{}]"], "sweep.points holds an empty setting"),
        (["sweep.key=train.lr", "sweep.values=[1]", "sweep.points=[{train.lr: 1}]"], "give one of them"),
        (["sweep.key=train.lr", "sweep.values=[1]", "sweep.axes=[sprites_gold]"], "sweep.axes must be two"),
        (
            ["sweep.key=train.lr", "sweep.values=[1]", "sweep.axes=[sprites_gold,clip]"],
            "'clip_score' is not in evaluate.sc",
        ),
        (["sweep.key=train.lr", "sweep.values=[1]", "sweep.seeds=[1,1]"], "sweep.seeds must differ"),
        (["sweep.key=train.lr", "sweep.values=[1]", "evaluate.adapters=[x]"], "evaluate.adapters has no meaning"),
        (["sweep.key=train.lr", "sweep.values=[1]", "train.out=x"], "train.out has no meaning"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(folder, capsys, more, message):
    assert main(["sweep", "--quiet", *words(folder, "refused", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (folder / "refused").exists()


def test_grids_points_and_seeds(folder):
    grid = resolve(words(folder, "x", "sweep.grid={objective.beta: [10, 20], train.lr: [1e-3, 2e-3]}"))
    settings = settings_of(grid, Path("out"))
    assert [s.name for s in settings] == [f"beta={b}, lr={lr}" for b in (10, 20) for lr in ("1e-3", "2e-3")]
    assert settings[3].values == {"objective.beta": 20.0, "train.lr": 0.002}
    both = "sweep.points=[{objective.name: mapo, train.lr: 1e-4}, {objective.beta: 3}]"
    first, second = settings_of(resolve(words(folder, "x", both, "sweep.seeds=[3,4]")), Path("out"))
    assert [run.train.seed for run in first.runs.values()] == [3, 4]
    assert first.runs[3].names["objective"] == "mapo" and second.values["objective.name"] == "pair"
    assert len({run.train.out for setting in (first, second) for run in setting.runs.values()}) == 4


def test_folder_names_are_safe_and_differ():
    assert folder_name("beta=10, lr=1e-3", 0) == "beta-10,lr-1e-3-seed0"
    names = [folder_name(name, 0) for name in ("a=x/y", "a=x:y", 'a={"b": 1}', "a=" + "long" * 40, "a=" + "long" * 41)]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 90 for name in names)


def test_several_seeds_are_pooled_over_the_same_prompts():
    rng = np.random.default_rng(0)
    base, prompts = {"s": rng.normal(size=30)}, [f"prompt {i // 2}" for i in range(30)]
    runs = [Judged(seed, "", {"s": base["s"] + shift}, {}) for seed, shift in ((0, 0.5), (1, 1.5))]
    table = standings({"two": runs, "one": runs[:1]}, base, prompts, seed=0)
    two, one = table["two"]["s"], table["one"]["s"]
    assert two.difference.mean == pytest.approx(1.0) and two.win.rate == 1.0
    assert two.mean.num == 60 and two.mean.num_groups == one.mean.num_groups == 15
    assert two.mean.se == pytest.approx(one.mean.se)  # more seeds are no more prompts
    assert two.seed_means == pytest.approx({"0": base["s"].mean() + 0.5, "1": base["s"].mean() + 1.5})
    assert two.seed_sd == pytest.approx(np.sqrt(0.5)) and one.seed_sd is None
    assert two.p_holm >= two.win.p_value


def test_the_base_is_a_point_of_the_front():
    points = {"base": (0.5, 0.5), "better": (0.6, 0.7), "trade": (0.9, 0.1), "worse": (0.4, 0.7)}
    found = front_of(points, "base")
    assert found["front"] == ["better", "trade"]
    assert found["hypervolume"] == pytest.approx(0.1 * 0.2)
    assert [row["best"] for row in found["scalarised"]][::10] == ["better", "trade"]
    assert "base" in front_of({"base": (1, 0), "other": (0, 1)}, "base")["front"]


def test_quantiles_are_over_settings():
    assert quantiles({"a": [3, 1, 2], "b": []}) == {"a": {"min": 1, "q25": 1.5, "median": 2, "q75": 2.5, "max": 3}}
