"""Pieces of the verbs that need no model: prompt lists, model names, run folders."""

from __future__ import annotations

import json

import pytest
import torch

from diffalign.config import Train, resolve
from diffalign.data import read_prompts
from diffalign.recipes._judging import keep_whole_lines
from diffalign.recipes._optim import adam_damping, build_optimizer
from diffalign.recipes._run import differences, open_folder
from diffalign.recipes.evaluate import categories_of, model_names
from diffalign.types import UserError


def test_prompt_lists(tmp_path):
    text, jsonl = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a cat\n\n  a dog \n")
    jsonl.write_text('{"prompt": "a cat"}\n{"caption": "a dog"}\n')
    assert read_prompts(str(text), "k") == read_prompts(str(jsonl), "k") == ["a cat", "a dog"]
    held_out = read_prompts("sprites:heldout:5:two", "k")
    assert len(held_out) == 5 and categories_of(held_out) == ["two"] * 5
    assert categories_of(["a cat"]) is None


@pytest.mark.parametrize(
    "spec,content,match",
    [
        (None, None, "generate.prompts is missing"),
        ("nowhere.txt", None, "no such file"),
        ("empty.txt", "\n\n", "holds no prompts"),
        ("broken.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2"),
        ("other.jsonl", '{"text": "x"}', "line 1"),
        ("sprites:test:5", None, "sprites:<train|heldout>"),
        ("sprites:train:five", None, "sprites:<train|heldout>"),
        ("sprites:train:5:three", None, "sprites:<train|heldout>"),
    ],
)
def test_bad_prompt_lists(spec, content, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / spec).write_text(content)
    with pytest.raises(UserError, match=match):
        read_prompts(spec, "generate.prompts")


def test_model_names():
    assert list(model_names(("runs/a/export", "runs/b/export"), ())) == ["base", "a", "b"]
    with pytest.raises(UserError, match="2 names for 1"):
        model_names(("x",), ("a", "b"))
    with pytest.raises(UserError, match="must differ"):
        model_names(("runs/a/export", "other/a/export"), ())


def test_a_folder_belongs_to_one_config(tmp_path):
    config = resolve(["sdxl", "diffusion-dpo"])
    sections = ("model", "objective")
    assert open_folder(tmp_path / "run", config, sections).is_new
    assert not open_folder(tmp_path / "run", config, sections).is_new
    with pytest.raises(UserError, match=r"objective.beta: 5000.0 -> 7.0"):
        open_folder(tmp_path / "run", resolve(["sdxl", "diffusion-dpo", "objective.beta=7"]), sections)
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == ["a.b: 1 -> 2", "c: None -> 3"]


def test_a_torn_line_is_cut_off(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert keep_whole_lines(path) == 0
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"a": ')
    assert keep_whole_lines(path) == 1
    assert path.read_text() == '{"a": 1}\n'


def test_what_adams_epsilon_takes():
    """In closed form after one step: v is the squared gradient. Weights without gradients do not count."""
    gradients = torch.tensor([1e-3, 1e-8, 3e-8, 0.0])
    weights = torch.nn.Parameter(torch.zeros(4))
    optimizer = build_optimizer(Train(adam_eps=1e-8), [weights])
    assert adam_damping(optimizer) is None
    weights.grad = gradients
    optimizer.step()
    assert adam_damping(optimizer) == pytest.approx((1e-5 + 0.5 + 0.25) / 3, rel=1e-3)
    other = build_optimizer(Train(optimizer="adafactor"), [weights])
    other.step()
    assert adam_damping(other) is None
