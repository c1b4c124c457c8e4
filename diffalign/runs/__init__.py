"""Run folders as they are on disk: which there are, how each stands, its curves, sample grids and config.

Nothing here loads weights or writes. A run is a folder with `config.yaml` and the metrics or the process of a training;
runs of `sweep` and `stages` are such folders below theirs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from diffalign import _run_lock
from diffalign._json import read_json
from diffalign.metrics import FILE_NAME
from diffalign.recipes._run import changes
from diffalign.recipes._stopping import ALARM_FILE
from diffalign.runs._curves import Curves

State = Literal["running", "finished", "interrupted", "failed", "waits for votes"]

CONFIG = "config.yaml"
MAX_RUNS, MAX_FOLDERS, MAX_DEPTH = 1000, 20_000, 8
NO_RUNS_BELOW = {"checkpoints", "export", "images", "rounds", "samples", "tensorboard", "cache", "pool", "failures"}
LAST_LINES = 1 << 16  # bytes of metrics.jsonl that hold its last row


@dataclass(frozen=True)
class Run:
    """How a run stands. Steps are finished optimizer steps."""

    folder: Path
    name: str  # the folder below its root
    state: State
    reason: str  # why it failed or ended early, empty where there is nothing to tell
    step: int
    steps: int | None  # asked for
    changed: float  # seconds since the epoch
    model: str
    method: str
    pairs_per_second: float | None = None
    batch_size: int | None = None

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the newest step, without validations and rounds; None where the run does not run."""
        if self.state != "running" or not (self.steps and self.batch_size and self.pairs_per_second):
            return None
        return (self.steps - self.step) * self.batch_size / self.pairs_per_second


def find_runs(roots: Sequence[Path]) -> list[Run]:
    """The runs below the folders, the newest first. Links are not followed.

    Bounded: MAX_FOLDERS folders are looked at, MAX_DEPTH levels down, and MAX_RUNS runs returned.
    """
    found: dict[Path, tuple[float, str]] = {}
    for root in roots:
        for folder in _run_folders(root):
            name = str(folder.relative_to(root)) if folder != root else folder.name
            found.setdefault(folder, (_changed(folder), name))
    newest = sorted(found.items(), key=lambda item: -item[1][0])[:MAX_RUNS]
    return [read_run(folder, name) for folder, (_, name) in newest]


def _run_folders(root: Path) -> Iterator[Path]:
    num = 0
    for folder, names, files in os.walk(root):
        num += 1
        if num > MAX_FOLDERS:
            return
        if CONFIG in files and (FILE_NAME in files or _run_lock.FILE in files):
            yield Path(folder)
            names.clear()
            continue
        depth = len(Path(folder).relative_to(root).parts)
        if depth >= MAX_DEPTH or "manifest.jsonl" in files:  # the latter: pictures
            names.clear()
        names[:] = [name for name in names if name not in NO_RUNS_BELOW and not name.startswith(".")]


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (FILE_NAME, _run_lock.FILE))


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a file of a run folder is there itself, and not a link to elsewhere."""
    return path.resolve().is_relative_to(folder.resolve())


def _changed(folder: Path) -> float:
    times = []
    for name in (FILE_NAME, _run_lock.FILE, "export_check.json", CONFIG):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def read_run(folder: Path, name: str = "") -> Run:
    """How the run in `folder` stands now."""
    config, last, check = read_config(folder), _last_row(folder), _json(folder / "export_check.json")
    state, reason = _state(folder, check)
    of_scorer = not config.get("objective") and "train_scorer" in config
    train = _section(config, "train_scorer" if of_scorer else "train")
    model, speed = _section(config, "model"), last.get("pairs_per_second")
    return Run(
        folder=folder,
        name=name or folder.name,
        state=state,
        reason=reason,
        step=int(check.get("steps", last.get("step", -1) + 1)),
        steps=train.get("steps"),
        changed=_changed(folder),
        model=" ".join(str(model[key]) for key in ("name", "path") if model.get(key)),
        method="scorer" if of_scorer else _method(config),
        pairs_per_second=speed if isinstance(speed, int | float) else None,
        batch_size=train.get("batch_size"),
    )


def _state(folder: Path, check: Mapping[str, Any]) -> tuple[State, str]:
    if _run_lock.holder(folder) is not None:
        return "running", ""
    if check:
        problems = check.get("problems") or []
        return (
            ("failed", "; ".join(map(str, problems))) if problems else ("finished", str(check.get("ended_early", "")))
        )
    process = _run_lock.read(folder)
    state, reason = process.get("ended"), str(process.get("reason", ""))
    return (state, reason) if state in ("failed", "waits for votes") else ("interrupted", "")


def _method(config: Mapping[str, Any]) -> str:
    objective, source = _section(config, "objective"), _section(config, "source")
    text = str(objective.get("name", "?"))
    if "beta" in objective:
        text += f", beta {objective['beta']:g}" if isinstance(objective["beta"], int | float) else ""
    return text if source.get("name") in (None, "offline") else f"{text}, {source['name']}"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run, {} where it cannot be read."""
    path = folder / CONFIG
    try:
        return _config(path, path.stat().st_mtime_ns) if _is_inside(folder, path) else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


@lru_cache(maxsize=2 * MAX_RUNS)
def _config(path: Path, changed: int) -> dict[str, Any]:
    found = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return found if isinstance(found, dict) else {}


def _last_row(folder: Path) -> dict[str, Any]:
    """The newest whole row of metrics.jsonl, {} without one."""
    try:
        with open(folder / FILE_NAME, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_LINES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return {}


def config_differences(first: Path, second: Path) -> list[tuple[str, Any, Any]]:
    """(section.key, of the first, of the second) of every key in which two runs' resolved configs differ."""
    return changes(read_config(first), read_config(second))


class RunView:
    """One run to look at again and again: `refresh`, then the curves, sample grids and events."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.curves = Curves(folder)

    def refresh(self) -> bool:
        """Reads what metrics.jsonl has gained; whether anything changed."""
        return self.curves.refresh()

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @property
    def proxy(self) -> str | None:
        """The scorer whose rise the alarm distrusts, None where none is named."""
        name = _section(self.config, "stop").get("train_scorer")
        return str(name) if name else None

    @property
    def config_text(self) -> str:
        """The resolved config as YAML, one section below the other."""
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True) if self.config else ""

    def samples(self) -> dict[int, Path]:
        """Steps done -> sample grid, rising. Step 0 is the base model."""
        found = {}
        for path in (self.folder / "samples").glob("step-*.png"):
            number = path.stem.removeprefix("step-")
            if number.isdigit() and _is_inside(self.folder, path):
                found[int(number)] = path
        return dict(sorted(found.items()))

    def events(self) -> list[str]:
        """What happened beside training: the alarm, an early end, problems of the export."""
        alarm, check = _json(self.folder / ALARM_FILE), _json(self.folder / "export_check.json")
        told = []
        if alarm:
            told.append(f"over-optimisation alarm after step {alarm.get('step', '?')}: {alarm.get('reason', '')}")
        if "ended_early" in check:
            told.append(f"ended early after {check.get('steps', '?')} steps: {check['ended_early']}")
        if "exported_step" in check:
            told.append(f"the export holds the best measured weights, after step {check['exported_step']}")
        if check.get("problems"):
            told.append(f"the export failed its check: {'; '.join(map(str, check['problems']))}")
        if self.curves.num_bad:
            told.append(f"{self.curves.num_bad} lines of {FILE_NAME} are no rows and were left out")
        return told
