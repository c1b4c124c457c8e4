"""What every scorer asks of a call: where it runs, and a prompt for each picture."""

from __future__ import annotations

from collections.abc import Sized

import torch


def device_of(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_lengths(images: Sized, prompts: Sized) -> None:
    """Refuses another number of prompts than of pictures.

    Raises:
        ValueError: what a scorer raises for input it cannot judge.
    """
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
