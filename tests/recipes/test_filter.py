"""The CHES filter: a planted pair leaves, the rest stays as it was, interruptions change nothing, refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import picture, tokens
from PIL import Image

from diffalign import diagnostics
from diffalign.config import resolve
from diffalign.data import RecordWriter
from diffalign.recipes import filter as recipe
from diffalign.registry import build
from diffalign.types import Record, Setting, UserError

PLANTED = 4


def almost(image: bytes) -> bytes:
    """The same picture but for one grey level here and there."""
    pixels = np.asarray(Image.open(io.BytesIO(image))).astype(int)
    pixels[::4, ::4] += 1
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs that differ, but for one whose images are almost the same: the paper's case of displacement."""
    root = tmp_path_factory.mktemp("filter")
    with RecordWriter(root / "pairs.parquet") as writer:
        for index in range(10):
            winner = picture(2 * index, 40, side=48)
            loser = almost(winner) if index == PLANTED else picture(2 * index + 1, 220, side=48)
            writer.write(Record(0, f"thing {index}", (winner, loser), (1.0, 0.0), meta={"number": index}))
    return root


def go(folder: Path, out: str, family: str = "sd3", **overrides: object) -> Path:
    settings = {"filter__drop": 0.1, "filter__draws": 2, "filter__batch_size": 3, "filter__out": folder / out}
    return recipe.filter(resolve(tokens(family, folder, "unused", **settings | overrides)), quiet=True)


def read(out: Path):
    return list(build("data", {"name": "auto", "path": str(out)}))


def scores(out: Path) -> dict[int, float]:
    return {row["row"]: row["ches"] for row in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return go(folder, "whole")


def test_the_planted_pair_leaves_and_the_others_stay(whole, folder):
    kept, before = read(whole), read(folder / "pairs.parquet")
    assert [record.meta["number"] for record in kept] == [index for index in range(10) if index != PLANTED]
    for record in kept:
        old = before[record.meta["number"]]
        assert (record.images, record.prompt, record.utility, record.id) == (
            old.images,
            old.prompt,
            old.utility,
            old.id,
        )
        assert record.meta["ches"] == pytest.approx(scores(whole)[record.meta["number"]])
    report = json.loads((whole / "filter.json").read_text())
    assert (report["pairs"], report["kept"], report["dropped"], report["layer"]) == (10, 9, 1, "proj_out")
    (told,) = report["highest"]
    assert told["prompt"] == f"thing {PLANTED}" and told["ches"] == max(scores(whole).values())
    assert report["ches_kept"][-1] <= report["ches_dropped"][0]


def test_scores_are_ches_of_what_the_output_layer_reads(whole, folder):
    """By hand: the shared noise levels and noises of two draws, the features, the score, its mean."""
    config = resolve(tokens("sd3", folder, "unused", likelihood__draws=2))
    torch.manual_seed(0)
    model = config.model.load()
    batch = config.source.prepare(model, None, Setting(0, 1, 1)).records(np.array([7]))
    t, noise = config.likelihood.draw(model, batch)
    found, seen = [], []
    model.network.proj_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for draw in range(2):
        times = t[0, draw].expand(2)
        xt = model.schedule.add_noise(batch.x0[0], noise[0, draw], times)
        with torch.no_grad():
            model(xt, times, {key: value[0] for key, value in batch.cond.items()})
        winner, loser = seen.pop()
        found.append(float(diagnostics.ches(winner, loser, length_normalize=True)))
    assert scores(whole)[7] == pytest.approx(np.mean(found), rel=1e-4)


def test_the_models_own_logp_orders_a_curriculum(whole, folder):
    """The column is logp of each image: its gap is minus the paper's difficulty of the pair (arXiv 2405.19534)."""
    record = read(whole)[0]
    winner, loser = record.scores[recipe.LOGP]
    assert winner < 0 and loser < 0 and winner != loser
    spec = {"name": "offline", "data": {"path": str(whole)}, "cache_dir": str(folder / "cache"), "holdout": 0.0}
    model = resolve(tokens("sd3", folder, "unused")).model.load()
    column, gaps = build("source", spec).prepare(model, None, Setting(0, 1, 1)).data.gaps(np.arange(9), recipe.LOGP)
    assert column == recipe.LOGP and gaps[0] == pytest.approx(winner - loser)


def test_every_family_has_its_output_layer(folder):
    for family, layer in (("sd15", "conv_out"), ("sdxl", "conv_out")):
        out = go(folder, family, family, filter__drop=0.0)
        report = json.loads((out / "filter.json").read_text())
        assert report["layer"] == layer and report["dropped"] == 0 and len(read(out)) == 10


def test_interrupted_equals_uninterrupted(whole, folder, monkeypatch):
    """Within the scores (with a torn line) and before the report; the batches' split changes nothing but rounding."""
    calls, score_batch = [], recipe.score_batch

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_batch(*arguments)

    monkeypatch.setattr(recipe, "score_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(folder, "cut")
    with (folder / "cut" / "scores.jsonl").open("a") as file:
        file.write('{"row": 6, "che')
    monkeypatch.setattr(recipe, "score_batch", score_batch)
    go(folder, "cut")
    for name in ("scores.jsonl", "filter.json", "records-00000.parquet"):
        assert (folder / "cut" / name).read_bytes() == (whole / name).read_bytes()
    (folder / "cut" / "filter.json").unlink()
    go(folder, "cut")
    assert (folder / "cut" / "filter.json").read_bytes() == (whole / "filter.json").read_bytes()
    stamp = (whole / "filter.json").stat().st_mtime_ns
    go(folder, "whole")
    assert (whole / "filter.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "overrides,match",
    [
        ({"filter__drop": 1}, r"filter.drop must lie in \[0, 1\)"),
        ({"filter__draws": 0}, "filter.draws must be at least 1"),
        ({"filter__share": 0.1}, "unknown key filter.share"),
        ({"filter__layer": "conv_aut"}, "filter.layer=conv_aut: no such layer"),
        ({"source__data__path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, match, folder):
    with pytest.raises(UserError, match=match) as error:
        go(folder, "bad-" + "-".join(overrides), **overrides)
    assert "\n" not in str(error.value)


def test_lists_and_other_settings_are_refused(whole, folder, tmp_path):
    with RecordWriter(tmp_path / "lists") as writer:
        for index in range(2):
            images = tuple(picture(3 * index + k, 80.0 * k + 20) for k in range(3))
            writer.write(Record(0, f"thing {index}", images, (3.0, 2.0, 1.0)))
    with pytest.raises(UserError, match="CHES compares pairs"):
        go(folder, "lists", source__data__path=tmp_path / "lists")
    with pytest.raises(UserError, match=r"different config \(filter.drop: 0.1 -> 0.2"):
        go(folder, "whole", filter__drop=0.2)
