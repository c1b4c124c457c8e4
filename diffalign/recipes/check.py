"""A dry run: the config resolved, one step on the family's tiny twin, and what the real run will take."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import yaml

from diffalign.config import TRAINING_SECTIONS, Config
from diffalign.data import images_per_record
from diffalign.recipes._fit import check_data, check_needs, num_candidates
from diffalign.recipes.train import run_folder, set_up, train_step
from diffalign.types import ScorerInfo

EFFICIENCY = 0.4  # share of the measured matrix speed that a training step reaches; a rule of thumb, so times are rough
TWIN_RECORDS = 4


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**26 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def matrix_speed(device: str, precision: str) -> float:
    """FLOP/s of large matrix products in the run's precision on this machine."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 4096 if device.startswith("cuda") else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    for _ in range(2):
        a @ a
    repeats, begun = 10, time.perf_counter()
    for _ in range(repeats):
        a @ a
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - begun)


def twin_step(config: Config) -> dict[str, float]:
    """One real step on the tiny twin, on the configured data where there is any, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="diffalign-check-") as folder:
        model = replace(config.model, path="tiny", resolution=None, variant=None, revision=None, compile=False)
        source = _twin_source(config, Path(folder))
        train = replace(config.train, out=str(Path(folder) / "run"), steps=1, batch_size=2, micro_batch_size=None)
        log = replace(config.log, trackers=())
        trainer = set_up(replace(config, model=model, source=source, train=train, log=log))
        trainer.batches.refresh(0)
        return train_step(trainer, trainer.batches.batch(0), 0)


@dataclasses.dataclass(frozen=True)
class Brightness:
    """Judges the twin's noise where a real scorer would cost minutes; never part of a run."""

    info: ClassVar[ScorerInfo] = ScorerInfo("brightness", "1", ("image",), "mean of the pixels", (0.0, 255.0))

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> Any:
        """Mean pixel value [N]."""
        import numpy as np

        return np.array([np.asarray(image, dtype=float).mean() for image in images])


def _twin_source(config: Config, folder: Path) -> Any:
    """The configured source on the smallest scale: its own data where it names any, else noise or stand-in prompts."""
    source = replace(config.source, cache_dir=str(folder / "cache"))
    smaller: dict[str, Any] = {}
    if hasattr(source, "sampling"):
        smaller = {"sampling": replace(source.sampling, num_steps=4, batch_size=4), "steps_per_round": 1}
        smaller["scorers"] = ("diffalign.recipes.check:Brightness",) if source.scorers or not _has_data(source) else ()
        smaller["weights"] = ()
    if _has_data(source):
        if source.data.get("path") is None:
            smaller["data"] = {"name": "records", "path": str(_synthetic(folder, num_candidates(config.objective)))}
        else:
            smaller["cache"] = False
        return replace(source, **smaller)
    if source.prompts is None:
        (folder / "prompts.txt").write_text("a red ball\na small house\n")
        smaller["prompts"] = str(folder / "prompts.txt")
    smaller |= {"prompts_per_round": 2, "scorer_timeout": None}
    if hasattr(source, "candidates"):
        smaller |= {"first_step": 1, "window": min(source.window, 2), "candidates": 2, "threshold": 0.0}
        smaller |= {"threshold_noisiest": None, "bad_below": None}
    else:
        smaller |= {"images_per_prompt": 2, "min_margin": 0.0, "reject": None}
        smaller["branch_at"] = None if source.branch_at is None else min(source.branch_at, 1)
        smaller["steps_used"] = None if source.steps_used is None else min(source.steps_used, 2)
    return replace(source, **smaller)


def _has_data(source: Any) -> bool:
    """Whether the source reads records; others make their own."""
    return hasattr(source, "data")


def _synthetic(folder: Path, num: int) -> Path:
    """A few pairs of noise, or records of `num` candidates, for configs that name no data yet."""
    import io

    import numpy as np
    from PIL import Image

    from diffalign.data import RecordWriter
    from diffalign.types import Record

    rng = np.random.default_rng(0)

    def noise() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, format="png")
        return buffer.getvalue()

    with RecordWriter(folder / "pairs") as writer:
        for index in range(TWIN_RECORDS):
            user: dict[str, Any] = {"user": f"user {index % 2}", "user_embedding": (1.0, float(index % 2))}
            images = tuple(noise() for _ in range(max(2, num)))
            utility = (1.0, 0.0, *[0.5] * (len(images) - 2))
            writer.write(Record(index, f"a picture {index}", images, utility, **user))
    return folder / "pairs"


