"""What may be compared: views as links and as variants, and what is found on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml

from diffalign.config import Config, resolve
from diffalign.recipes.generate._manifest import check_only
from diffalign.recipes.painter._found import Contestant, contestants
from diffalign.recipes.painter._plan import Plan, first_view, plan
from diffalign.recipes.painter._view import MAX_LINK, View
from diffalign.types import UserError

FOUND = {
    "base": Contestant("base", {"adapter": None}),
    "run": Contestant("run", {"adapter": "runs/x/export"}),
    "fixed": Contestant("fixed", {"adapter": "runs/x/export", "sampling": {"sampler": "ddpm", "num_steps": 9}}),
}


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve(["sprites-sdxl", {"generate": {"select": "best-of-n", "scorers": ["sprites_gold"]}}])


def planned(config: Config, tmp_path: Path, limit: int = 100, found: Any = FOUND, **view: Any) -> Plan:
    def below(path: str) -> Path:
        raise UserError(f"{path} is not below the folders")

    asked = View.of({"contestants": ["base"], "prompts": ["a thing"], "seeds": "0", **view})
    return plan(asked, config, found, exports=tmp_path / "exports", below=below, limit=limit)


def details(made: Plan) -> list[tuple[str, str]]:
    return [(column.contestant, column.detail) for column in made.columns]


# Views and links


@pytest.mark.parametrize(
    "view",
    [
        View(),
        View(contestants=("a", "b/c@0.5"), prompts=("1 < 2 & 3", "naïve \U0001f600 + %20", '"=#?'), seeds="0,5-7"),
        View(steps=7, cfg=1.23456789, sampler="ddim", eta=0.25, scorers=("x", "y"), vary="cfg", values="1, 2.5"),
        View(vary="user", values="ann:0.7+bob:0.3, ann..bob"),
    ],
)
def test_a_link_makes_its_view_again(view: View) -> None:
    assert View.from_link(parse_qsl(view.link(), keep_blank_values=True)) == view


@pytest.mark.parametrize(
    "link, told",
    [
        ("evil=1", "unknown word 'evil'"),
        ("contestants=a", "unknown word 'contestants'"),
        ("steps=1&steps=2", "steps is there twice"),
        ("steps=0", "steps must lie in 1 to 1000"),
        ("steps=many", "compare.steps"),
        ("cfg=nan", "cfg must lie in"),
        ("cfg=1e400", "cfg must lie in"),
        ("sampler=__import__", "unknown sampler"),
        ("seeds=3-1", "seeds='3-1'"),
        ("seeds=-1", "seeds"),
        ("seeds=0-99999", "seeds"),
        ("seeds=,", "seeds: give one or more"),
        ("vary=everything", "compare.vary"),
        ("vary=steps", "values: give one or more"),
        ("vary=steps&values=2.5", "no whole number"),
        ("vary=cfg&values=a", "'a' is no number"),
        ("vary=strength&values=11", "strength must lie in -10 to 10"),
        ("vary=user&values=ann:x", "'x' is no number"),
        ("p=" + "x" * 20_001, "one has 20001 characters"),
    ],
)
def test_links_are_checked_as_any_input(link: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        View.from_link(parse_qsl(link, keep_blank_values=True))


def test_a_link_that_browsers_would_cut_is_refused() -> None:
    assert len(View(prompts=("x" * (MAX_LINK - 100),)).link()) <= MAX_LINK
    with pytest.raises(UserError, match="download the comparison"):
        View(prompts=("x" * MAX_LINK,)).link()


def test_seeds_and_users_are_read_as_written() -> None:
    assert View(seeds=" 5, 0-2,1 ").numbers() == [0, 1, 2, 5]
    users = [keys["user"] for _, keys in View(vary="user", values="ann, ann:0.7+bob:0.3, ann..bob").variations()]
    assert users[:2] == ["ann", {"ann": 0.7, "bob": 0.3}]
    mixtures = [{"ann": 1.0}, {"ann": 0.75, "bob": 0.25}, {"ann": 0.5, "bob": 0.5}, {"ann": 0.25, "bob": 0.75}]
    assert users[2:] == [*mixtures, {"bob": 1.0}]
    assert [keys for _, keys in View(vary="steps", values="5,5,10").variations()] == [
        {"sampling": {"num_steps": 5}},
        {"sampling": {"num_steps": 10}},
    ]


# Plans


def test_columns_are_contestants_times_what_varies(config: Config, tmp_path: Path) -> None:
    made = planned(config, tmp_path, contestants=["base", "run@0.5", "run"], vary="cfg", values="1,3", steps=9)
    assert details(made) == [(name, f"cfg {v}") for name in ("base", "run@0.5", "run") for v in (1, 3)]
    configs = [column.variant.config for column in made.columns]
    assert [each.sampling.cfg_scale for each in configs] == [1.0, 3.0] * 3
    assert [each.generate.adapter_scale for each in configs] == [1.0, 1.0, 0.5, 0.5, 1.0, 1.0]
    assert {each.sampling.num_steps for each in configs} == {9}
    assert all(each.generate.select is None for each in configs)
    assert len({column.variant.name.lower() for column in made.columns}) == 6


def test_what_cannot_vary_makes_one_column(config: Config, tmp_path: Path) -> None:
    made = planned(config, tmp_path, contestants=["base", "run", "run@0.5"], vary="strength", values="0,1")
    assert details(made) == [("base", ""), ("run", "strength 0"), ("run", "strength 1")]
    assert details(planned(config, tmp_path, vary="user", values="ann")) == [("base", "")]


def test_settings_of_a_contestant_stay_where_the_view_varies_others(config: Config, tmp_path: Path) -> None:
    (column,) = planned(config, tmp_path, contestants=["fixed"], vary="cfg", values="2").columns
    sampling = column.variant.config.sampling
    assert (sampling.sampler, sampling.num_steps, sampling.cfg_scale) == ("ddpm", 9, 2.0)


def test_prompts_are_texts_or_sets_each_once(config: Config, tmp_path: Path) -> None:
    said = ["  a thing ", "", "sprites:heldout:3:two", "a thing", "<b>not</b> a set: at all"]
    texts = planned(config, tmp_path, prompts=said).prompts
    assert (len(texts), texts[0], texts[-1]) == (5, "a thing", "<b>not</b> a set: at all")
    with pytest.raises(UserError, match="not below the folders"):
        planned(config, tmp_path, prompts=["hpsv2:/etc"])
    with pytest.raises(UserError, match="more than 100"):
        planned(config, tmp_path, prompts=["sprites:heldout:1000000"])


def test_numbers_with_gaps_are_the_only_ones_made(config: Config, tmp_path: Path) -> None:
    settings = planned(config, tmp_path, contestants=["base", "run"], seeds="0,3").config.generate
    assert (settings.images_per_prompt, len(settings.only)) == (4, 4)
    check_only(settings, ["base", "run"], 1)
    assert planned(config, tmp_path, seeds="0-3").config.generate.only == ()


@pytest.mark.parametrize(
    "view, told",
    [
        ({"contestants": ["no such"]}, "there is no 'no such'"),
        ({"contestants": ["base@0.5"]}, "base is no adapter"),
        ({"contestants": ["run@x"]}, "'x' is no number"),
        ({"contestants": []}, "choose a model"),
        ({"prompts": [" "]}, "prompts: write one"),
        ({"contestants": ["base", "run"], "seeds": "0-50"}, "2 columns x 1 prompts x 51 seeds are 102 pictures"),
        ({"sampler": "flow-euler", "eta": 2.0}, "eta must lie"),
    ],
)
def test_plans_that_cannot_be(config: Config, tmp_path: Path, view: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        planned(config, tmp_path, **view)
    assert not (tmp_path / "exports").exists()


# What is found


def run_folder(path: Path, section: dict[str, Any], steps: tuple[int, ...] = (), has_export: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"model": section, "train": {"steps": 1}}))
    if has_export:
        (path / "export").mkdir()
        (path / "export" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    for step in steps:
        (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return path


@pytest.fixture
def section(config: Config) -> dict[str, Any]:
    return config.to_dict(("model",))["model"]


def test_runs_checkpoints_pipelines_and_loras_are_found(config: Config, section: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run_folder(root / "x" / "train", {**section, "lora": {"rank": 3}}, steps=(10, 20))
    run_folder(root / "stopped", section, steps=(5,), has_export=False)
    run_folder(root / "big", {**section, "resolution": 32})
    run_folder(root / "sd3", resolve(["sprites-sd3"]).to_dict(("model",))["model"])
    run_folder(root / "older", {"name": "no such family"})
    (root / "lora").mkdir()
    (root / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (root / "pipeline").mkdir()
    (root / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    found = contestants(config, [root / "app", root])
    assert list(found)[:2] == ["sprites-sdxl", "sprites-sd3"]
    assert set(list(found)[2:]) == {"x/train", "x/train:10", "stopped:5", "big", "sd3", "lora", "pipeline"}
    assert found["x/train"].entry == {"adapter": str(root / "x/train/export")}  # the config's own model, rank or not
    assert found["sd3"].entry["model"] == "sprites-sd3"
    assert found["big"].entry["model"]["resolution"] == 32
    assert found["pipeline"].entry == {"model": {"name": "sd15", "path": str(root / "pipeline")}, "adapter": None}
    assert found["x/train:10"].checkpoint == (root / "x/train", 10)
    assert [found[name].has_strength for name in ("sprites-sdxl", "x/train", "stopped:5", "pipeline")] == [
        False, True, True, False,
    ]  # fmt: skip
    assert first_view(config, found, ["p"]).contestants[0] == "sprites-sdxl"


def test_links_out_of_the_roots_are_not_followed(config: Config, section: Any, tmp_path: Path) -> None:
    root, outside = tmp_path / "runs", tmp_path / "outside"
    run_folder(outside, section)
    run_folder(root / "in", section, has_export=False)
    (root / "folder").symlink_to(outside)
    (root / "in" / "export").symlink_to(outside / "export")
    run_folder(root / "taken", section, has_export=False)
    (outside / "checkpoints" / "step-00000001").mkdir(parents=True)
    (root / "taken" / "checkpoints").symlink_to(outside / "checkpoints")
    (root / "said").mkdir()
    (root / "said" / "config.yaml").symlink_to(outside / "config.yaml")
    (root / "said" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (root / "file").mkdir()
    (root / "file" / "pytorch_lora_weights.safetensors").symlink_to(outside / "config.yaml")
    assert list(contestants(config, [root])) == ["sprites-sdxl", "sprites-sd3"]


def test_a_changed_model_keeps_its_name_and_odd_folders_do_no_harm(section: Any, tmp_path: Path) -> None:
    run_folder(tmp_path / "odd", section)
    (tmp_path / "odd" / "checkpoints" / "step-x").mkdir(parents=True)
    found = contestants(resolve(["sprites-sdxl", "model.resolution=32", "generate.vary=[{seed: 3}]"]), [tmp_path])
    assert list(found) == ["sprites-sdxl", "seed3", "sprites-sd3", "odd"]
    assert found["sprites-sdxl"].entry == {"adapter": None}
    assert found["seed3"].entry == {"seed": 3}
    assert found["odd"].entry["model"] == "sprites-sdxl"


def test_the_search_ends(config: Config, section: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        run_folder(tmp_path / f"run{index}", section)
    run_folder(tmp_path.joinpath(*"abcdefghijk"), section)
    assert len(contestants(config, [tmp_path])) == 8
    monkeypatch.setattr("diffalign.recipes.painter._found.MAX_FOUND", 4)
    assert len(contestants(config, [tmp_path])) == 4
    assert list(contestants(config, [tmp_path / "none"])) == ["sprites-sdxl", "sprites-sd3"]
