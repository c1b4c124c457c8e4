"""The embedded learned scorers: small, opened by name, and on the gold judge's side for captions they never saw."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.registry import build
from diffalign.sprites import WEIGHTS
from diffalign.sprites.preferences import pair, rendered_pairs, training_scene, wrong_scenes
from diffalign.sprites.render import render
from diffalign.sprites.scene import caption, is_held_out, parse, prompts

from .conftest import tensor


@pytest.mark.parametrize(("name", "folder"), [("sprites_clip", "scorer"), ("sprites_step_aware", "step_scorer")])
def test_prefers_what_the_judge_prefers_on_held_out_captions(name: str, folder: str) -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / folder).iterdir()) < 3.1e6
    scorer, rng = build("scorer", {"name": name, "device": "cpu"}), np.random.default_rng(3)
    texts = prompts(60, seed=3, split="heldout")
    right = [render(parse(text), rng) for text in texts]
    options = [wrong_scenes(parse(text)) for text in texts]
    wrong = [render(scenes[int(rng.integers(len(scenes)))], rng) for scenes in options]
    wins = scorer.score(right, texts) > scorer.score(wrong, texts)
    assert wins.mean() > 0.8
    assert scorer.info.name == name


def test_the_step_aware_one_uses_the_time() -> None:
    scorer, text = build("scorer", {"name": "sprites_step_aware", "device": "cpu"}), "a small red circle"
    pixels = tensor([render(parse(text), np.random.default_rng(0))]).requires_grad_()
    scores = [scorer.score_tensor(pixels, [text], torch.tensor([time])) for time in (0.0, 501.0, 951.0)]
    assert len({round(score.item(), 3) for score in scores}) == 3
    scores[1].sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0


def test_pairs_are_as_the_judge_says_and_of_training_captions() -> None:
    rows = list(rendered_pairs(12, seed=1))
    assert [row["caption"] for row in rows] == [row["caption"] for row in rendered_pairs(12, seed=1)]
    assert not any(is_held_out(row["caption"]) for row in rows)
    for row in rows:
        first, second = (Image.open(io.BytesIO(row[key])) for key in ("jpg_0", "jpg_1"))
        assert pair(row["caption"], second, first)["label_0"] == 1 - row["label_0"]
    assert {row["label_0"] for row in rendered_pairs(60, seed=2)} == {0.0, 0.5, 1.0}


def test_wrong_scenes_are_wrong() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = training_scene(rng)
        for other in wrong_scenes(scene):
            assert caption(other) != caption(scene)
