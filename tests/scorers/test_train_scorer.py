"""Training of scorers: the published loss, labels, exact resume, previews, pseudo-labels, one line for bad input."""

from __future__ import annotations

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from makers import pickapic, picture
from safetensors.torch import load_file

from diffalign.cli import main
from diffalign.config import resolve
from diffalign.metrics import read_metrics
from diffalign.recipes import train_scorer as recipe
from diffalign.recipes.train_scorer import _setup as setup
from diffalign.recipes.train_scorer._loss import label_of, pair_loss, prompt_weights, pseudo_label
from diffalign.recipes.train_scorer._previews import Previews, time_of
from diffalign.registry import build
from diffalign.schedule import RectifiedFlow, VariancePreserving
from diffalign.types import UserError

from .conftest import PROMPTS, interrupted, pictures


def test_loss_has_the_released_values() -> None:
    scores = torch.tensor([[20.5, 20.1], [21.0, 21.6], [19.8, 19.8]], dtype=torch.float64)
    per = pair_loss(scores, torch.tensor([1, 0, 0.5], dtype=torch.float64))
    weights = prompt_weights(torch.tensor([1, 4, 2], dtype=torch.float64))
    np.testing.assert_allclose(per, [0.5130152524, 0.4374879505, 0], atol=1e-9)
    np.testing.assert_allclose(weights, [0.5714285714, 0.1428571429, 0.2857142857], atol=1e-9)
    assert float((per * weights).sum()) == pytest.approx(0.355649851441, abs=1e-10)


def test_a_tie_costs_nothing_only_at_equal_scores() -> None:
    half = torch.tensor([0.5])
    assert float(pair_loss(torch.tensor([[3.0, 3.0]]), half)) == pytest.approx(0, abs=1e-7)
    assert float(pair_loss(torch.tensor([[3.0, 1.0]]), half)) > 0.1


def test_labels() -> None:
    assert [label_of(u) for u in ((1, 0), (0, 1), (0.5, 0.5), (0.8, 0.2), (7, 3), (2, 2), (-1, 2))] == [
        *(1.0, 0.0, 0.5, 0.8, 1.0, 0.5, 0.0)
    ]
    edge = 2 * math.atanh(0.1)  # P_0 - P_1 = tanh(gap / 2)
    assert [pseudo_label((gap, 0), 1.0, 0.1) for gap in (1.01 * edge, 0.99 * edge, -1.01 * edge)] == [1.0, 0.5, 0.0]
    assert pseudo_label((0.01, 0), 100.0, 0.1) == 1.0


