"""What diffusers scheduler configs say, read for `schedule.py`: the abar table, and settings that are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.types import UserError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def choose(value: str, legal: Sequence[str], key: str) -> str:
    """`value`, if it is legal.

    Raises:
        UserError: names the key and lists the legal values.
    """
    if value not in legal:
        raise UserError(f"{key}={value!r} is not supported; legal: {', '.join(legal)}")
    return value


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The float64 betas of a diffusers scheduler config."""
    num_levels = int(config.get("num_train_timesteps", 1000))
    if num_levels < 1:
        raise UserError(f"num_train_timesteps={num_levels} must be at least 1")
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
        if len(betas) != num_levels:
            raise UserError(
                f"trained_betas has {len(betas)} values, num_train_timesteps is {num_levels}: make them equal"
            )
        return betas
    name = choose(str(config.get("beta_schedule", "linear")), BETA_SCHEDULES, "beta_schedule")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if name == "linear":
        return torch.linspace(start, end, num_levels, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num_levels, dtype=torch.float64) ** 2
    abar = [math.cos((i / num_levels + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_levels + 1)]
    return torch.tensor([min(1 - abar[i + 1] / abar[i], 0.999) for i in range(num_levels)], dtype=torch.float64)


def refuse(config: Mapping[str, Any], **legal: tuple[Any, ...]) -> None:
    """Stops at a key whose value is not one of `legal`, whose first value is the default.

    Raises:
        UserError: names the key and the value to set.
    """
    for key, values in legal.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"scheduler config: {key}={config[key]!r} is not supported; set it to {values[0]!r}")


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """abar [T] in float64, with zero terminal SNR where the config asks for it.

    Raises:
        UserError: names the key of a setting that is not supported.
    """
    refuse(config, clip_sample=(False,), thresholding=(False,), use_flow_sigmas=(False,), timestep_type=("discrete",))
    if str(config.get("variance_type", "")).startswith("learned"):
        raise UserError(
            f"scheduler config: variance_type={config['variance_type']!r} is not supported: use a fixed one"
        )
    betas = _betas(config)
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise UserError("scheduler config: betas must lie in (0, 1]: check beta_start, beta_end and trained_betas")
    abar = torch.cumprod(1 - betas, dim=0)
    if config.get("rescale_betas_zero_snr"):
        # arXiv 2305.08891, algorithm 1: shift sqrt(abar) to end at 0, scale it to start where it did.
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar
