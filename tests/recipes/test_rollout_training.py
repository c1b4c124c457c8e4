"""Training on the policy's own pictures: resumed, in several processes, on finished images and on sampler steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from makers import run_cli
from safetensors.torch import load_file

from diffalign import api
from diffalign.config import resolve
from diffalign.data import Shard
from diffalign.metrics import read_metrics
from diffalign.models import sdxl
from diffalign.recipes.train import set_up, train_step
from diffalign.types import ScorerInfo, UserError

FILE = "pytorch_lora_weights.safetensors"
STEPS, PER_ROUND = 5, 2


@dataclass
class Bright:
    """The mean of a picture; the scorer may be told at which of its calls to be interrupted."""

    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image",), "of 255", (0.0, 255.0))
    interrupt_at: ClassVar[int] = 0
    calls: ClassVar[int] = 0

    def score(self, images: list[Any], prompts: list[str]) -> list[float]:
        Bright.calls += 1
        if Bright.calls == Bright.interrupt_at:
            raise KeyboardInterrupt
        return [float(np.asarray(image, dtype=np.float64).mean()) for image in images]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rollout")
    sdxl.build_tiny(root / "tiny")
    (root / "prompts.txt").write_text("a red thing\ntwo things\nsomething blue\n")
    return root


KINDS: dict[str, dict[str, Any]] = {
    "images": {"likelihood": {"name": "elbo"}, "objective": {"name": "pair", "beta": 200}},
    "steps": {
        "source": {"record": "steps", "branch_at": 0},
        "likelihood": {"name": "step"},
        "objective": {"name": "pair", "beta": 5},
    },
    "groups": {
        "source": {"record": "steps", "compare": "groups", "images_per_prompt": 3, "steps_used": 1},
        "likelihood": {"name": "step"},
        "objective": {"name": "grpo", "clip": 0.2},
    },
    "guard": {
        "source": {"record": "steps", "record_means": True, "compare": "groups", "images_per_prompt": 3},
        "likelihood": {"name": "step", "ratio": "normalized"},
        "objective": {"name": "grpo", "clip": 0.2},
    },
    "pool": {  # sampled from a past self, which is the reference too
        "source": {"record": "trajectories", "sample_from": "reference"},
        "likelihood": {"name": "step"},
        "reference": {"name": "checkpoint_pool", "every": 3, "size": 2},
        "objective": {"name": "pair", "beta": 5},
    },
}


def sections(folder: Path, out: str, kind: str = "images", **more: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "sdxl", "path": str(folder / "tiny"), "dtype": "float32"},
        "source": {
            "name": "rollout",
            "prompts": str(folder / "prompts.txt"),
            "scorers": [{"name": "test_rollout_training:Bright", "as": "bright"}],
            "prompts_per_round": 2,
            "steps_per_round": PER_ROUND,
            "sampling": {"num_steps": 3, "cfg_scale": 1.0, "batch_size": 2},
            "cache_dir": str(folder / "cache"),
        },
        "reference": {"name": "adapter_off"},
        "train": {
            "out": str(folder / out),
            "steps": STEPS,
            "batch_size": 2,
            "lr": 1e-3,
            "device": "cpu",
            "checkpoint_every": 100,
            "validate_every": 2,
            "sample_prompts": ["two things"],
        },
        "sampling": {"num_steps": 1, "cfg_scale": 1.0},
        "log": {"trackers": []},
    }
    for extra in (KINDS[kind], more):
        for name, values in extra.items():
            base[name] = {**base.get(name, {}), **values}
    return base


class Interrupted(KeyboardInterrupt):
    pass


def go(folder: Path, out: str, kind: str = "images", interrupt_after: int | None = None, **more: Any) -> Any:
    def interrupt(step: int, metrics: object) -> None:
        if step + 1 == interrupt_after:
            raise Interrupted

    return api.train(callbacks=[interrupt], quiet=True, **sections(folder, out, kind, **more))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / FILE)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def made(run: Path) -> dict[str, bytes]:
    """Everything that the rounds left."""
    paths = (path for path in sorted((run / "rounds").rglob("*")) if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.suffix != ".parquet"}


@pytest.fixture(scope="module")
def whole(folder: Path):
    """kind -> the folder of an uninterrupted run, made once."""

    def get(kind: str) -> Path:
        if not (folder / f"whole-{kind}" / "export").is_dir():
            go(folder, f"whole-{kind}", kind)
        return folder / f"whole-{kind}"

    return get


def assert_same_run(found: Path, wanted: Path) -> None:
    assert losses(found) == losses(wanted)
    ours, theirs = weights(found), weights(wanted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made(found) == made(wanted)


@pytest.mark.parametrize(
    "kind,after,every",
    [
        *(("images", after, every) for after, every in ((3, 1), (3, 100))),
        *(("steps", after, every) for after, every in ((1, 100), (2, 100), (3, 1))),
        *(("groups", after, every) for after, every in ((3, 1),)),
        *(("pool", after, every) for after, every in ((2, 100), (4, 1), (4, 100))),
    ],
)
def test_interrupted_equals_uninterrupted(kind, after, every, whole, folder):
    """In the middle of a round or at its end, with checkpoints of every step or of the rounds' beginnings alone."""
    out, more = f"cut-{kind}-{after}-{every}", {"train": {"checkpoint_every": every}}
    with pytest.raises(Interrupted):
        go(folder, out, kind, interrupt_after=after, **more)
    go(folder, out, kind, **more)
    assert_same_run(folder / out, whole(kind))