def test_time_of_is_where_the_network_sees_the_timestep() -> None:
    schedules = (VariancePreserving(torch.linspace(0.999, 0.01, 1000)), RectifiedFlow())
    for schedule in schedules:
        for timestep in (0, 251, 501, 701, 951, 999):
            t = torch.tensor(time_of(schedule, timestep))
            assert float(schedule.network_time(t)) == pytest.approx(timestep, abs=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs, bright against dark, a third of them ties."""
    return pickapic(tmp_path_factory.mktemp("pairs") / "pairs.parquet", labels=(1.0, 0.5, 0.0))


def words(clip_folder: Path, data: Path, out: Path, changed: dict[str, Any] | None = None, **keys: Any) -> list[Any]:
    section = {
        "base": str(clip_folder),
        "data": {"path": str(data)},
        "out": str(out),
        "steps": 6,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup_steps": 1,
        "validate_every": 3,
        "checkpoint_every": 2,
        "holdout": 0.2,
        "device": "cpu",
        "cache_dir": str(out.parent / "cache"),
    }
    return [{"train_scorer": section | keys | (changed or {}), "log": {"trackers": []}}]


def go(clip_folder: Path, data: Path, out: Path, model: str = "", **keys: Any) -> recipe.ScorerResult:
    return recipe.train_scorer(resolve([*filter(None, [model]), *words(clip_folder, data, out, **keys)]), quiet=True)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def test_learns_and_exports_what_it_trained(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    result = go(clip_folder, data, tmp_path / "run", steps=12)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 12 and rows[-1]["accuracy"] == 1 and rows[-1]["loss"] < rows[0]["loss"]
    assert result.holdout["holdout/accuracy"] == 1
    assert result.base == go(clip_folder, data, tmp_path / "still", lr=1e-12, steps=1).holdout  # of the base itself
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["data"]["num_pairs"] + facts["data"]["num_holdout"] == 24
    made = build("scorer", {"name": "clip_preference", "path": str(tmp_path / "run" / "export"), "device": "cpu"})
    base = build("scorer", {"name": "clip_preference", "path": str(clip_folder), "device": "cpu"})
    assert np.abs(made.score(pictures(), PROMPTS) - base.score(pictures(), PROMPTS)).max() > 0.01
    again = go(clip_folder, data, tmp_path / "run", steps=12)  # finished: nothing is done twice
    assert again == result and len(read_metrics(tmp_path / "run")) == 12


def test_a_resumed_run_is_an_uninterrupted_one(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    go(clip_folder, data, tmp_path / "whole")
    with interrupted(5):
        go(clip_folder, data, tmp_path / "cut")
    go(clip_folder, data, tmp_path / "cut")
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [[row["loss"] for row in read_metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_micro_batches_give_the_same_step(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    go(clip_folder, data, tmp_path / "whole", steps=2)
    go(clip_folder, data, tmp_path / "split", steps=2, micro_batch_size=1)
    rows = [read_metrics(tmp_path / run) for run in ("whole", "split")]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], rel=1e-4, abs=1e-5)


def test_pairs_of_one_prompt_share_its_weight(clip_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"jpg_0": picture(2 * i, 200), "jpg_1": picture(2 * i + 1, 60), "label_0": 1.0, "caption": text}
        for i, text in enumerate(["one", "two", "two", "two"])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    config = resolve(words(clip_folder, tmp_path / "pairs.parquet", tmp_path / "run", holdout=0.0))
    batch = recipe.set_up(config, True).pairs.batch(0)
    by_prompt = dict(zip(batch.prompts, batch.weight.tolist(), strict=True))
    assert by_prompt == pytest.approx({"one": 0.5, "two": 1 / 6})


def test_a_picture_that_cannot_be_read_is_left_out(clip_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"jpg_0": picture(2 * i, 200), "jpg_1": picture(2 * i + 1, 60), "label_0": 1.0, "caption": f"thing {i}"}
        for i in range(4)
    ]
    rows[2]["jpg_1"] = picture(9, 60)[:200]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    config = resolve(words(clip_folder, tmp_path / "pairs.parquet", tmp_path / "run", holdout=0.0))
    batch = recipe.set_up(config, True).pairs.batch(0)
    assert len(batch) == 3 and "thing 2" not in batch.prompts
    assert float(batch.weight.sum()) == pytest.approx(1)
    assert go(clip_folder, tmp_path / "pairs.parquet", tmp_path / "short", holdout=0.0, steps=2).steps == 2


class _Alone:
    """A reader that notices when two threads read at once: those of files are not made for it."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.readers = reader, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def __getitem__(self, row: int) -> Any:
        self.readers += 1
        assert self.readers == 1
        time.sleep(1e-3)
        record = self.reader[row]
        self.readers -= 1
        return record


def test_validation_beside_the_loader_reads_alone(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    pairs = recipe.set_up(resolve(words(clip_folder, data, tmp_path / "run", holdout=0.4)), True).pairs
    pairs.reader = _Alone(pairs.reader)
    with ThreadPoolExecutor(2) as threads:
        batches = [threads.submit(pairs.batch, step) for step in range(8)]
        assert sum(len(batch) for batch in pairs.holdout()) == len(pairs.holdout_rows)
        assert all(len(batch.result()) == 4 for batch in batches)


def test_pseudo_labels_are_another_scorers_and_computed_once(
    clip_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"name": "clip_preference", "path": str(clip_folder), "device": "cpu"}
    keys = {"labels": "scorer", "label_scorer": judge, "tie_gap": 0.3, "holdout": 0.0}
    trainer = recipe.set_up(resolve(words(clip_folder, data, tmp_path / "run", **keys)), True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "pseudo_labels.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(24))
    gaps = np.tanh(np.diff([row["scores"] for row in rows], axis=1)[:, 0] / -2)
    expected = np.where(np.abs(gaps) <= 0.3, 0.5, gaps > 0)
    assert trainer.pairs.pseudo is not None
    np.testing.assert_array_equal(trainer.pairs.pseudo, expected)
    monkeypatch.setattr("diffalign.recipes.train_scorer._data.judge", lambda *_: pytest.fail("scored twice"))
    recipe.set_up(resolve(words(clip_folder, data, tmp_path / "run", **keys)), True)


@pytest.mark.slow
def test_step_aware_trains_on_previews_and_resumes(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    keys = {"step_aware": True, "cfg_scale": 2.0, "validate_timesteps": [0, 951], "steps": 3, "validate_every": 3}
    result = go(clip_folder, data, tmp_path / "run", "sprites-sdxl", **keys)
    assert set(result.holdout) == {"holdout/accuracy", "holdout/accuracy_t0", "holdout/accuracy_t951"}
    made = build("scorer", {"name": "step_aware", "path": str(tmp_path / "run" / "export"), "device": "cpu"})
    assert made._towers.modulation.final[1].weight.abs().sum() > 0
    # what the export scores at a timestep is what was trained
    trainer = recipe.set_up(resolve(["sprites-sdxl", *words(clip_folder, data, tmp_path / "run", **keys)]), True)
    assert trainer.first_step == 3
    batch, rows = trainer.pairs.batch(0), slice(0, 4)
    t = torch.full((4,), time_of(trainer.previews.model.schedule, 501))
    with torch.no_grad():
        trained = recipe.scores_of(trainer, batch, rows, t)
    seen, times = trainer.previews(batch.latents, batch.ids, batch.visits, t)
    assert seen.shape == (4, 2, 3, 64, 64) and times.tolist() == [501] * 4
    texts = [prompt for prompt in batch.prompts for _ in range(2)]
    found = made.score_tensor(seen.flatten(0, 1), texts, times.repeat_interleave(2))
    torch.testing.assert_close(found.reshape(4, 2), trained, atol=1e-4, rtol=0)
    # goes on from its own export, modulation and all
    go(tmp_path / "run" / "export", data, tmp_path / "more", "sprites-sdxl", **keys | {"steps": 1})


@pytest.mark.slow
def test_the_modulation_has_its_own_rate_also_after_a_resume(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    """AdamW's first steps are as long as the rate, whatever the gradient."""
    keys = {"step_aware": True, "cfg_scale": 1.0, "validate_every": 0, "lr": 1e-6, "modulation_lr": 1e-3}
    keys |= {"weight_decay": 0.0, "lr_schedule": "constant", "warmup_steps": 0, "checkpoint_every": 1}
    config = resolve(["sprites-sdxl", *words(clip_folder, data, tmp_path / "run", **keys, steps=2)])
    trainer = recipe.set_up(config, True)
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    for step in range(2):
        recipe.train_step(trainer, trainer.pairs.batch(step), step)
        setup.save(trainer, step + 1)
        trainer = recipe.set_up(config, True)
    moved = {name: float((value.detach() - before[name]).abs().max()) for name, value in trainer.parameters.items()}
    assert 0 < max(value for name, value in moved.items() if name.startswith("clip")) < 3e-6
    assert 1e-3 < max(value for name, value in moved.items() if name.startswith("modulation")) < 3e-3


class _Model:
    """A model whose denoiser returns what it is given and whose decoder shows the latents."""

    schedule = VariancePreserving(torch.linspace(0.999, 0.01, 1000), prediction="sample")
    device, resolution = torch.device("cpu"), (8, 8)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        return {"text": torch.zeros(1, 2)}

    def size_cond(self, *_: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def adapter_off(self) -> Any:
        return torch.no_grad()

    def __call__(self, xt: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.append(xt)
        return xt

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_a_pair_shares_noise_and_timestep_and_nothing_depends_on_the_batch() -> None:
    model = _Model()
    previews = Previews(model, 1.0, seed=0)
    ids, visits = torch.tensor([11, 22, 33]), torch.tensor([0, 0, 4])
    mean = torch.randn(3, 2, 3, 8, 8)
    latents = {"mean": mean, "std": torch.zeros_like(mean), "text": {"text": torch.zeros(3, 2, 2)}}
    t = previews.draw(ids, visits)
    assert torch.equal(previews.draw(ids[1:2], visits[1:2]), t[1:2]) and len(t.unique()) == 3
    _, times = previews(latents, ids, visits, t)
    torch.testing.assert_close(times, t * 1000 - 1)
    xt = model.seen[0].unflatten(0, (3, 2))
    alpha, sigma = (values[:, None, None, None, None] for values in model.schedule.alpha_sigma(t))
    noise = (xt - alpha * mean) / sigma
    torch.testing.assert_close(noise[:, 0], noise[:, 1], atol=1e-3, rtol=1e-3)
    assert (noise[0, 0] - noise[1, 0]).abs().mean() > 0.5
    one = {"mean": mean[2:], "std": torch.zeros_like(mean[2:]), "text": {"text": torch.zeros(1, 2, 2)}}
    previews(one, ids[2:], visits[2:], t[2:])
    assert torch.equal(model.seen[1], model.seen[0][4:])


def test_bad_input_is_one_line(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    def refused(match: str, **keys: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            recipe.train_scorer(resolve(words(clip_folder, data, tmp_path / "bad", keys)), quiet=True)
        assert "\n" not in str(error.value)

    refused("train_scorer.base is missing", base=None)
    refused("no such folder", base="/nowhere")
    refused("train_scorer.data.path is missing", data={})
    refused("no model configured", step_aware=True)
    refused("go together", labels="scorer")
    refused("go together", label_scorer="sprites_gold")
    refused("tie_gap", tie_gap=1.0)
    refused("modulation_lr is for train_scorer.step_aware", modulation_lr=1e-3)
    refused("steps must be at least 1", steps=0)
    refused("scorer sprites_gold: ", labels="scorer", label_scorer="sprites_gold")  # no sprites captions


def test_lists_are_refused_and_changed_data_too(clip_folder: Path, data: Path, tmp_path: Path) -> None:
    from diffalign.data import RecordWriter
    from diffalign.types import Record

    with RecordWriter(tmp_path / "lists") as writer:
        for i in range(3):
            images = tuple(picture(3 * i + k, 100) for k in range(3))
            writer.write(Record(i, f"thing {i}", images, (2.0, 1.0, 0.0)))
    with pytest.raises(UserError, match="3 images; train-scorer compares pairs"):
        go(clip_folder, tmp_path / "lists", tmp_path / "listed", holdout=0.0)
    go(clip_folder, data, tmp_path / "run", steps=1)
    with pytest.raises(UserError, match="belongs to a different config"):
        go(clip_folder, data, tmp_path / "run", steps=2)
    changed = pickapic(tmp_path / "pairs.parquet", num=8)
    go(clip_folder, changed, tmp_path / "other", steps=1, holdout=0.0)
    pickapic(changed, num=9)
    with pytest.raises(UserError, match="the data changed"):
        go(clip_folder, changed, tmp_path / "other", steps=1, holdout=0.0)


def test_command_line(clip_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [
        f"train_scorer.base={clip_folder}",
        f"train_scorer.data.path={data}",
        f"train_scorer.out={tmp_path / 'run'}",
    ]
    keys += ["train_scorer.steps=1", "train_scorer.batch_size=2", "train_scorer.device=cpu", "log.trackers=[]"]
    assert main(["train-scorer", "--quiet", *keys, "train_scorer.holdout=0.2"]) == 0
    assert re.search(r"scorer in .*held out: holdout/accuracy \d\.\d+ \(base \d\.\d+\)", capsys.readouterr().out)
    assert main(["train-scorer", "--quiet", *keys[1:]]) == 2
    assert "train_scorer.base is missing" in capsys.readouterr().err
