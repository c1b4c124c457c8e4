"""The policy's own past: a pool of checkpoints, one of which is the reference until the next is pushed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from diffalign import randomness
from diffalign._atomic import write_atomic
from diffalign.references._swapped import SwappedWeights
from diffalign.types import Policy, Setting, UserError


@dataclass
class CheckpointPool:
    """Every `every` steps the policy's trainable tensors join the pool (files in `<run>/pool`) and a member is drawn.

    SePPO (arXiv 2410.05255) draws at random, every 30 updates; `last` is the policy as the stage began, the refreshed
    reference of online DPO, self-play (SPIN-Diffusion) and trust regions; `first` never changes. A source may sample
    from the reference (source.sample_from=reference): both then are the same member.

    every: optimizer steps of a stage.
    size: members to draw from, the newest; 7 in SePPO, whose first member is the model as it was before training.
        Files stay for as long as a resume from a checkpoint that is still there may need them.
    strategy: which member is the reference in a stage.

    Raises:
        UserError: every or size below 1, or the pool's files are gone.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"reference"})

    every: int = 30
    size: int = 7
    strategy: Literal["random", "first", "last"] = "random"

    def __post_init__(self) -> None:
        for name in ("every", "size"):
            if getattr(self, name) < 1:
                raise UserError(f"reference.{name} must be at least 1 (got {getattr(self, name)})")
        self._weights: SwappedWeights | None = None
        self._setting: Setting | None = None
        self._stage = -1

    def bind(self, policy: Policy, setting: Setting | None = None) -> CheckpointPool:
        """Copies the trainable tensors as they are now: call it before a checkpoint is loaded."""
        assert setting is not None, "the pool is kept in the run's folder"
        self._weights, self._setting = SwappedWeights(policy), setting
        return self

    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        """The stage's member's prediction [N C H W], no gradient."""
        assert self._weights is not None, "bind first"
        return self._weights.predict(xt, t, cond)

    def after_step(self, step: int) -> None:
        """After 0-based `step`: at a stage's end pushes the policy and draws the next stage's member.

        Call it with -1 before the first step, and with the last finished step after a resume.
        """
        assert self._weights is not None and self._setting is not None, "bind first"
        stage, rest = divmod(step + 1, self.every)
        if rest == 0:
            if self._setting.rank == 0:
                write_atomic(self._file(stage), save(self._weights.current()))
                self._forget(stage)
            self._setting.barrier()
        if stage != self._stage:
            file = self._file(self.member(stage))
            try:
                self._weights.load(load_file(file))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{file} is gone or broken and holds the reference of this stage: start again in another train.out"
                ) from error
            self._stage = stage

    def member(self, stage: int) -> int:
        """Which stage's beginning is the reference of `stage` (0-based): a draw with an address of its own."""
        assert self._setting is not None, "bind first"
        if self.strategy == "last":
            return stage
        if self.strategy == "first":
            return 0
        oldest = max(0, stage + 1 - self.size)
        return oldest + randomness.address(self._setting.seed, "pool", stage) % (stage + 1 - oldest)

    def _forget(self, stage: int) -> None:
        """Removes the members that neither this stage nor the one a resume may go back to can draw."""
        assert self._setting is not None
        if self.strategy == "first":
            needed = range(1)
        else:
            folder = Path(self._setting.folder) / "checkpoints"
            checkpoints = [*folder.glob("step-*")] or folder.glob("best-*")
            oldest = min([stage, *(int(path.name.rpartition("-")[2]) // self.every for path in checkpoints)])
            needed = range(oldest if self.strategy == "last" else oldest + 1 - self.size, stage + 1)
        for path in self._file(0).parent.glob("stage-*.safetensors"):
            if int(path.stem.rpartition("-")[2]) not in needed:
                path.unlink()

    def _file(self, stage: int) -> Path:
        assert self._setting is not None
        return Path(self._setting.folder) / "pool" / f"stage-{stage:05d}.safetensors"
