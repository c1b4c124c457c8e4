"""Numbers of a run: reducing unreduced metrics, buckets by noise level, `metrics.jsonl` and its mirrors.

Pure: no process group here. A run on several processes gathers the unreduced [B] tensors first and reduces them after.
"""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign._json import finite, to_json
from diffalign.types import UserError

FILE_NAME = "metrics.jsonl"


def reduce(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of unreduced metrics {name: [B]} that ignore NaN ("does not apply"); NaN where nothing applies."""
    if not metrics:
        return {}
    means = torch.stack([values.detach().float().nanmean() for values in metrics.values()])  # one device sync for all
    return dict(zip(metrics, means.tolist(), strict=True))


def by_bucket(
    values: Float[Tensor, " B"], t: Float[Tensor, " B"], num_buckets: int = 4, name: str = "loss"
) -> dict[str, float]:
    """Means of `values` per noise level: {"loss/t0.0-0.25": mean, ...}; NaN values and empty buckets are left out.

    Buckets are (low, high], so that the grid (k + 1) / T of discrete schedules falls evenly; t = 0 joins the first.
    """
    values, t = values.detach().double().cpu().flatten(), t.detach().double().cpu().flatten()
    assert values.shape == t.shape, (values.shape, t.shape)
    keep = ~values.isnan()
    # The slack undoes the rounding of a float32 t: 0.3 * 10 must stay in (0.2, 0.3].
    bucket = ((t[keep] * num_buckets - 1e-5).ceil().long() - 1).clamp(0, num_buckets - 1)
    counts = torch.bincount(bucket, minlength=num_buckets).tolist()
    sums = torch.bincount(bucket, weights=values[keep], minlength=num_buckets).tolist()
    edges = [round(edge / num_buckets, 4) for edge in range(num_buckets + 1)]
    return {f"{name}/t{edges[k]}-{edges[k + 1]}": sums[k] / counts[k] for k in range(num_buckets) if counts[k]}


class Tracker(Protocol):
    """A mirror of the scalars, such as TensorBoard."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run had logged beyond the step it resumed at.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Service:
    """W&B, or trackio, which has the same three calls."""

    def __init__(self, module: Any, project: str, folder: Path, **options: Any):
        self._module = module
        module.init(project=project, name=folder.resolve().name, resume="allow", **options)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._module.log(dict(scalars), step=step)

    def close(self) -> None:
        self._module.finish()


TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def _check_tracker(name: str) -> None:
    if name not in TRACKERS:
        raise UserError(f"log.trackers: unknown tracker {name!r}. Legal: {', '.join(TRACKERS)}.")
    try:
        importlib.import_module(TRACKERS[name])
    except ImportError as error:
        raise UserError(f"log.trackers: {name} is not installed; run: pip install 'diffalign[track]'") from error


def _open_tracker(name: str, project: str, folder: Path, first_step: int) -> Tracker:
    if name == "tensorboard":
        return _TensorBoard(folder, first_step)
    module = importlib.import_module(name)
    if name == "trackio":
        return _Service(module, project, folder)
    id_file = folder / "wandb_id"  # a resumed run continues its own W&B run, a new one never joins an old one
    if first_step == 0 or not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:16])
    return _Service(module, project, folder, dir=str(folder), id=id_file.read_text().strip())


def _scan(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, byte offset of its end) of every whole line; a torn last line, as SIGKILL leaves it, is not one.

    Raises:
        UserError: a broken line that is not the last.
    """
    end, broken = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if broken:
                raise UserError(f"{path}: line {broken} is not a JSON object; repair or delete that line")
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not line.endswith(b"\n") or not isinstance(row, dict):
                broken = number
                continue
            end += len(line)
            yield row, end


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` (or of the run folder that holds one), without a torn last line.

    Raises:
        UserError: no such file, or a broken line before the last.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path}: no such file; a run writes it from its first logged step on")
    return [row for row, _ in _scan(path)]


class MetricsLog:
    """Appends one JSON object per step to `folder/metrics.jsonl` and mirrors its scalars to the trackers.

    Lines are flushed one by one: a killed run loses at most the line it was writing. For the main process only.

    Args:
        folder: the run folder.
        trackers: of "tensorboard", "wandb", "trackio" (config key `log.trackers`).
        project: the project's name at W&B or trackio.

    Raises:
        UserError: an unknown tracker, or one that is not installed.
    """

    def __init__(self, folder: str | Path, trackers: Sequence[str] = (), project: str = "diffalign"):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        for name in trackers:
            _check_tracker(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._names, self._project = tuple(trackers), project
        self._trackers: list[Tracker] | None = None  # opened at the first step, once a resume is settled
        self._file: Any = None
        self._last_step = self._keep(lambda row: True)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> int:
        """Cuts the file at the first row that is not wanted, or torn; returns the last step left, -1 for none."""
        end, last_step = 0, -1
        for row, row_end in _scan(self.path):
            if not wanted(row):
                break
            end, last_step = row_end, int(row.get("step", last_step))
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)
        return last_step

    def resume(self, step: int) -> None:
        """Forgets every row after `step`: the steps beyond it are about to be run again. -1 forgets everything."""
        assert self._file is None, "resume before the first log"
        self._last_step = self._keep(lambda row: int(row.get("step", -1)) <= step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one row. Values are numbers, 0-d tensors, text or None; NaN and infinity are written as null.

        Steps must rise: what belongs to one step is logged in one call.
        """
        assert step > self._last_step, f"step {step} logged after step {self._last_step}"
        row = {"step": int(step), **finite(values)}
        if self._file is None:
            self._file = self.path.open("a", encoding="ascii", buffering=1)
            first_step = self._last_step + 1
            self._trackers = [_open_tracker(name, self._project, self.folder, first_step) for name in self._names]
        self._file.write(to_json(row) + "\n")
        self._last_step = int(step)
        scalars = {
            name: float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self._trackers or ():
            tracker.write(int(step), scalars)

    def close(self) -> None:
        """Closes file and trackers; further rows may not be logged."""
        for tracker in self._trackers or ():
            tracker.close()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
