"""Pairs per second and peak memory of the training step, against a plain loop, on the same model in one run.

The plain loop is the usual research script: every step it decodes and VAE-encodes both images, encodes the caption, and
runs policy and reference on winner and loser as four calls. Ours reads the cache and makes two folded calls. Both train
the same LoRA with the same optimizer on the same pairs.

    python benchmarks/train_step.py                          # the tiny SDXL twin, CPU
    python benchmarks/train_step.py model.path=FOLDER model.dtype=bfloat16 train.precision=bf16     # a real one, GPU
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import softplus

from diffalign._json import write_json
from diffalign.config import Config, resolve
from diffalign.data import RecordWriter
from diffalign.recipes._run import environment
from diffalign.recipes.train import set_up, train_step
from diffalign.types import Record

NUM_PAIRS = 64
BETA = 5000.0


def make_pairs(folder: Path, side: int) -> Path:
    """Noise pictures: decoding and encoding cost what real ones cost."""
    rng = np.random.default_rng(0)

    def picture() -> bytes:
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, format="jpeg", quality=95)
        return buffer.getvalue()

    with RecordWriter(folder / "pairs") as writer:
        for index in range(NUM_PAIRS):
            writer.write(Record(index, f"a picture of thing number {index}", (picture(), picture()), (1.0, 0.0)))
    return folder / "pairs"


def configure(folder: Path, words: list[str], steps: int, batch_size: int) -> Config:
    """The same run for both loops."""
    fixed = {
        "model": {"path": "tiny"},
        "train": {"out": str(folder / "run"), "steps": steps, "batch_size": batch_size, "lr": 1e-5},
        "source": {
            "data": {"path": str(folder / "pairs")},
            "cache_dir": str(folder / "cache"),
            "holdout": 0.0,
            "prompt_dropout": 0.0,
        },
        "objective": {"beta": BETA},
        "log": {"trackers": []},
    }
    return resolve(["sdxl", "diffusion-dpo", fixed, *words])


def run_ours(config: Config, warmup: int) -> float:
    """Seconds of the steps after the warm-up."""
    trainer = set_up(config)
    begun = 0.0
    for step in range(config.train.steps):
        if step == warmup:
            _synchronize()
            begun = time.perf_counter()
        train_step(trainer, trainer.batches.batch(step), step)
    _synchronize()
    return time.perf_counter() - begun


def run_plain(config: Config, warmup: int) -> float:
    """The same with four calls a step and nothing cached."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"
    model = config.model.load()
    model.to(device)
    reader = config.source.reader
    parameters = list(model.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr)
    height, width = model.resolution
    size = torch.tensor([[height, width]])
    dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    begun = 0.0
    for step in range(config.train.steps):
        if step == warmup:
            _synchronize()
            begun = time.perf_counter()
        records = [
            reader[(step * config.train.batch_size + row) % len(reader)] for row in range(config.train.batch_size)
        ]
        prompts = [record.prompt for record in records]
        size_cond = model.size_cond(*(x.expand(len(records), 2) for x in (size, 0 * size, size)))
        cond = {key: value.to(device) for key, value in (model.encode_prompts(prompts) | size_cond).items()}
        t = torch.randint(0, 1000, (len(records),), device=device)
        t = (t + 1) / 1000
        noise = torch.randn(len(records), *model.latent_shape(height, width), device=device)
        errors, references = [], []
        for k in range(2):
            pixels = torch.stack([_pixels(record.images[k], height, width) for record in records])
            mean, std = model.encode_images(pixels)
            x0 = (mean + std * torch.randn_like(mean)).to(device)
            xt, target = model.schedule.add_noise(x0, noise, t), model.schedule.target(x0, noise, t)
            with torch.autocast(device, dtype, enabled=dtype is not None):
                errors.append((model(xt, t, cond).float() - target).square().mean(dim=(1, 2, 3)))
                with torch.no_grad(), model.adapter_off():
                    references.append((model(xt, t, cond).float() - target).square().mean(dim=(1, 2, 3)))
        margin = -0.5 * BETA * ((errors[0] - references[0]) - (errors[1] - references[1]))
        softplus(-margin).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _synchronize()
    return time.perf_counter() - begun


def _pixels(data: bytes, height: int, width: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One loop in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configure(folder, arguments.config, arguments.warmup + arguments.steps, arguments.batch_size)
        resolution = config.model.resolution or (1024 if config.model.path != "tiny" else 32)
        make_pairs(folder, resolution if isinstance(resolution, int) else resolution[0])
        seconds = (run_ours if mode == "ours" else run_plain)(config, arguments.warmup)
    result = {"pairs_per_second": arguments.steps * arguments.batch_size / seconds}
    if torch.cuda.is_available():
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    result["peak_process_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result


def main() -> None:
    """Alternates the two loops in fresh processes; prints medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("both", "ours", "plain"), default="both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    parser.add_argument("config", nargs="*", help="key=value over the config")
    arguments = parser.parse_args()
    if arguments.mode != "both":
        print(json.dumps(measure(arguments.mode, arguments)))
        return
    words = [f"--steps={arguments.steps}", f"--warmup={arguments.warmup}", f"--batch-size={arguments.batch_size}"]
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for _ in range(arguments.rounds):
        for mode, results in found.items():
            command = [sys.executable, __file__, f"--mode={mode}", *words, *arguments.config]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
    medians = {
        mode: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for mode, rows in found.items()
    }
    speeds = [a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(found["ours"], found["plain"], strict=True)]
    ratio = {"median": statistics.median(speeds), "min": min(speeds), "max": max(speeds)}
    for mode, values in medians.items():
        print(mode, ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
    print(f"speed ratio ours / plain: {ratio['median']:.2f} (min {ratio['min']:.2f}, max {ratio['max']:.2f})")
    stamp = environment("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"config": arguments.config, "steps": arguments.steps, "batch_size": arguments.batch_size}
    write_json(arguments.out, {"settings": settings, "medians": medians, "ratio": ratio, "runs": found, "stamp": stamp})


if __name__ == "__main__":
    main()
