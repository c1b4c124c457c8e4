"""The general preference: exact antisymmetry, circles learned where a score per picture cannot, its files."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.config import resolve
from diffalign.recipes import train_scorer as recipe
from diffalign.recipes.train_scorer._loss import pair_loss
from diffalign.registry import build
from diffalign.scorers import _clip_files as files
from diffalign.scorers import _preference_head as heads
from diffalign.types import UserError

from .conftest import PROMPTS, interrupted, pictures
from .towers import SIDE, write_folder, write_head

HUES = {"rock": (200, 40, 40), "paper": (40, 200, 40), "scissors": (40, 40, 200)}
BEATS = [("paper", "rock"), ("scissors", "paper"), ("rock", "scissors")]


def shape(name: str, seed: int) -> Image.Image:
    """A flat colour under some noise."""
    noise = np.random.default_rng(seed).normal(size=(SIDE, SIDE, 3)) * 12
    return Image.fromarray((noise + HUES[name]).clip(0, 255).astype(np.uint8))


def circle(path: Path, num: int = 36) -> Path:
    """Pairs in a circle, all of them in both orders under every caption."""

    def data(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    rows = []
    for index in range(num):
        winner, loser = (data(shape(name, 2 * index + k)) for k, name in enumerate(BEATS[index % 3]))
        first = index // 3 % 2
        rows.append(
            {
                "jpg_0": (winner, loser)[first],
                "jpg_1": (loser, winner)[first],
                "label_0": 1.0 - first,
                "caption": f"game number {index // 6}",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def train(base: Path, data: Path, out: Path, **keys: Any) -> recipe.ScorerResult:
    section = {
        "base": str(base),
        "data": {"path": str(data)},
        "out": str(out),
        "head": "general",
        "head_dim": 8,
        "steps": 40,
        "batch_size": 12,
        "lr": 1e-3,
        "warmup_steps": 5,
        "validate_every": 40,
        "holdout": 0.4,
        "device": "cpu",
    }
    return recipe.train_scorer(resolve([{"train_scorer": section | keys, "log": {"trackers": []}}]), quiet=True)


def opened(folder: Path, **keys: Any) -> Any:
    return build("scorer", {"name": "general_preference", "path": str(folder), "device": "cpu", **keys})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder with random weights."""
    return write_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random CLIP with a random head beside it."""
    return write_head(tmp_path_factory.mktemp("head"))


def test_log_odds_are_those_of_the_block_skew_matrix() -> None:
    first, second = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = torch.block_diag(*[torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)] * 4)
    expected = torch.einsum("nj,ji,ni->n", first, matrix.T, second)  # <R v, w>
    torch.testing.assert_close(heads.log_odds(first, second), expected)
    with pytest.raises(AssertionError):  # v R w, which turns every preference round
        torch.testing.assert_close(heads.log_odds(first, second), torch.einsum("ni,ij,nj->n", first, matrix, second))


def test_three_vectors_at_120_degrees_beat_each_other_in_a_circle() -> None:
    angles = torch.arange(3) * (2 * np.pi / 3)
    v = torch.stack([angles.cos(), angles.sin()], dim=1)
    chance = heads.probability(heads.log_odds(v, v.roll(-1, 0)))
    np.testing.assert_allclose(chance, [0.7039, 0.7039, 0.7039], atol=5e-5)


def test_halves_cost_what_the_logistic_loss_of_the_log_odds_costs() -> None:
    pairs = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    odds = heads.log_odds(pairs[:, 0], pairs[:, 1])
    label = torch.tensor([1, 0, 1, 0, 0.8, 0.5], dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(odds, label, reduction="none")
    expected[-1] -= np.log(2)
    torch.testing.assert_close(pair_loss(heads.halves(pairs), label), expected)


def test_probabilities_sum_to_exactly_one() -> None:
    odds = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 8, torch.tensor([0.0, 200.0])])
    chance = heads.probability(odds)
    assert torch.equal(chance + heads.probability(-odds), torch.ones_like(odds))
    torch.testing.assert_close(chance, torch.sigmoid(odds))
    assert chance[-2] == 0.5 and chance[-1] == 1


def test_a_new_head_is_the_clips_own_preference(base: Path) -> None:
    clip = files.load_clip(str(base)).double()
    towers = heads.PreferenceTowers(clip, heads.PreferenceHead(clip.config.projection_dim, 6))
    image, text = torch.randn(2, 4, clip.config.projection_dim, generator=torch.Generator().manual_seed(0))
    v, scores = towers.embed(image, text), towers.compare(image, text)
    for i, j in itertools.combinations(range(4), 2):
        torch.testing.assert_close(heads.log_odds(v[i], v[j]), scores[i] - scores[j], atol=1e-3, rtol=1e-4)
    heads.log_odds(v[0], v[1]).backward()
    gradient = towers.head.weight.grad
    assert gradient is not None and (gradient.abs().sum(dim=1)[[0, 1, 3, 5]] > 0).all()  # nothing is stuck


def test_preferences_are_exactly_antisymmetric(head_folder: Path) -> None:
    scorer = opened(head_folder, batch_size=2)
    images = pictures(5, side=0)
    there = scorer.prefer(images, images[::-1], PROMPTS)
    back = scorer.prefer(images[::-1], images, PROMPTS)
    assert there.dtype == np.float32 and there.shape == (5,)
    np.testing.assert_array_equal(there + back, np.ones(5, np.float32))
    assert there[2] == 0.5 and np.abs(there - 0.5).max() > 0.05
    table = scorer.compare_group(images, PROMPTS[0])
    np.testing.assert_array_equal(table + table.T, np.ones((5, 5), np.float32))
    np.testing.assert_array_equal(np.diag(table), np.full(5, 0.5, np.float32))
    pairs = scorer.prefer([images[0]] * 5, images, [PROMPTS[0]] * 5)
    np.testing.assert_allclose(table[0], pairs, atol=1e-5)
    other = scorer.compare_group(images, PROMPTS[1])
    assert np.abs(other - table).max() > 0.01  # the prompt counts


def test_nothing_depends_on_the_batch(head_folder: Path) -> None:
    images = pictures(5, side=0)
    one, whole = (opened(head_folder, batch_size=size).represent(images, PROMPTS) for size in (1, 32))
    torch.testing.assert_close(one, whole, atol=1e-4, rtol=1e-5)
    assert one.shape == (5, 6) and opened(head_folder).represent([], []).shape == (0, 6)
    assert opened(head_folder).prefer([], [], []).shape == (0,)


def test_a_callers_autocast_changes_nothing(head_folder: Path) -> None:
    expected = opened(head_folder).represent(pictures(2), PROMPTS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(opened(head_folder).represent(pictures(2), PROMPTS[:2]), expected)


def test_the_version_follows_the_head(head_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in head_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    info = opened(head_folder).info
    assert (info.name, info.differentiable) == ("general_preference", False)
    assert opened(copy).info.version == info.version
    state = load_file(copy / files.HEAD_FILE)
    state["bias"] += 1
    save_file(state, copy / files.HEAD_FILE)
    assert opened(copy).info.version != info.version


def test_it_has_no_score_of_one_picture(head_folder: Path) -> None:
    scorer = opened(head_folder)
    for asked in (
        lambda: scorer.score(pictures(), PROMPTS),
        lambda: scorer.score_tensor(torch.zeros(1, 3, 64, 64), ["a"]),
    ):
        with pytest.raises(
            ValueError, match="compares two pictures and has no score of one; use prefer or compare_group"
        ):
            asked()
    for bad in (
        lambda: scorer.prefer(pictures(), pictures(), PROMPTS[:2]),
        lambda: scorer.represent(pictures(2), PROMPTS),
    ):
        with pytest.raises(ValueError, match="images for"):
            bad()


def test_bad_folders_are_one_line(base: Path, head_folder: Path, tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            opened(folder)._towers  # noqa: B018
        assert "\n" not in str(error.value)

    refused(base, "no preference_head.safetensors, so no general preference; use clip_preference")
    refused(head_folder / "model.safetensors", "a weights file holds no preference head")
    refused(tmp_path / "none", "no such folder")
    for file in head_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"weight": torch.zeros(4, 3), "bias": torch.zeros(4)}, tmp_path / files.HEAD_FILE)
    refused(tmp_path, "missing, or no preference head of this CLIP")
    save_file({"bias": torch.zeros(3), "weight": torch.zeros(3, 24)}, tmp_path / files.HEAD_FILE)
    refused(tmp_path, "missing, or no preference head of this CLIP")
    (tmp_path / files.HEAD_FILE).write_bytes(b"garbage" * 9)
    refused(tmp_path, "missing, or no preference head of this CLIP")


def test_a_circle_is_learned_by_the_general_head_alone(base: Path, tmp_path: Path) -> None:
    data = circle(tmp_path / "circle.parquet")
    general = train(base, data, tmp_path / "general")
    assert general.holdout["holdout/accuracy"] == 1
    scorer = opened(tmp_path / "general" / "export")
    table = scorer.compare_group([shape(name, 1000 + i) for i, name in enumerate(HUES)], "game number 0")
    order = list(HUES)
    assert all(table[order.index(winner), order.index(loser)] > 0.6 for winner, loser in BEATS)
    # a score per picture puts them in an order: one of the three pairs is always wrong
    score = train(base, data, tmp_path / "score", head="score")
    assert score.holdout["holdout/accuracy"] < 0.75
    made = build("scorer", {"name": "clip_preference", "path": str(tmp_path / "score" / "export"), "device": "cpu"})
    scores = dict(zip(HUES, made.score([shape(name, 1000) for name in HUES], ["game number 0"] * 3), strict=True))
    assert sum(scores[winner] > scores[loser] for winner, loser in BEATS) <= 2
    with pytest.raises(UserError, match="no preference_head"):
        opened(tmp_path / "score" / "export")


def test_it_resumes_and_goes_on_from_its_export(base: Path, tmp_path: Path) -> None:
    data, keys = circle(tmp_path / "circle.parquet", 12), {"steps": 4, "batch_size": 4, "checkpoint_every": 2}
    keys |= {"validate_every": 0}
    train(base, data, tmp_path / "whole", **keys)
    with interrupted(3):
        train(base, data, tmp_path / "cut", **keys)
    train(base, data, tmp_path / "cut", **keys)
    for name in (files.HEAD_FILE, "model.safetensors"):
        whole, resumed = (load_file(tmp_path / run / "export" / name) for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    # what the export prefers is what was trained, and training goes on from there
    export = tmp_path / "whole" / "export"
    trained = recipe.load_towers(
        resolve([{"train_scorer": {"base": str(export), "head": "general", "head_dim": 8}}]).train_scorer
    )
    assert isinstance(trained, heads.PreferenceTowers)
    assert torch.equal(trained.head.weight, load_file(export / files.HEAD_FILE)["weight"])
    with pytest.raises(UserError, match="its head's embedding has 8 dimensions: set train_scorer.head_dim so"):
        train(export, data, tmp_path / "more", **keys, head_dim=6)


def test_bad_settings_are_one_line() -> None:
    for keys, match in (
        ({"head_dim": 3}, "train_scorer.head_dim must be even and at least 2"),
        ({"head_dim": 0}, "train_scorer.head_dim must be even and at least 2"),
        ({"head": "general", "step_aware": True}, "it goes without step_aware"),
        ({"head": "skew"}, "head"),
    ):
        with pytest.raises(UserError, match=match):
            resolve([{"train_scorer": keys}])
