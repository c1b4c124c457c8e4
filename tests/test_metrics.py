"""metrics.jsonl through kills and resumes, reductions and buckets."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign._atomic import write_atomic
from diffalign._json import finite, to_json
from diffalign.metrics import MetricsLog, by_bucket, read_metrics, reduce
from diffalign.types import UserError


def test_reduce_ignores_what_does_not_apply() -> None:
    metrics = {
        "loss": torch.tensor([1.0, 3.0]),
        "tie": torch.tensor([math.nan, 2.0]),
        "none": torch.tensor([math.nan, math.nan]),
        "grad": torch.ones(2, requires_grad=True),
    }
    result = reduce(metrics)
    assert (result["loss"], result["tie"], result["grad"]) == (2.0, 2.0, 1.0) and math.isnan(result["none"])
    assert reduce({}) == {}


def test_buckets_by_noise_level() -> None:
    t = torch.tensor([0.0, 0.25, 0.2501, 0.6, 1.0])
    result = by_bucket(torch.tensor([1.0, 3.0, 5.0, math.nan, 7.0]), t, name="margin")
    assert result == {"margin/t0.0-0.25": 2.0, "margin/t0.25-0.5": 5.0, "margin/t0.75-1.0": 7.0}


@pytest.mark.parametrize("num_buckets", [4, 10])
def test_discrete_grid_falls_evenly_into_buckets(num_buckets: int) -> None:
    t = (torch.arange(1000) + 1) / 1000  # float32, as a training step draws them
    means = by_bucket(torch.arange(1000.0), t, num_buckets)
    width = 1000 / num_buckets
    assert list(means.values()) == pytest.approx([k * width + (width - 1) / 2 for k in range(num_buckets)])


def test_rows_are_finite_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": math.nan, "lr": np.float32(0.5), "margin": torch.tensor(2.0), "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "lr": 0.5, "margin": 2.0, "grad_norm": None}]


def test_resume_forgets_the_steps_that_run_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.log(step, {"loss": float(step)})
    with MetricsLog(tmp_path) as log:
        log.resume(4)
        log.log(5, {"loss": 50.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] == 50.0 and rows[3]["loss"] == 4.0


def test_resume_before_and_beyond_all_rows(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    MetricsLog(tmp_path).resume(9)
    assert len(read_metrics(tmp_path)) == 1
    MetricsLog(tmp_path).resume(-1)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "{}\x00\x00"])
def test_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n' + torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsLog(tmp_path) as log:  # and the next row does not continue it
        log.log(2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_broken_middle_line_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        read_metrics(path)


def test_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_metrics(tmp_path / "run" / "metrics.jsonl")


def test_steps_must_rise(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(3, {})
        with pytest.raises(AssertionError, match="step 3"):
            log.log(3, {})


def test_sigkill_loses_no_logged_step(tmp_path: Path) -> None:
    child = os.fork()  # a fresh interpreter would spend seconds on imports
    if child == 0:
        log = MetricsLog(tmp_path)
        for step in range(1, 6):
            log.log(step, {"loss": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_tensorboard_mirror_survives_a_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 4), (3, 5)):
        with MetricsLog(tmp_path, ["tensorboard"]) as log:
            log.resume(first - 1)
            for step in range(first, last + 1):
                log.log(step, {"loss": float(step * 10 + first), "note": "text", "empty": math.nan})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 11), (2, 21), (3, 33), (4, 43), (5, 53)]


def test_trackers_are_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(UserError, match=r"wandb is not installed.*diffalign\[track\]"):
        MetricsLog(tmp_path / "run", ["wandb"])
    with pytest.raises(UserError, match="unknown tracker 'mlflow'"):
        MetricsLog(tmp_path / "run", ["mlflow"])
    assert not (tmp_path / "run").exists()


def test_wandb_run_continues_on_resume_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, object]]] = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(("init", options))  # type: ignore[attr-defined]
    fake.log = lambda values, step: calls.append(("log", {**values, "step": step}))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append(("finish", {}))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (None, 1, -1):
        with MetricsLog(tmp_path, ["wandb"], project="cats") as log:
            if resumed is not None:
                log.resume(resumed)
            log.log(1 if resumed is None or resumed < 0 else 2, {"loss": 1.0, "bad": math.nan})
    ids = [options["id"] for name, options in calls if name == "init"]
    assert ids[0] == ids[1] != ids[2]
    assert calls[0][1]["project"] == "cats" and calls[1] == ("log", {"loss": 1.0, "step": 1})
    assert [name for name, _ in calls] == ["init", "log", "finish"] * 3


def test_finite_json() -> None:
    value = {"a": [1.0, -math.inf], "b": np.array([[math.nan, 2.0]]), "c": Path("x"), 4: (True, None), "d": np.int64(3)}
    assert finite(value) == {"a": [1.0, None], "b": [[None, 2.0]], "c": "x", "4": [True, None], "d": 3}
    assert json.loads(to_json({"prompt": "\ud800 lone"}))["prompt"] == "\ud800 lone"
    with pytest.raises(TypeError, match="object has no JSON form"):
        finite(object())


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "page.html"
    write_atomic(path, "old")
    write_atomic(path, "\ud800\u00e9")
    assert path.read_bytes() == "?\u00e9".encode() and list(path.parent.iterdir()) == [path]
