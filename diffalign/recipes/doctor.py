"""What this machine has, and what it lacks, in lines a bug report can quote."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from diffalign import __version__

REQUIRED = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "safetensors")
OPTIONAL = {
    "xformers": "model.attention=xformers: pip install 'diffalign[xformers]'",
    "bitsandbytes": "train.optimizer=adamw8bit: pip install 'diffalign[8bit]'",
    "wandb": "log.trackers=[wandb]: pip install 'diffalign[track]'",
    "trackio": "log.trackers=[trackio]: pip install 'diffalign[track]'",
    "gradio": "the comparison app: pip install 'diffalign[ui]'",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def doctor() -> list[str]:
    """Lines: versions, devices, precisions, optional packages, memory, disk, embedded models."""
    import torch

    lines = [f"diffalign {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for package in REQUIRED:
        version = _version(package)
        lines.append(f"  {package} {version}" if version else f"  {package} MISSING: pip install diffalign")
    lines.append(
        f"CPU: {os.cpu_count()} cores, {_memory_gib():.0f} GiB memory, torch uses {torch.get_num_threads()} threads"
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            lines.append(
                f"GPU {index}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
            )
        lines.append(f"  train.precision=auto means {'bf16' if torch.cuda.is_bf16_supported() else 'fp32'}")
    else:
        lines.append(
            "GPU: none; everything runs on the CPU (the sprites models need no GPU), train.precision=auto means fp32"
        )
    for package, use in OPTIONAL.items():
        version = _version(package) if importlib.util.find_spec(package) else None
        lines.append(f"  {package} {version}" if version else f"  {package} not installed ({use})")
    lines.append(f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free in {Path.cwd()}")
    weights = Path(__file__).parents[1] / "sprites" / "weights"
    for name in ("sdxl", "sd3"):
        there = (weights / name / "model_index.json").is_file()
        lines.append(f"embedded model sprites-{name}: {'there' if there else 'MISSING: reinstall diffalign'}")
    return lines
