"""The only file that knows a process group: one or many processes through accelerate.

Everything else sees a rank, a size, a few reductions and a backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.types import UserError


def is_main_process() -> bool:
    """Whether this is the one process of a launch that prints; known before there is a `World`, and after."""
    return os.environ.get("RANK", "0") == "0"


class World:
    """The processes of a run. Launched by `accelerate launch -m diffalign ...`; alone, rank 0 of 1."""

    def __init__(self, device: str = "auto", precision: str = "auto") -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("train.device=cuda, but torch sees no GPU: run `diffalign doctor`, or use device=cpu")
        use_cpu = device == "cpu" or not torch.cuda.is_available()
        if precision == "auto":
            precision = "bf16" if not use_cpu and torch.cuda.is_bf16_supported() else "fp32"
        if precision == "fp16" and use_cpu:
            raise UserError("train.precision=fp16 needs a GPU: use fp32 or bf16 on the CPU")
        self.precision = precision
        # buffers are constants (SD3's position table): broadcasting them would make every forward call collective
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        # accelerate keeps one state per process and refuses another precision; runs of a session follow each other
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
        mixed = {"fp32": "no"}.get(precision, precision)
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=use_cpu, kwargs_handlers=[ddp])

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes files."""
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The module and optimizer wrapped for this world (DDP, FSDP or DeepSpeed as launched; alone: precision)."""
        return self.accelerator.prepare(module, optimizer)

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return self.accelerator.unwrap_model(module)

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision, for whatever is not inside the prepared module."""
        return self.accelerator.autocast()

    def accumulate(self, module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged only in the last micro-batch."""
        return nullcontext() if is_last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Back-propagates a share of the global mean: the world's average turns shares times size into the sum."""
        self.accelerator.backward(loss * self.size)

    def clip(self, parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
        """Global gradient norm, clipped to `max_norm` where given."""
        return self.accelerator.clip_grad_norm_(list(parameters), float("inf") if max_norm is None else max_norm)

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[B/size] per rank to [B] in rank order, on every rank."""
        return {name: self.accelerator.gather(value.to(self.device)).cpu() for name, value in tensors.items()}

    def from_main(self, numbers: Sequence[int]) -> list[int]:
        """The main process's numbers, on every process; as many are given everywhere."""
        shared = self.accelerator.gather(torch.tensor(list(numbers), device=self.device))  # in rank order
        return shared[: len(numbers)].tolist()

    def barrier(self) -> None:
        """Waits for every process."""
        self.accelerator.wait_for_everyone()

    def skipped_step(self) -> bool:
        """Whether fp16's loss scaling skipped the last optimizer step."""
        return bool(self.accelerator.optimizer_step_was_skipped)

    def scaler_state(self) -> dict[str, Any]:
        """fp16's loss-scale state, empty otherwise."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`."""
        if self.accelerator.scaler is not None and state:
            self.accelerator.scaler.load_state_dict(dict(state))

    def close(self) -> None:
        """Leaves the process group, so that a finished run ends without a warning."""
        self.accelerator.end_training()