@pytest.mark.parametrize("kind,call", [("images", 2), ("steps", 4)])
def test_interrupted_while_a_round_is_made(kind, call, whole, folder, monkeypatch):
    wanted = whole(kind)
    monkeypatch.setattr(Bright, "calls", 0)
    monkeypatch.setattr(Bright, "interrupt_at", call)
    out = f"making-{kind}-{call}"
    with pytest.raises(KeyboardInterrupt):
        go(folder, out, kind)
    go(folder, out, kind)
    assert Bright.calls == 2 * 3 + 1  # two parts a round, of three rounds; none is judged twice
    assert_same_run(folder / out, wanted)


def test_files_that_are_gone_stop_a_run_in_the_middle_of_a_round(folder):
    more = {"train": {"checkpoint_every": 1}}
    with pytest.raises(Interrupted):
        go(folder, "gone", interrupt_after=3, **more)
    (folder / "gone" / "rounds" / "round-00001" / "part-00000.safetensors").unlink()
    with pytest.raises(UserError, match="part-00000.safetensors is gone") as error:
        go(folder, "gone", **more)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_tells_what_it_did(kind, whole):
    run = whole(kind)
    rows = read_metrics(run)
    assert len(rows) == STEPS
    wanted = {f"rollout/{name}" for name in ("images", "units", "bright", "kept_prompts", "unjudged", "seconds")}
    for step, row in enumerate(rows):
        assert (wanted <= row.keys()) == (step % PER_ROUND == 0)
    assert not any(name.startswith("holdout/") for row in rows for name in row)
    facts = json.loads((run / "run.json").read_text())["data"]
    assert facts["fingerprint"].startswith("prompts-") and facts["scorers"]["bright"]["unit"] == "of 255"
    check = json.loads((run / "export_check.json").read_text())
    assert check["problems"] == [] and check["image_max_difference"] > 0
    assert len(build_data(run)) == 3 * 2
    assert sum(path.suffix == ".safetensors" for path in (run / "rounds").rglob("*")) == 2 * 2  # of two rounds


def build_data(run: Path) -> Any:
    return api.build("data", {"name": "auto", "path": str(run / "rounds")})


def test_rounds_are_logged_whatever_the_interval(folder):
    go(folder, "rarely", log={"trackers": [], "every": 100})
    assert [row["step"] for row in read_metrics(folder / "rarely") if "rollout/units" in row] == [0, 2, 4]


def test_rounds_come_from_the_weights_of_their_beginning(whole, folder):
    """The second round is what a fresh process samples with the weights after the first."""
    run = whole("steps")
    config = resolve([sections(folder, "whole-steps", "steps")])
    trainer = set_up(config)
    assert trainer.done == STEPS
    old = Shard(run / "rounds" / "round-00001" / "part-00000.safetensors").rows("x", 0, 1)
    new = Shard(run / "rounds" / "round-00002" / "part-00000.safetensors").rows("x", 0, 1)
    assert not np.array_equal(old, new)
    with pytest.raises(Interrupted):
        go(folder, "again", "steps", interrupt_after=2)
    resumed = set_up(resolve([sections(folder, "again", "steps")]))
    assert resumed.first_step == 0 or not resumed.batches.is_ready(2)


@pytest.mark.parametrize("kind", ["steps", "groups"])
def test_the_first_step_of_a_round_is_on_policy(kind, whole, folder):
    """The recorded densities are the policy's own; the reference of a first step is the base, hence a margin of 0."""
    first = read_metrics(whole(kind))[0]
    if kind == "steps":
        assert first["margin"] == 0
    else:
        assert first["ratio_deviation"] < 1e-4 and first["clip_fraction"] == 0
        assert all(row["ratio_deviation"] < 1e-4 for row in read_metrics(whole(kind))[::PER_ROUND])
        assert max(row["ratio_deviation"] for row in read_metrics(whole(kind))[1::PER_ROUND]) > 1e-4


