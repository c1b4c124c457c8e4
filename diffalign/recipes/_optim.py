"""Optimizers, learning rates as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from diffalign.config import Train
from diffalign.types import UserError


def learning_rate(config: Train, step: int) -> float:
    """The rate of 0-based `step`: linear warm-up, then constant, linear or cosine decay to 0 at `steps`.

    A function of the step alone, so that resuming needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.lr * (1 - done)
    if config.lr_schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr


def build_optimizer(config: Train, parameters: list[Tensor] | list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (fused where the device has it), 8-bit AdamW through bitsandbytes, or Adafactor.

    Raises:
        UserError: adamw8bit without bitsandbytes.
    """
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("train.optimizer=adamw8bit needs bitsandbytes: pip install 'diffalign[8bit]', or use adamw")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.adam_eps
        )
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        eps=config.adam_eps,
        fused=True,
    )


@torch.no_grad()
def adam_damping(optimizer: Any) -> float | None:
    """The part of AdamW's update that its epsilon takes away, eps / (sqrt(v) + eps), v the corrected second moment.

    A mean over the weights that have had a gradient: 0 where all are far above epsilon, 1 where nothing moves. None for
    other optimizers, and before the first step. AdamW divides a loss's scale out, but only down to epsilon: a small
    beta trains with a smaller rate, and unevenly over the layers.
    """
    total, count = 0.0, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                root = (state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
                moving = root[root > 0].double()
                total += float((group["eps"] / (moving + group["eps"])).sum())
                count += len(moving)
    return total / count if count else None


class Ema:
    """Exponential moving average of the trainable weights, kept beside them; off with decay 0."""

    def __init__(self, decay: float, parameters: Mapping[str, Tensor]) -> None:
        self.decay, self.parameters = decay, parameters
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay shadow + (1 - decay) weights."""
        for name, average in self.shadow.items():
            average.lerp_(self.parameters[name], 1 - self.decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Restores the average of a checkpoint."""
        for name, value in values.items():
            self.shadow[name].copy_(value)

    @contextmanager
    @torch.no_grad()
    def swapped_in(self) -> Iterator[None]:
        """The averaged weights in the model's place, for samples and export."""
        kept = {name: self.parameters[name].detach().clone() for name in self.shadow}
        for name, average in self.shadow.items():
            self.parameters[name].copy_(average)
        try:
            yield
        finally:
            for name, value in kept.items():
                self.parameters[name].copy_(value)
