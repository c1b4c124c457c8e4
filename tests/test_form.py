"""Config keys as form fields: what a form holds and what the command line reads are the same."""

from __future__ import annotations

import math

import pytest
import yaml

from diffalign.config import COMPONENTS, TRAINING_SECTIONS, config_names, merge_overrides, resolve
from diffalign.errors import UserError
from diffalign.launching._form import Field, form_fields, shown


def of_key(*configs: str) -> dict[str, Field]:
    return {field.key: field for field in form_fields(configs)}


@pytest.mark.parametrize("method", config_names("methods"))
def test_an_untouched_form_adds_no_word(method: str) -> None:
    assert [word for field in form_fields(["sprites-sdxl", method]) if (word := field.word(field.default))] == []


@pytest.mark.parametrize("method", config_names("methods"))
def test_every_key_of_a_training_is_a_field_whose_text_reads_back(method: str) -> None:
    """Written out in full on the command line, the defaults give the config they were read from."""
    configs = ["sprites-sdxl", method]
    fields = form_fields(configs)
    words = [
        f"{f.key}={shown(f.default) if f.kind in ('text', 'bool') else f.default}"
        for f in fields
        if f.default != "" and f.key != "source.data.name"  # auto where nothing is written
    ]
    config = resolve(configs)
    assert resolve([*configs, *words]).to_dict() == config.to_dict()

    def keys(value: object, where: str) -> set[str]:
        if isinstance(value, dict) and where != "source.data" and value and where not in leaves:
            return {key for name, item in value.items() for key in keys(item, f"{where}.{name}" if where else name)}
        return {where}

    leaves = {field.key for field in fields}
    names = {f"{component}.name" for component in COMPONENTS} | {"source.data"}
    assert keys(config.to_dict(TRAINING_SECTIONS), "") - names <= leaves


@pytest.mark.parametrize(
    "value", [True, 0, -3, 1e-5, 1e-05, 0.1, 2.5e20, "a b", "yes", "1e-3", "null", "off", "a: b", ""]
)
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: [v], lambda v: {"k": v}])
def test_values_survive_the_command_line(value: object, wrap: object) -> None:
    whole = wrap(value)  # type: ignore[operator]
    read = merge_overrides([f"train.x={shown(whole)}"])["train"]["x"]
    assert read == (None if whole == "" else whole) or read == whole
    assert "\n" not in shown(whole)


def test_changed_values_become_words() -> None:
    fields = of_key("sprites-sdxl", "diffusion-dpo")
    assert fields["train.steps"].word("40") == "train.steps=40"
    assert fields["train.steps"].word(" 1000 ") is None
    assert fields["model.gradient_checkpointing"].word(True) == "model.gradient_checkpointing=true"
    assert fields["train.out"].word("runs/a b") == "train.out=runs/a b"
    assert yaml.safe_load((fields["train.out"].word("yes") or "").partition("=")[2]) == "yes"
    assert fields["train.max_grad_norm"].word("") == "train.max_grad_norm=null"
    assert fields["train.betas"].word("[0.9,\n 0.99]") == "train.betas=[0.9, 0.99]"
    assert fields["stop.alarm"].word("warn") == "stop.alarm=warn"
    assert fields["source.data.path"].word("p.parquet") == "source.data.path=p.parquet"


def test_types_and_help_come_from_the_dataclasses() -> None:
    fields = of_key("sprites-sdxl", "diffusion-dpo")
    assert fields["train.precision"].choices == ("auto", "fp32", "bf16", "fp16")
    assert fields["train.precision"].help == "auto: bf16 where the GPU has it, else fp32"
    assert fields["model.lora.rank"].kind == "int" and fields["train.lr"].kind == "float"
    assert float(fields["train.lr"].default) == 1e-5 and math.isfinite(yaml.safe_load(fields["train.lr"].default))
    assert fields["source.flip"].kind == "bool" and fields["train.sample_prompts"].kind == "yaml"
    assert fields["objective.beta"].help.startswith("per unit of logp")  # of a docstring
    assert fields["model.resolution"].help.startswith("pixels")  # of a comment
    assert fields["source.flip"].help.startswith("mirror whole records")


def test_the_fields_follow_the_configs() -> None:
    assert "source.prompts" in of_key("sprites-sdxl", "d3po") and "source.data.path" not in of_key(
        "sprites-sdxl", "d3po"
    )
    assert of_key("sprites-sdxl", "diffusion-dpo", "train.steps=7")["train.steps"].default == "7"
    with pytest.raises(UserError, match="no config named"):
        form_fields(["sprites-sdxl", "diffusion-dpp"])