def estimate(config: Config) -> dict[str, Any]:
    """Memory per device, time and disk of the real run; rough, and named as such."""
    import torch

    from diffalign.models._plan import plan

    device = "cuda" if torch.cuda.is_available() and config.train.device != "cpu" else "cpu"
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    of_model = plan(config.model)
    is_full = config.model.trainable == "full"
    frozen_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[config.model.dtype]
    weights = of_model.num_parameters * (4 if is_full else frozen_bytes)
    copies = of_model.num_parameters * frozen_bytes if config.names["reference"] == "frozen" else 0
    training = of_model.num_trainable * (12 if is_full else 16)  # gradient and two moments, and LoRA's own weights
    per_prompt = rows_per_prompt(config)
    rows = per_prompt * (config.train.micro_batch_size or config.train.batch_size)
    activations = of_model.activation_bytes * rows * (1.0 if precision == "fp32" else 0.6)
    has_reference = config.names["reference"] != "none"
    passes = (3 if is_full else 2.3) + has_reference + bool(config.model.gradient_checkpointing)
    step_flops = of_model.forward_flops * (per_prompt * config.train.batch_size * passes + sampling_rows(config))
    seconds = step_flops / (EFFICIENCY * matrix_speed(device, precision))
    result = dataclasses.asdict(of_model) | {
        "device": device,
        "precision": precision,
        "memory_bytes": weights + copies + training + activations,
        "activation_bytes_per_step": activations,
        "step_flops": step_flops,
        "step_seconds": seconds,
        "run_seconds": seconds * config.train.steps,
    }
    if _has_data(config.source) and config.source.data.get("path"):
        result["num_records"] = len(config.source.reader)
    return result


def rows_per_prompt(config: Config) -> int:
    """Rows of the network that a unit of a batch takes in training."""
    source = config.source
    if config.likelihood.takes == "images":
        is_group = getattr(source, "compare", "pairs") == "groups"
        return (source.images_per_prompt if is_group else 2) * config.likelihood.draws
    guided = 1 if source.sampling.cfg_scale == 1 else 2
    if hasattr(source, "candidates"):
        return guided * (1 if source.window == 1 else 2)
    steps = 1 if source.record == "steps" else source.steps_used or source.sampling.num_steps
    return guided * steps * (source.images_per_prompt if source.compare == "groups" else 2)


def sampling_rows(config: Config) -> float:
    """Rows of the network that a source which samples takes per optimizer step, on the mean; 0 of others."""
    source = config.source
    if not hasattr(source, "sampling"):
        return 0.0
    guided = 1 if source.sampling.cfg_scale == 1 else 2
    if _has_data(source):
        return guided * source.sampling.num_steps * config.train.batch_size
    per_prompt = source.sampling.num_steps * getattr(source, "images_per_prompt", 1)
    if hasattr(source, "candidates"):
        per_prompt = source.first_step + 1 + source.candidates * (source.sampling.num_steps - source.first_step - 1)
    return guided * per_prompt * source.prompts_per_round / source.steps_per_round


def cache_bytes(config: Config, estimated: dict[str, Any]) -> float:
    """Disk of the latents: mean and std, both flips; text is one row a caption beside it."""
    if not getattr(config.source, "cache", False) or "num_records" not in estimated:
        return 0.0
    item = 2 if config.source.cache_dtype == "float16" else 4
    per_image = math.prod(estimated["latent_shape"]) * 2 * item * (2 if config.source.flip else 1)
    return per_image * estimated["num_records"] * images_per_record(config.source.reader)


def check(config: Config) -> dict[str, Any]:
    """Checks a training config without training; `text` of the result is for people.

    Raises:
        UserError: whatever the run itself would refuse.
    """
    check_needs(config)
    if config.source.data.get("path") if _has_data(config.source) else config.source.prompts:
        check_data(config)
    scalars = twin_step(config)
    estimated = estimate(config)
    disk = cache_bytes(config, estimated)
    folder = run_folder(config)
    height, width = estimated["resolution"]
    size = f"{estimated['num_parameters'] / 1e6:.1f} M parameters, {estimated['num_trainable'] / 1e6:.2f} M trained"
    lines = [
        yaml.safe_dump(config.to_dict(TRAINING_SECTIONS), sort_keys=False).rstrip(),
        "",
        f"one step on the tiny twin: loss {scalars['loss']:.6f}, gradient norm {scalars['grad_norm']:.3g}",
        f"model: {size}, {height} x {width} pixels",
        f"memory on the {estimated['device']} (rough): {_gib(estimated['memory_bytes'])}, of which activations"
        f" {_gib(estimated['activation_bytes_per_step'])} (see train.micro_batch_size, model.gradient_checkpointing)",
        f"time here (rough, {estimated['precision']}): {_duration(estimated['step_seconds'])} a step,"
        f" {_duration(estimated['run_seconds'])} for {config.train.steps} steps",
    ]
    if "num_records" in estimated:
        free = shutil.disk_usage(folder.parent if folder.parent.is_dir() else Path.cwd()).free
        lines.append(
            f"data: {estimated['num_records']} records; latents cache {_gib(disk)} plus the captions' embeddings,"
            f" {_gib(free)} free"
        )
    elif _has_data(config.source):
        lines.append("data: none named (source.data.path); the twin trained on noise")
    else:
        judges = ", ".join(config.source.judge.names) if config.source.scorers else "none named yet (source.scorers)"
        prompts = len(config.source.prompt_list) if config.source.prompts else "no prompts yet (source.prompts)"
        lines.append(f"rounds: {prompts} prompts, judged by {judges}; the twin was judged by brightness")
    lines.append(f"run folder: {folder}" + (" (exists: the run would resume)" if folder.exists() else ""))
    return estimated | {"cache_bytes": disk, "twin": scalars, "text": "\n".join(lines)}
