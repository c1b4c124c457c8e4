"""Trainings as processes: refused, started, bounded, stopped, resumed; nothing outside the given folders."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from makers import pickapic

from diffalign import _run_lock, launching
from diffalign.checkpoint import found
from diffalign.errors import UserError
from diffalign.launching import Launch, Launcher, command
from diffalign.metrics import read_metrics
from diffalign.runs import read_run


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the launcher may use; the working folder is its parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "given").mkdir()
    pickapic(tmp_path / "given" / "pairs.parquet")
    return tmp_path / "given"


@pytest.fixture
def launcher(given: Path) -> Iterator[Launcher]:
    made = Launcher(given / "app", [given])
    yield made
    for launch in made.running():
        _run_lock.send(launch.process, at_once=True)


def words(*more: str, out: str = "given/run") -> list[str]:
    return [
        "sdxl", "diffusion-dpo", "model.path=tiny", "model.dtype=float32", "source.data.path=given/pairs.parquet",
        "source.cache_dir=given/cache", "source.holdout=0.2", f"train.out={out}", "train.batch_size=4",
        "train.validate_every=0", "train.device=cpu", "sampling.num_steps=2", "train.sample_prompts=[a thing]",
        "log.trackers=[]", *more,
    ]  # fmt: skip


def wait(until: Callable[[], Any], seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


class Sleeper:
    """Stands in for a training where only the process matters: it holds the folder's lock, or does nothing."""

    CODE = """
import sys, time
from pathlib import Path
from diffalign._run_lock import hold
folder = Path(sys.argv[-1].partition("=")[2])
folder.mkdir(exist_ok=True)
(folder / "config.yaml").touch()
with hold(folder):
    time.sleep(60)
"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        script = folder / "sleeper.py"
        script.write_text(self.CODE)
        real = subprocess.Popen

        def popen(arguments: list[str], **options: Any) -> Any:
            self.arguments = arguments
            return real([sys.executable, str(script), *arguments[3:]], **options)

        monkeypatch.setattr(launching.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.stepz=3", "unknown key train.stepz"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps must be at least 1"),
        ("reference.name=none", "needs 'reference'"),
        ("source.data.path=given/nothing.parquet", "nothing.parquet"),
        ("stop.metric=holdout/nothing", "no such held-out metric"),
        # outside the folders
        ("train.out=elsewhere/run", "not below the folders"),
        ("train.out=given/../elsewhere", "not below the folders"),
        ("train.out=/tmp/x", "not below the folders"),
        ("source.cache_dir=cache", "not below the folders"),
        ("source.data.path=/etc/passwd", "not below the folders"),
        ("source.data.path=given/link/pairs.parquet", "not below the folders"),
        ("source.data={path: secret.txt}", "not below the folders"),
        ("model.path=../models", "not below the folders"),
        ("model.path=~/models", "not below the folders"),
        ("model.lora.init=secret.txt", "not below the folders"),
        ("source.masks=file:///etc", "not below the folders"),
        # code and words of other kinds
        ("objective.name=os:system", "code of your own"),
        ("stop.scorers=[os:system]", "code of your own"),
        ("objective={name: 'a.b:C'}", "code of your own"),
        ("--debug", "neither the name of a shipped config"),
        ("--debug=x", "neither the name of a shipped config"),
        ("given/other.yaml", "neither the name of a shipped config"),
        ("secret.txt", "neither the name of a shipped config"),
    ],
)
def test_what_may_not_be_started_is_refused_in_one_line(launcher: Launcher, given: Path, word: str, told: str) -> None:
    (given.parent / "secret.txt").write_text("x")
    (given.parent / "elsewhere").mkdir()
    pickapic(given.parent / "elsewhere" / "pairs.parquet")
    (given / "link").symlink_to(given.parent / "elsewhere")
    (given / "other.yaml").write_text("train: {steps: 3}")
    with pytest.raises(UserError, match=told) as refused:
        launcher.start([*words(), word])
    assert "\n" not in str(refused.value)
    assert launcher.launches() == [] and not (given / "run").exists() and not (given / "app").exists()


def test_shipped_configs_and_given_files_may_be_named(given: Path) -> None:
    (given / "own.yaml").write_text("train: {steps: 3}")
    launcher = Launcher(given / "app", [given], configs=["given/own.yaml"])
    assert launcher.check([*words(), "given/own.yaml"]).train.steps == 3
    assert launcher.check([*words(), "model.path=some-organisation/a-model"]).train.steps == 1000
    assert launcher.check([*words(), "source.data.path=" + str(given / "pairs.parquet")]).train.steps == 1000


def test_another_configs_folder_is_refused_before_anything_starts(launcher: Launcher, given: Path) -> None:
    (given / "run").mkdir()
    (given / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty and no folder of ours"):
        launcher.start(words())
    assert [path.name for path in (given / "run").iterdir()] == ["notes.txt"]


def test_the_command_line_is_what_is_started(launcher: Launcher, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = Sleeper(monkeypatch, given)
    more = ["train.sample_prompts=[a 'quoted' thing; $(touch x)]"]
    launch = launcher.start(words(*more, out="given/a run"))
    assert sleeper.arguments[1:] == ["-m", "diffalign", *shlex.split(command(launch.words))[1:]]
    assert launcher.log(launch).startswith(f"$ {command(launch.words)}")
    assert not (given.parent / "x").exists()


def test_no_more_runs_than_allowed(launcher: Launcher, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sleeper(monkeypatch, given)
    one = launcher.start(words("train.seed=1", "train.out=given/one"))
    wait(lambda: _run_lock.holder(given / "one"))
    with pytest.raises(UserError, match="1 of at most 1 runs are going on .one."):
        launcher.start(words("train.out=given/two"))
    again = Launcher(given / "app", [given])  # the app was started again: it knows the runs of before
    with pytest.raises(UserError, match="at most 1"):
        again.start(words("train.out=given/two"))
    two = Launcher(given / "app", [given], max_runs=2)
    with pytest.raises(UserError, match="is being trained already"):
        two._start(given / "one", words())
    assert [launch.folder for launch in again.running()] == [one.folder]
    launcher.stop(one.folder, at_once=True)
    wait(lambda: not again.running())
    assert launcher.start(words("train.out=given/two")).is_alive


def test_only_own_processes_and_holders_are_signalled(
    launcher: Launcher, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        facts = _run_lock.identity(bystander.pid)
        folder = given / "run"
        folder.mkdir()
        (folder / "process.json").write_text(_run_lock.to_json(facts))  # written, but not locked
        with pytest.raises(UserError, match="no process of this machine trains"):
            launcher.stop(folder, at_once=True)
        with pytest.raises(UserError, match="not below the folders"):
            launcher.stop(given.parent / "elsewhere", at_once=True)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_what_cannot_be_resumed_is_refused(launcher: Launcher, given: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        launcher.resume(given)
    with pytest.raises(UserError, match="not below the folders"):
        launcher.resume(given.parent)


def test_broken_records_are_not_launches(launcher: Launcher, given: Path) -> None:
    (given / "app" / "launches").mkdir(parents=True)
    (given / "app" / "launches" / "a.json").write_text("{")
    (given / "app" / "launches" / "b.json").write_text("{}")
    assert launcher.launches() == [] and launcher.running() == []


def test_a_dry_run_ends_when_it_is_closed(launcher: Launcher, given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(arguments: list[str], **options: Any) -> Any:
        children.append(real([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return children[-1]

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    looks = launcher.dry_run(words())
    assert next(looks) == (False, "")
    looks.close()
    assert children[0].poll() is not None


@pytest.mark.slow
def test_a_run_is_started_stopped_and_resumed(launcher: Launcher, given: Path) -> None:
    """Stopped after a step, with a checkpoint; the resumed run has the numbers of one that was never stopped."""
    out = given / "run"
    many = ("train.steps=60", "train.checkpoint_every=1000", "train.lr=1e-3", "train.warmup_steps=1")
    launch: Launch = launcher.start(words(*many))
    wait(lambda: read_run(out).step >= 3 if (out / "metrics.jsonl").exists() else False)
    assert read_run(out).state == "running" and launch.is_alive
    launcher.stop(out)
    wait(lambda: not launcher.running())
    assert read_run(out).state == "interrupted" and "interrupted; the same command resumes" in launcher.log(launch)
    (step,) = found(out)
    assert step == read_run(out).step < 60
    launcher.resume(out)
    wait(lambda: (out / "export_check.json").exists() and not launcher.running())
    assert read_run(out).state == "finished" and read_run(out).step == 60
    with pytest.raises(UserError, match="is finished"):
        launcher.resume(out)
    whole = launcher.start(words(*many, "train.out=given/whole"))
    wait(lambda: not whole.is_alive)
    first, second = ([row["loss"] for row in read_metrics(folder)] for folder in (out, given / "whole"))
    assert first == second


@pytest.mark.slow
def test_a_dry_run_says_what_the_run_will_take(launcher: Launcher) -> None:
    *_, (is_over, printed) = launcher.dry_run(words())
    assert is_over and "one step on the tiny twin: loss 0.693147" in printed and "run folder: given/run" in printed
