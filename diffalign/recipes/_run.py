"""A run folder: what was asked for, on what it ran, and whether it may be resumed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffalign import __version__
from diffalign._atomic import sweep, write_atomic
from diffalign.config import Config, fingerprint
from diffalign.distributed import World
from diffalign.types import UserError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy")


@dataclass(frozen=True)
class Run:
    """An opened folder; `fingerprint` identifies the config it belongs to."""

    folder: Path
    fingerprint: str
    is_new: bool


def changes(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """The keys in which two resolved configs differ: (section.key, old, new), None for what is not there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            change
            for key in keys
            for change in changes(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        ]
    return [] if old == new else [(where, old, new)]


def differences(old: Any, new: Any) -> list[str]:
    """`changes` as `section.key: old -> new`."""
    return [f"{key}: {before} -> {after}" for key, before, after in changes(old, new)]


def open_folder(folder: Path, config: Config, sections: tuple[str, ...]) -> Run:
    """Makes or re-opens a folder that belongs to one config, and writes the resolved `config.yaml` into a new one.

    Raises:
        UserError: the folder holds something else, or belongs to another config (the differing keys are named).
    """
    resolved = config.to_dict(sections)
    mark = fingerprint(resolved)
    path = folder / "config.yaml"
    if not path.is_file():
        sweep(folder)  # a kill in the middle of the first file leaves a folder that is as good as empty
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and no folder of ours: choose another (nothing was overwritten)")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, yaml.safe_dump(resolved, sort_keys=False))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        return Run(folder, mark, is_new=True)
    old = yaml.safe_load(path.read_text())
    if not isinstance(old, Mapping) or fingerprint(old) != mark:
        changed = "; ".join(differences(old, json.loads(json.dumps(resolved)))[:4])
        raise UserError(f"{folder} belongs to a different config ({changed}): choose another (nothing was overwritten)")
    return Run(folder, mark, is_new=False)


def open_together(folder: Path, config: Config, sections: tuple[str, ...], world: World) -> Run:
    """`open_folder` by every process: the main one first, so that no other sees a folder half made."""
    run = open_folder(folder, config, sections) if world.is_main else None
    world.barrier()
    return run or open_folder(folder, config, sections)


def git_state() -> dict[str, Any]:
    """Commit and cleanness of the checkout that runs, empty outside one."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to reproduce the run: versions, machine, git state, start."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()} CPU"
    return {
        "diffalign": __version__,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": name,
        "cpu_count": os.cpu_count(),
        "git": git_state(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
