"""The page of a sweep from made-up scores: what is drawn when, escaping, and sweeps in which little worked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.recipes.sweep._points import Setting
from diffalign.recipes.sweep._results import Judged, results
from diffalign.sweep_report import write_sweep_report

NUM = 20
PROMPTS = [f"prompt {i}" for i in range(NUM)]
KEY = "objective.beta"


def made_up(scorers: tuple[str, ...], settings: dict[str, dict[str, Any]], seeds: tuple[int, ...] = (0,)) -> dict:
    """sweep.json of settings (name -> key -> value), each a little higher on the first scorer, lower on the others."""
    rng = np.random.default_rng(0)
    base = {scorer: rng.normal(size=NUM) for scorer in scorers}
    finished = {
        name: [
            Judged(
                seed, "", {s: base[s] + (i + 1) * (1 if s == scorers[0] else -1) for s in scorers}, {"accuracy": 0.6}
            )
            for seed in seeds
        ]
        for i, name in enumerate(settings)
    }
    listed = [Setting(name, name, values, {}) for name, values in settings.items()]
    listed = listed or [Setting("lost", "lost", {KEY: 1.0}, {})]
    axes = (scorers[0], scorers[1]) if len(scorers) > 1 else None
    found = results(listed, finished, base, "base", PROMPTS, axes, seed=0)
    return found | {"title": "a sweep", "failed": [], "scorers": {}, "facts": {}}


def page(folder: Path, found: dict[str, Any]) -> str:
    return write_sweep_report(folder, found).read_text()


def test_two_scorers_and_one_key(tmp_path):
    found = made_up(("a", "b"), {"beta=1": {KEY: 1.0}, "beta=40": {KEY: 40.0}}, seeds=(0, 1))
    text = page(tmp_path, found)
    assert found["front"] == ["base", "beta=1", "beta=40"]  # each trades a for b
    assert "2 of 2 settings on the front, and the base, too" in text
    assert text.count("<svg") == 6 and "Over objective.beta" in text
    assert "0: " in text and "(s.d. 0)" in text
    assert json.loads((tmp_path / "sweep.json").read_text())["hypervolume"] == 0
    svg = (tmp_path / "front.svg").read_text()
    assert "prefers-color-scheme: dark" in svg and "beta=40" in svg


def test_one_scorer_has_curves_and_no_front(tmp_path):
    found = made_up(("a",), {"name=x": {"objective.name": "x"}, "name=y": {"objective.name": "y"}})
    text = page(tmp_path, found)
    assert "front" not in found and not (tmp_path / "front.svg").exists()
    assert "<h2>Front</h2>" not in text and text.count("<svg") == 3


def test_several_keys_have_a_front_and_no_curves(tmp_path):
    values = [{KEY: 1.0, "train.lr": 1e-4}, {KEY: 2.0, "train.lr": 1e-4}]
    text = page(tmp_path, made_up(("a", "b"), {f"setting {i}": value for i, value in enumerate(values)}))
    assert text.count("<svg") == 1 and "Over objective.beta" not in text


@pytest.mark.parametrize("scorers", [("a",), ("a", "b")])
def test_a_sweep_of_which_every_run_failed_still_has_a_page(tmp_path, scorers):
    found = made_up(scorers, {}) | {"failed": [{"name": "lost", "seed": 0, "error": "<boom>"}]}
    text = page(tmp_path, found)
    assert "lost, seed 0 failed: &lt;boom&gt;" in text and "<boom>" not in text


def test_names_from_outside_are_escaped(tmp_path):
    name = "x=<script>alert(1)</script>"
    text = page(tmp_path, made_up(("a<i>", "b"), {name: {KEY: 1.0}, "y": {KEY: 2.0}}))
    assert "<script" not in text and "<i>" not in text and "&lt;script" in text
