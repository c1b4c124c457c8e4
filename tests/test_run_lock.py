"""Who trains in a folder: told by a lock that dies with its process, never by a file that stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffalign import _run_lock
from diffalign.errors import UserError, WaitsForVotes

HOLD = """
import sys, time
from pathlib import Path
from diffalign._run_lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_a_folder_without_a_process_is_free(tmp_path: Path) -> None:
    assert _run_lock.holder(tmp_path) is None and _run_lock.read(tmp_path) == {}
    (tmp_path / _run_lock.FILE).write_text(json.dumps(_run_lock.identity()))  # what a copied run folder looks like
    assert _run_lock.holder(tmp_path) is None


def test_the_holder_is_told_and_a_second_one_refused(
    tmp_path: Path, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = _run_lock.holder(tmp_path)
    assert holder is not None and holder["pid"] == other.pid and _run_lock.is_alive(holder)
    monkeypatch.setattr(_run_lock, "PATIENCE_S", 0.2)
    with pytest.raises(UserError, match=f"process {other.pid} .* trains in"), _run_lock.hold(tmp_path):
        pass
    assert _run_lock.read(tmp_path)["pid"] == other.pid  # the refused one wrote nothing


def test_a_killed_holder_leaves_the_folder_free(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    facts = _run_lock.read(tmp_path)
    assert _run_lock.holder(tmp_path) is None and facts["pid"] == other.pid and "ended" not in facts
    with _run_lock.hold(tmp_path):
        assert _run_lock.read(tmp_path)["pid"] == os.getpid()


def test_who_only_looks_does_not_stop_who_begins(tmp_path: Path) -> None:
    (tmp_path / _run_lock.FILE).write_text("{}")
    with open(tmp_path / _run_lock.FILE) as looking:
        assert _run_lock._lock(looking, exclusive=False)
        begun = time.monotonic()
        looker = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        time.sleep(0.3)
    assert looker.stdout is not None and looker.stdout.readline() == "held\n"
    assert time.monotonic() - begun > 0.3
    looker.kill()
    looker.wait()


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (None, "finished"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("no\nmemory"), "failed"),
        (UserError("the data changed"), "failed"),
        (WaitsForVotes("3 prompts wait"), "waits for votes"),
    ],
)
def test_how_it_ended_is_written(tmp_path: Path, error: BaseException | None, ended: str) -> None:
    def work() -> None:
        with _run_lock.hold(tmp_path):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    facts = _run_lock.read(tmp_path)
    assert facts["ended"] == ended and _run_lock.holder(tmp_path) is None
    assert facts.get("reason", "") == " ".join(str(error or "").split())


def test_signals_reach_the_process_and_no_other_of_its_number(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    facts = dict(_run_lock.holder(tmp_path) or {})
    assert not _run_lock.send(facts | {"created": facts["created"] - 5}, at_once=True)  # the number was reused
    assert not _run_lock.send(facts | {"host": "elsewhere"}, at_once=True)
    assert not _run_lock.send({}, at_once=True) and other.poll() is None
    assert _run_lock.send(facts, at_once=False)
    assert other.wait(timeout=20) == -signal.SIGTERM
    assert not _run_lock.send(facts, at_once=False)
