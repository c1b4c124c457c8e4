"""Checkpoints: whole or not at all, rotation, a full disk, foreign and broken files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from diffalign import checkpoint
from diffalign.checkpoint import Checkpoint
from diffalign.types import UserError


def state(step: int) -> Checkpoint:
    weight = torch.nn.Parameter(torch.full((3,), float(step)))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    return Checkpoint(step, {"w": weight.detach()}, {"w": weight.detach() * 2}, optimizer.state_dict(), {})


def test_round_trip_and_rotation(tmp_path: Path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, state(step), "mark", keep=2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000002", "step-00000010"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    loaded, saved = checkpoint.load(newest, "mark"), state(10)
    assert loaded.step == 10
    torch.testing.assert_close(loaded.weights["w"], saved.weights["w"], rtol=0, atol=0)
    torch.testing.assert_close(loaded.ema["w"], saved.ema["w"], rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])


def test_the_best_is_rotated_apart_and_resumed_from_where_it_is_newest(tmp_path: Path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step), "mark", keep=1)
        if step < 3:
            checkpoint.save(tmp_path, state(step), "mark", keep=1, kind="best")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best-00000002", "step-00000003"}
    assert list(checkpoint.found(tmp_path)) == [2, 3]
    checkpoint.save(tmp_path, state(4), "mark", keep=1, kind="best")
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "best-00000004" and checkpoint.load(newest).step == 4


@pytest.mark.parametrize("broken", ["weights.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
def test_broken_files_are_named(tmp_path: Path, broken: str):
    path = checkpoint.save(tmp_path, state(1), "mark", keep=1)
    (path / broken).write_bytes((path / broken).read_bytes()[:5])
    with pytest.raises(UserError, match="incomplete or broken"):
        checkpoint.load(path, "mark")


def test_another_configs_checkpoint_is_refused(tmp_path: Path):
    path = checkpoint.save(tmp_path, state(1), "mark", keep=1)
    with pytest.raises(UserError, match="another config"):
        checkpoint.load(path, "other")


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save(tmp_path, state(1), "mark", keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="no disk space for a checkpoint"):
        checkpoint.save(tmp_path, state(2), "mark", keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and checkpoint.load(newest, "mark").step == 1


def test_nothing_is_unpickled(tmp_path: Path):
    """A checkpoint that smuggles an object is refused, not run."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    path = checkpoint.save(tmp_path, state(1), "mark", keep=1)
    (path / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="incomplete or broken"):
        checkpoint.load(path, "mark")
    assert not (tmp_path / "exploded").exists()
