"""A run that is asked to end: after a whole step, with a checkpoint, and resumed to the same numbers."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import pickapic, tokens
from safetensors.torch import load_file

from diffalign import _run_lock
from diffalign.checkpoint import found
from diffalign.config import resolve
from diffalign.metrics import read_metrics
from diffalign.recipes._interrupts import Interrupts
from diffalign.recipes.train import train


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(number: int) -> None:
    done: list[str] = []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Interrupts(True, lambda: done.append("saved")) as interrupts:
        with interrupts.step():
            done.append("begun")
            os.kill(os.getpid(), number)
            done.append("finished")
        done.append("never")
    assert done == ["begun", "finished", "saved"] and signal.getsignal(number) is before


def test_between_steps_it_comes_at_once() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), Interrupts(True, lambda: done.append("saved")):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert done == ["saved"]


def test_other_errors_save_nothing() -> None:
    """The weights of a step that failed are not worth keeping."""
    done: list[str] = []
    with pytest.raises(FloatingPointError), Interrupts(True, lambda: done.append("saved")) as interrupts:
        with interrupts.step():
            raise FloatingPointError
    assert done == []


def test_one_of_several_processes_is_interrupted_where_it_is() -> None:
    done: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(False, lambda: done.append("saved")) as interrupts, interrupts.step():
        assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), Interrupts(False, lambda: done.append("saved")):
        raise KeyboardInterrupt
    assert done == []


def test_a_run_that_is_asked_to_end_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    pickapic(tmp_path / "pairs.parquet")

    def go(out: str, ask_at: int | None = None) -> Path:
        config = resolve(tokens("sdxl", tmp_path, out, train__checkpoint_every=100, train__validate_every=0))

        def ask(step: int, metrics: Any) -> None:
            if step == ask_at:
                os.kill(os.getpid(), signal.SIGTERM)

        train(config, callbacks=[ask], quiet=True)
        return tmp_path / out

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("cut", ask_at=1)
    cut = tmp_path / "cut"
    assert list(found(cut)) == [2] and _run_lock.read(cut)["ended"] == "interrupted"
    assert [row["step"] for row in read_metrics(cut)] == [0, 1]
    go("cut")
    assert [row["loss"] for row in read_metrics(cut)] == [row["loss"] for row in read_metrics(whole)]
    export = "export/pytorch_lora_weights.safetensors"
    weights, expected = load_file(cut / export), load_file(whole / export)  # the files' headers have no fixed order
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert _run_lock.read(cut)["ended"] == "finished"
