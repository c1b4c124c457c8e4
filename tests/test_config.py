"""Configs: merging, overrides, refusals that name the key and what was probably meant."""

from __future__ import annotations

import pytest

from diffalign.config import config_names, fingerprint, resolve
from diffalign.types import UserError


def test_files_merge_left_to_right_and_keys_win():
    config = resolve(["sdxl", "diffusion-dpo", "train.lr=3e-6", "objective.beta=2000"])
    assert config.names["model"] == "sdxl" and config.objective.beta == 2000 and config.train.lr == 3e-6
    assert config.title == "sdxl-diffusion-dpo"


def test_another_component_starts_from_its_own_defaults():
    config = resolve(["sdxl", "diffusion-dpo", {"objective": {"name": "sft"}}])
    assert config.names["objective"] == "sft" and config.objective.on == "winner"


@pytest.mark.parametrize("method", config_names("methods"))
@pytest.mark.parametrize("model", config_names("models"))
def test_every_model_takes_every_method(model, method):
    from diffalign.recipes.train import check_needs

    check_needs(resolve([model, method]))


@pytest.mark.parametrize("run", config_names("runs"))
def test_every_run_resolves(run):
    method = run.partition("-")[0]  # published settings go on top of their own method
    resolve(["sprites-sdxl", method if method in config_names("methods") else "diffusion-dpo", run])


def test_a_resolved_config_resolves_to_itself():
    config = resolve(["sd3", "sft-po", "model.lora.rank=4", "source.data.path=x.parquet"])
    again = resolve([config.to_dict()])
    assert again.to_dict() == config.to_dict()
    assert fingerprint(again.to_dict()) == fingerprint(config.to_dict())


def test_the_fingerprint_ignores_what_does_not_change_numbers():
    base = resolve(["sdxl", "diffusion-dpo"]).to_dict()
    for words, same in ((["train.out=x", "train.keep_checkpoints=9"], True), (["train.seed=1"], False)):
        other = resolve(["sdxl", "diffusion-dpo", *words]).to_dict()
        assert (fingerprint(other) == fingerprint(base)) is same


@pytest.mark.parametrize(
    "words,match",
    [
        (["sdlx"], "Did you mean 'sdxl'"),
        (["./nowhere.yaml"], "no config file"),
        (["sdxl", "trian.lr=1"], "Did you mean 'train'"),
        (["sdxl", "train.lrr=1"], "Did you mean 'lr'"),
        (["sdxl", "train.lr=fast"], r"train.lr: .*'fast'"),
        (["sdxl", "train.steps=0"], "train.steps must be at least 1"),
        (["sdxl", "model.lora.rnk=3"], "Did you mean 'rank'"),
        (["sdxl", "train=3"], "train must hold keys"),
        (["sdxl", "objective.name=dpoo"], "unknown objective"),
        (["sdxl", "train.lr_schedule=cosin"], "train.lr_schedule"),
        (["sdxl", "diffusion-dpo", "source.flip=maybe"], "source.flip"),
    ],
)
def test_mistakes_are_one_line(words, match):
    with pytest.raises(UserError, match=match) as caught:
        resolve(words)
    assert "\n" not in str(caught.value)


def test_broken_yaml_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: [unclosed")
    with pytest.raises(UserError, match="mine.yaml is not valid YAML"):
        resolve([str(path)])


def test_code_outside_the_package_is_named_by_its_path():
    from diffalign.registry import build

    assert build("objective", {"name": "diffalign.objectives.sft:Sft"}).on == "winner"
    with pytest.raises(UserError, match="cannot import"):
        build("objective", {"name": "diffalign.nowhere:Thing"})


def test_a_component_without_a_name_is_refused_only_where_it_is_needed():
    config = resolve(["sdxl", "objective.beta=3"])
    config.require("model")
    with pytest.raises(UserError, match=r"keys are given for it, but no objective.name.*diffusion-dpo"):
        config.require("objective")
    with pytest.raises(UserError, match=r"no likelihood configured \(none given\)"):
        config.require("likelihood")