@pytest.mark.parametrize("kind", ["images", "steps"])
def test_a_refreshed_reference_starts_every_round_at_margin_zero(kind, folder):
    pool = {"name": "checkpoint_pool", "every": PER_ROUND, "strategy": "last"}
    go(folder, f"refreshed-{kind}", kind, reference=pool)
    margins = [row["margin"] for row in read_metrics(folder / f"refreshed-{kind}")]
    assert margins[::PER_ROUND] == [0, 0, 0] and all(margin != 0 for margin in margins[1::PER_ROUND])


@pytest.mark.parametrize("kind", ["images", "steps"])
def test_steps_on_one_round_lower_its_loss(kind, folder):
    """The whole chain's sign: the winner of a pair becomes likelier than the loser."""
    more = {"train": {"lr": 3e-3, "batch_size": 4}, "source": {"prompts_per_round": 4}}
    trainer = set_up(resolve([sections(folder, f"learn-{kind}", kind, **more)]))
    trainer.batches.refresh(0)
    batch = trainer.batches.batch(0)
    rows = [train_step(trainer, batch, step=0) for _ in range(8)]
    assert rows[0]["margin"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["margin"] > 0 and rows[-1]["implicit_accuracy"] > 0.5


def test_accumulation_equals_one_large_batch(folder):
    found = []
    for out, size in (("large", None), ("micro", 1)):
        go(folder, out, "steps", train={"micro_batch_size": size, "steps": 3})
        found.append(losses(folder / out))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize(
    "kind,more,match",
    [
        ("steps", {"likelihood": {"name": "elbo"}}, "source rollout makes steps and likelihood elbo takes images"),
        ("images", {"likelihood": {"name": "step"}}, "source rollout makes images and likelihood step takes steps"),
        ("images", {"source": {"scorers": ["sprites_glod"]}}, "Did you mean 'sprites_gold'"),
        ("images", {"source": {"scorers": []}}, "source.scorers is empty"),
        ("images", {"source": {"prompts": "/nowhere.txt"}}, "source.prompts: no such file: /nowhere.txt"),
        ("images", {"source": {"compare": "groups", "images_per_prompt": 3}}, "objective pair needs 'pair'"),
        ("groups", {"source": {"compare": "pairs"}}, "objective grpo needs 'list'"),
        ("pool", {"reference": {"name": "none"}}, "needs 'reference'"),
        ("guard", {"source": {"record_means": False}}, "likelihood step needs 'means'.*source.record_means=true"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(kind, more, match, folder):
    more = {"model": {"path": "/no/such/model"}} | more
    words = sections(folder, "refused", kind, **more)
    if "reference" in more:
        words["reference"] = more["reference"]
    with pytest.raises(UserError, match=match) as error:
        api.train(quiet=True, **words)
    assert "\n" not in str(error.value) and not (folder / "refused").exists()


def test_a_changed_list_of_prompts_is_noticed(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red thing\n")
    more = {"source": {"prompts": str(tmp_path / "prompts.txt")}, "train": {"steps": 1}}
    go(folder, "changed", **more)
    (tmp_path / "prompts.txt").write_text("a blue thing\n")
    with pytest.raises(UserError, match="the data changed"):
        go(folder, "changed", **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "steps", "pool"])
def test_two_processes_equal_one(kind, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
    for processes in (1, 2):
        out = f"processes-{processes}-{kind}"
        (folder / f"{out}.yaml").write_text(yaml.safe_dump(sections(folder, out, kind)))
        result = run_cli("train", str(folder / f"{out}.yaml"), processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (folder / f"processes-{processes}-{kind}" for processes in (1, 2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert max(losses(one)) - min(losses(one)) > 1e-4
    assert made(one).keys() == made(two).keys()
    same = [name for name, data in made(one).items() if made(two)[name] == data]
    first = [name for name in made(one) if "round-00000" in name]
    assert set(first) <= set(same) and first  # the first round is made by equal weights
    assert [row["rollout/units"] for row in read_metrics(one)[::2]] == [
        row["rollout/units"] for row in read_metrics(two)[::2]
    ]


@pytest.mark.parametrize("steps_per_round, is_told", [(1, False), (9, True)])
def test_a_round_learned_too_often_is_told(
    folder: Path, steps_per_round: int, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 1, "sample_prompts": []}
    made = sections(folder, f"often-{steps_per_round}", source={"steps_per_round": steps_per_round}, train=train)
    api.train(**made)
    (row,) = read_metrics(folder / f"often-{steps_per_round}")
    told = capsys.readouterr().err
    assert row["rollout/visits_per_unit"] == steps_per_round * 2 / row["rollout/units"]
    assert ("raise source.prompts_per_round" in told) == is_told
    assert (f"is learned {row['rollout/visits_per_unit']:.0f} times" in told) == is_told
