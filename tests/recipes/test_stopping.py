"""Early stopping, the best weights and the over-optimisation alarm: decisions from metrics, and runs on a tiny twin."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from makers import pickapic, tokens
from safetensors.torch import load_file

from diffalign import checkpoint
from diffalign.config import Stop, fingerprint, resolve
from diffalign.metrics import read_metrics
from diffalign.recipes._preferences import HOLDOUT_METRICS, holdout_metrics
from diffalign.recipes._samples import sample_metrics
from diffalign.recipes._stopping import Decision, decide
from diffalign.recipes.train import train
from diffalign.types import ScorerInfo, UserError

STEPS = {"done": 0}  # of the run under test: what the scripted scorers below go by


@dataclass(frozen=True)
class Rising:
    """Scores that rise with the training steps."""

    info: ClassVar[ScorerInfo] = ScorerInfo("rising", "1", ("image",), "steps", (0.0, 100.0))

    def score(self, images: list, prompts: list[str]) -> np.ndarray:
        return np.array([STEPS["done"] + 0.01 * index for index in range(len(images))], np.float32)


@dataclass(frozen=True)
class Peaking:
    """Scores that are best at the second sampling."""

    info: ClassVar[ScorerInfo] = ScorerInfo("peaking", "1", ("image",), "steps", (-100.0, 0.0))

    def score(self, images: list, prompts: list[str]) -> np.ndarray:
        return np.array([-abs(STEPS["done"] - 1) + 0.01 * index for index in range(len(images))], np.float32)


@dataclass(frozen=True)
class Picky:
    """A scorer that knows no prompt."""

    info: ClassVar[ScorerInfo] = ScorerInfo("picky", "1", ("prompt",), "none", (0.0, 0.0))

    def score(self, images: list, prompts: list[str]) -> np.ndarray:
        raise ValueError(f"cannot judge {prompts[0]!r}")


RISING, PEAKING, PICKY = (f"test_stopping:{name}" for name in ("Rising", "Peaking", "Picky"))
SAMPLED = {
    "train__steps": 8,
    "train__sample_every": 1,
    "train__validate_every": 0,
    "train__keep_checkpoints": 1,
    "train__sample_prompts": "[a thing, a sphere]",
    "stop__scorers": f"[{RISING}, {PEAKING}]",
}
EARLY = {**SAMPLED, "stop__metric": f"samples/{PEAKING}", "stop__patience": 3, "stop__restore_best": "true"}
ALARM = {
    **SAMPLED,
    "stop__metric": f"samples/{PEAKING}",
    "stop__alarm": "rollback",
    "stop__train_scorer": RISING,
}


class Interrupted(Exception):
    pass


def go(folder: Path, out: str, interrupt_after: int = 0, **overrides: object):
    """A run whose scorers know its step; the interruption falls between two steps."""

    def callback(step: int, metrics: object) -> None:
        STEPS["done"] = step + 1
        if step + 1 == interrupt_after:
            raise Interrupted

    found = checkpoint.newest(folder / out)
    STEPS["done"] = checkpoint.load(found).step if found else 0
    return train(resolve(tokens("sd15", folder, out, **overrides)), [callback], quiet=True)


def rows_of(run: Path) -> list[dict]:
    """The metrics without the one that is a clock."""
    return [{key: value for key, value in row.items() if key != "pairs_per_second"} for row in read_metrics(run)]


def exported(run: Path) -> list[torch.Tensor]:
    weights = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    return sorted((w for w in weights.values()), key=lambda w: (tuple(w.shape), w.flatten().tolist()))


def of_checkpoint(path: Path) -> list[torch.Tensor]:
    return sorted(checkpoint.load(path).weights.values(), key=lambda w: (tuple(w.shape), w.flatten().tolist()))


def assert_exports(run: Path, path: Path, same: bool = True) -> None:
    pairs = zip(exported(run), of_checkpoint(path), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) is same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stopping")
    pickapic(root / "pairs.parquet", num=12)
    return root


@pytest.fixture(scope="module")
def early_run(folder: Path) -> Path:
    result = go(folder, "early", **EARLY)
    assert result.steps == 5 and result.check["exported_step"] == 2
    return folder / "early"


# decisions are a function of the rows


def validations(*values: float | None) -> list[dict]:
    return [{"step": 10 * k + 9, "holdout/margin": value} for k, value in enumerate(values)]


@pytest.mark.parametrize(
    "values,options,best_step,ends",
    [
        ([0.1, 0.3, 0.2], {"patience": 2}, 20, False),
        ([0.1, 0.3, 0.2, 0.3], {"patience": 2}, 20, True),  # equal is no improvement
        ([0.1, 0.3, 0.2, 0.4], {"patience": 2}, 40, False),
        ([0.1, 0.15, 0.19], {"patience": 2, "min_delta": 0.1}, 10, True),
        ([0.1, 0.15, 0.21], {"patience": 2, "min_delta": 0.1}, 30, False),  # counted from the best
        ([0.3, 0.1, 0.2], {"patience": 2, "mode": "min"}, 20, False),
        ([-0.3, -0.1, -0.2], {"patience": 2, "mode": "min"}, 10, True),
        ([0.3, None, None], {"patience": 2}, 10, True),  # what is not finite improves nothing
        ([None, None], {"patience": 2}, 0, True),
        ([0.3, 0.2, 0.1, 0.0], {}, 10, False),
        ([], {"patience": 1}, 0, False),
    ],
)
def test_early_stopping(values, options, best_step, ends):
    decision = decide(validations(*values), Stop(metric="holdout/margin", **options))
    assert (decision.best_step, decision.ends) == (best_step, ends)
    assert bool(decision.reason) is ends
    assert decision.is_best is (best_step > 0 and best_step == 10 * len(values))


def samplings(train_scores, held_out=None, second=None, diversity=None, se=0.1) -> list[dict]:
    columns = {"a": train_scores, "b": held_out, "c": second, "diversity": diversity}
    steady = [1.0] * len(train_scores)
    return [
        {"step": k}
        | {f"samples/{name}": (values or steady)[k] for name, values in columns.items()}
        | {f"samples/{name}_se": se for name in columns}
        for k in range(len(train_scores))
    ]


@pytest.mark.parametrize(
    "rows,rings",
    [
        (samplings([1, 2, 3], [3, 2, 1], [3, 2, 1]), True),
        (samplings([1, 2, 3], [3, 2, 1]), False),  # one of two held-out scorers stands
        (samplings([1, 2, 3], diversity=[3, 3, 1]), True),  # the diversity alone is enough
        (samplings([3, 2, 1], [3, 2, 1], [3, 2, 1], [3, 2, 1]), False),  # all fall: not what the alarm is for
        (samplings([1, 2, 0.95], [3, 2, 1], [3, 2, 1]), True),  # within a standard error of where it began
        (samplings([1, 2, 0.85], [3, 2, 1], [3, 2, 1]), False),  # below
        (samplings([1], [3], [3]), False),
        (samplings([1, 2, 3, 4], [1, 3, 2.5, 2.7], [3, 1, 1, 1]), True),  # each from its own best
        (samplings([1, 2, 3], [1.15, 1, 0.96], [1.15, 1, 0.96]), False),  # within two standard errors
        (samplings([1, 2, 3], [3, 2, 1], [3, 2, 1], se=None), False),
        (samplings([1, 2, 3], [3, 2, None], [3, 2, 1]), False),
        (samplings([1, 2, 3], [3, 2, 1], [3, 2, 1]) + [{"step": 3, "holdout/margin": 1.0}], False),  # rang before
    ],
)
def test_the_alarm(rows, rings):
    stop = Stop(scorers=("a", "b", "c"), alarm="warn", train_scorer="a")
    decision = decide(rows, stop)
    assert bool(decision.alarm) is rings and not decision.ends
    assert not decide(rows, Stop(scorers=("a", "b", "c"))).alarm
    acts = Stop(metric="samples/b", scorers=("a", "b", "c"), alarm="rollback", train_scorer="a")
    assert (decide(rows, acts).ends, decide(rows, acts).rolls_back) == (rings, rings)


def test_the_alarm_watches_the_scorers_it_is_told_to():
    rows = samplings([1, 2, 3], [3, 2, 1])
    stop = Stop(scorers=("a", "b", "c"), alarm="stop", train_scorer="a", held_out_scorers=("b",))
    assert decide(rows, stop).ends and "b 3 to 1" in decide(rows, stop).reason


def test_sample_metrics():
    pictures = np.zeros((4, 16, 16, 3), np.uint8)
    pictures[1] = 255
    STEPS["done"] = 1
    found = sample_metrics(pictures, ["x", "y"], 2, {"r": Rising()})
    assert found["samples/r"] == pytest.approx(1.015) and found["samples/r_se"] == pytest.approx(0.01)
    assert found["samples/diversity"] == pytest.approx((2 + 1) / 2, abs=1e-3)  # x shows two things, y one twice
    over_prompts = sample_metrics(pictures, ["a", "b", "c", "d"], 1, {})
    assert 1 < over_prompts["samples/diversity"] < 2 and over_prompts["samples/diversity_se"] > 0
    assert np.isnan(sample_metrics(pictures[:2], ["a", "b"], 1, {})["samples/diversity_se"])  # two say nothing


# runs


def test_it_is_off_by_default_and_then_changes_nothing(folder):
    go(folder, "plain", train__steps=2, train__sample_every=1)
    names = {name for row in read_metrics(folder / "plain") for name in row}
    assert not any(name.startswith("samples/") or name == "alarm" for name in names)
    assert not list((folder / "plain").glob("checkpoints/best-*")) and not (folder / "plain/alarm.json").exists()
    assert set(json.loads((folder / "plain/export_check.json").read_text())) >= {"steps", "problems"}
    assert not Stop().decides and decide([], Stop()) == Decision()
    # a run folder from before the section existed still belongs to its config
    config = resolve(["sdxl", "diffusion-dpo"]).to_dict()
    assert fingerprint(config) == fingerprint({key: value for key, value in config.items() if key != "stop"})
    stopped = resolve(["sdxl", "diffusion-dpo", "stop.metric=holdout/margin"]).to_dict()
    assert fingerprint(config) != fingerprint(stopped)


def test_validations_tell_ranking_and_displacement(folder):
    row = read_metrics(folder / "plain")[-1]
    assert 0 <= row["holdout/ranking_accuracy"] <= 1 and 0 <= row["holdout/share_displaced"] <= 1
    assert row["holdout/winner_displacement"] != 0


def test_ranking_is_over_prompts_that_somebody_won():
    nan = torch.nan
    measured = {  # right by both; right since trained, winner worse; a tie; a candidate missing
        "margin": torch.tensor([1.0, 2.0, 3.0, nan]),
        "utility": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]),
        "logp": torch.tensor([[-0.1, -0.2], [-0.6, -0.5], [-0.9, -0.1], [-0.1, nan]]),
        "logp_ref": torch.tensor([[-0.2, -0.3], [-0.3, -0.4], [-0.1, -0.1], [-0.1, nan]]),
    }
    found = holdout_metrics(measured)
    assert found["holdout/num_prompts"] == 3 and found["holdout/margin"] == 2
    assert found["holdout/ranking_accuracy"] == 1 and found["holdout/reference_ranking_accuracy"] == 0.5
    assert found["holdout/winner_displacement"] == pytest.approx((-0.2 + 0.2) / 2, abs=1e-7)
    assert found["holdout/share_displaced"] == 0.5
    assert {f"holdout/{name}" for name in HOLDOUT_METRICS} == set(found)
    del measured["logp_ref"]
    assert "holdout/ranking_accuracy" in (without := holdout_metrics(measured))
    assert "holdout/winner_displacement" not in without and holdout_metrics({}) == {}


def test_early_stopping_ends_at_the_right_step_and_exports_the_best(early_run):
    rows = read_metrics(early_run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]  # best after 2 steps, and three more
    check = json.loads((early_run / "export_check.json").read_text())
    assert check["steps"] == 5 and check["exported_step"] == 2 and "did not improve" in check["ended_early"]
    names = [path.name for path in sorted((early_run / "checkpoints").iterdir())]
    assert names == ["best-00000002", "step-00000005"]  # rotation keeps one, and the best is none of it
    assert_exports(early_run, early_run / "checkpoints/best-00000002")
    assert_exports(early_run, early_run / "checkpoints/step-00000005", same=False)


@pytest.mark.parametrize("after", [2, 3, 5])
def test_an_interrupted_run_comes_to_the_same_end(after, folder, early_run):
    """Cut off at its best, between, and with the decision made but nothing exported."""
    out = f"cut-{after}"
    with pytest.raises(Interrupted):
        go(folder, out, interrupt_after=after, **EARLY)
    result = go(folder, out, **EARLY)
    assert (result.steps, result.check["exported_step"]) == (5, 2)
    assert rows_of(folder / out) == rows_of(early_run)
    assert_exports(folder / out, early_run / "checkpoints/best-00000002")


def test_a_run_never_resumes_from_before_its_best(folder, early_run):
    """Checkpoints are rare, so the best one is the newest there is."""
    rare = {**EARLY, "train__checkpoint_every": 100}
    with pytest.raises(Interrupted):
        go(folder, "rare", interrupt_after=4, **rare)
    assert [path.name for path in (folder / "rare/checkpoints").iterdir()] == ["best-00000002"]
    assert go(folder, "rare", **rare).check["exported_step"] == 2
    assert rows_of(folder / "rare") == rows_of(early_run)


def test_a_finished_run_stays_finished_and_export_takes_its_weights(folder, early_run):
    before = (early_run / "metrics.jsonl").read_bytes()
    assert go(folder, "early", **EARLY).steps == 5
    assert (early_run / "metrics.jsonl").read_bytes() == before
    from diffalign.api import export

    out = export(configs=[{"export": {"run": str(early_run), "out": str(folder / "by-hand")}}])
    name = "pytorch_lora_weights.safetensors"
    ours, again = load_file(early_run / "export" / name), load_file(out / name)
    assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_validations_stop_runs_too_and_are_logged_whatever_the_lines(folder):
    """num_prompts never changes: the first is best; lines every 100 steps still hold what was decided from."""
    overrides = {"stop__metric": "holdout/num_prompts", "stop__patience": 1, "train__steps": 9, "log__every": 100}
    assert go(folder, "flat", **overrides).steps == 4
    assert [row["step"] for row in read_metrics(folder / "flat")] == [0, 1, 3]


def test_the_alarm_rings_and_rolls_back(folder, capsys):
    """Rising rises from the start; Peaking, the held-out one, peaks at sampling 2."""
    result = go(folder, "alarm", **ALARM)
    run = folder / "alarm"
    assert result.steps == 3 and result.check["exported_step"] == 2
    assert [row["alarm"] for row in read_metrics(run)] == [0, 0, 1]
    said = [line for line in capsys.readouterr().err.splitlines() if "alarm after step 3" in line]
    assert len(said) == 1 and "Rising" in said[0] and "Peaking" in said[0]
    told = json.loads((run / "alarm.json").read_text())
    assert told["step"] == 3 and told["action"] == "rollback" and told["best_step"] == 2
    assert_exports(run, run / "checkpoints/best-00000002")
    shutil.rmtree(run / "export")
    (run / "export_check.json").unlink()
    assert go(folder, "alarm", **ALARM).steps == 3  # killed before its export: decides again, from the file
    assert_exports(run, run / "checkpoints/best-00000002")


def test_the_alarm_only_warns_where_it_is_told_to(folder, capsys):
    result = go(folder, "warned", **{**ALARM, "stop__alarm": "warn", "train__steps": 5})
    assert result.steps == 5 and "exported_step" not in result.check
    assert_exports(folder / "warned", folder / "warned/checkpoints/step-00000005")
    assert [row["alarm"] for row in read_metrics(folder / "warned")] == [0, 0, 1, 1, 1]
    assert capsys.readouterr().err.count("alarm after step") == 3


@pytest.mark.parametrize(
    "overrides,match",
    [
        ({"stop__patience": 3}, "stop.patience needs stop.metric"),
        ({"stop__restore_best": "true"}, "stop.restore_best needs stop.metric"),
        ({"stop__patience": -1}, "stop.patience must be at least 0"),
        ({"stop__metric": "loss"}, "stop.metric must be holdout/"),
        ({"stop__metric": "holdout/margn"}, "Did you mean 'margin'"),
        ({"stop__metric": "holdout/margin", "train__validate_every": 0}, "set train.validate_every"),
        ({"stop__metric": "holdout/margin", "source__holdout": 0}, "source.holdout"),
        ({"stop__metric": "holdout/margin", "objective__name": "sft"}, "no held-out margin"),
        ({"stop__metric": "samples/sprites_gold"}, "stop.scorers"),
        ({"stop__mode": "most"}, "stop.mode"),
        ({"stop__scorers": f"[{RISING}]"}, "set train.sample_every"),
        ({**SAMPLED, "stop__scorers": "[sprites_gld]"}, "Did you mean 'sprites_gold'"),
        ({**SAMPLED, "stop__scorers": f"[{PICKY}]"}, "cannot judge 'a thing'"),
        ({**SAMPLED, "stop__metric": "samples/gold"}, "no such sample metric"),
        ({**SAMPLED, "stop__alarm": "warn"}, "stop.alarm needs stop.train_scorer"),
        ({**SAMPLED, "stop__alarm": "warn", "stop__train_scorer": "x"}, "stop.train_scorer: 'x' is not in"),
        ({**SAMPLED, "stop__alarm": "rollback", "stop__train_scorer": RISING}, "stop.alarm=rollback needs stop.metric"),
        ({**ALARM, "stop__held_out_scorers": f"[{RISING}]"}, "so it is not held out"),
        ({**ALARM, "train__sample_prompts": "[a thing]"}, "two or more train.sample_prompts"),
        ({"stop__seeds": 2}, "stop.seeds is for stop.scorers"),
        ({"stop__alarm": "of"}, "stop.alarm"),
    ],
)
def test_bad_settings_are_one_clear_line(overrides, match, folder):
    with pytest.raises(UserError, match=match) as caught:
        go(folder, "refused", **{"train__steps": 1, **overrides})
    assert "\n" not in str(caught.value)
    assert not (folder / "refused" / "checkpoints").exists()
    shutil.rmtree(folder / "refused", ignore_errors=True)


def test_off_is_a_word_and_not_a_truth_value():
    assert resolve(["sdxl", "diffusion-dpo", "stop.alarm=off"]).stop.alarm == "off"
