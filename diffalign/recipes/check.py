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
from diffalign.sources._twin import StandIns
from diffalign.sources.offline import Offline
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
        source = config.source.twin(_stand_ins(Path(folder), num_candidates(config.objective)))
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


def _stand_ins(folder: Path, num: int) -> StandIns:
    """A few records of `num` pictures of noise, two prompts, and a judge."""
    (folder / "prompts.txt").write_text("a red ball\na small house\n")
    data = {"name": "records", "path": str(_synthetic(folder, num))}
    prompts, scorer = str(folder / "prompts.txt"), "diffalign.recipes.check:Brightness"
    return StandIns(str(folder / "cache"), data, prompts, scorer)


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
    per_prompt = config.source.training_rows(config.likelihood.draws if config.likelihood.takes == "images" else 1)
    batch = config.train.batch_size
    rows = per_prompt * (config.train.micro_batch_size or batch)
    activations = of_model.activation_bytes * rows * (1.0 if precision == "fp32" else 0.6)
    has_reference = config.names["reference"] != "none"
    passes = (3 if is_full else 2.3) + has_reference + bool(config.model.gradient_checkpointing)
    step_flops = of_model.forward_flops * (per_prompt * batch * passes + config.source.sampling_rows(batch))
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
    if isinstance(config.source, Offline) and config.source.data.get("path"):
        result["num_records"] = len(config.source.reader)
    return result


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
    if config.source.data.get("path") if isinstance(config.source, Offline) else config.source.prompts:
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
    elif isinstance(config.source, Offline):
        lines.append("data: none named (source.data.path); the twin trained on noise")
    else:
        judges = ", ".join(config.source.judge.scorers) if config.source.scorers else "none named yet (source.scorers)"
        prompts = len(config.source.prompt_list) if config.source.prompts else "no prompts yet (source.prompts)"
        lines.append(f"rounds: {prompts} prompts, judged by {judges}; the twin was judged by brightness")
    lines.append(f"run folder: {folder}" + (" (exists: the run would resume)" if folder.exists() else ""))
    return estimated | {"cache_bytes": disk, "twin": scalars, "text": "\n".join(lines)}
