"""Small preference data for the tests, and a way to run the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, mean: float, side: int = 32) -> bytes:
    """A noisy PNG around a grey level."""
    rng = np.random.default_rng(seed)
    pixels = (rng.normal(size=(side, side, 3)) * 30 + mean).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def pickapic(path: Path, num: int = 24, labels: Sequence[float] = (1.0, 0.0, 1.0)) -> Path:
    """A Pick-a-Pic-layout Parquet file whose winners are bright and whose losers are dark."""
    rows = []
    for index in range(num):
        label = labels[index % len(labels)]
        bright, dark = picture(2 * index, 200), picture(2 * index + 1, 60)
        first, second = (bright, dark) if label >= 0.5 else (dark, bright)
        rows.append({"jpg_0": first, "jpg_1": second, "label_0": label, "caption": f"thing number {index}"})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def tokens(model: str, folder: Path, out: str = "run", **overrides: object) -> list[str]:
    """Command-line words of a small training run on the tiny twin of a family."""
    settings: dict[str, object] = {
        "model.path": "tiny",
        "model.dtype": "float32",
        "source.data.path": folder / "pairs.parquet",
        "source.cache_dir": folder / "cache",
        "source.cache_dtype": "float32",
        "source.holdout": 0.2,
        "train.out": folder / out,
        "train.steps": 4,
        "train.batch_size": 4,
        "train.warmup_steps": 1,
        "train.lr": 1e-3,
        "train.validate_every": 2,
        "train.checkpoint_every": 1,
        "train.device": "cpu",
        "sampling.num_steps": 2,
        "train.sample_prompts": "[a thing]",
        "log.trackers": "[]",
    }
    settings |= {key.replace("__", "."): value for key, value in overrides.items()}
    return [model, "diffusion-dpo", *(f"{key}={value}" for key, value in settings.items())]


def run_cli(*words: str, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`diffalign WORDS` in a process of its own, or in several over gloo."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launcher, "diffalign", *words], capture_output=True, text=True, timeout=timeout, env=environment
    )
