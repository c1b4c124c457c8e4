"""Measures an embedded model with the gold judge: `python -m diffalign.sprites.measure {sdxl,sd3}`.

Samples pictures for held-out captions of every kind and writes what the judge says, with the settings that reproduce
it, under `judged` in the model's `training.json`. Run it once training has ended: training rewrites that file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.progress import Progress
from diffalign.sprites import MODELS, model_path
from diffalign.sprites.judge import Judgement, judge
from diffalign.sprites.scene import KINDS, SIZE, prompts

GUIDANCE = 5.0
STEPS = 20
BATCH = 32
T5_TOKENS = 8  # zero tokens in place of the T5 encoder that the SD3 model lacks


def load(folder: Path) -> Any:
    """The folder's pipeline in float32 on the CPU, its progress bar off. Raises OSError where there is none."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline

    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if name == "StableDiffusion3Pipeline":
        # diffusers holds SD3's T5 for required unless told that it is absent on purpose.
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            folder, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
        )
    else:
        pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(
    pipeline: Any, texts: Sequence[str], seed: int = 0, guidance: float = GUIDANCE, steps: int = STEPS
) -> list[Image.Image]:
    """One 64 x 64 picture a caption; picture i starts from the noise of seed + i, whatever the batch."""
    extra = {"max_sequence_length": T5_TOKENS} if hasattr(pipeline, "transformer") else {}
    pictures: list[Image.Image] = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        pictures += pipeline(batch, guidance_scale=guidance, num_inference_steps=steps, generator=noise, **extra).images
    return pictures


def summarise(verdicts: Sequence[Judgement]) -> dict[str, Any]:
    """Share fully correct, mean score, and each attribute's share right; all in [0, 1]."""
    votes: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, right in verdict.attributes.items():
            votes.setdefault(name, []).append(right)
    return {
        "pictures": len(verdicts),
        "correct": round(sum(verdict.correct for verdict in verdicts) / len(verdicts), 4),
        "score": round(sum(verdict.score for verdict in verdicts) / len(verdicts), 4),
        "attributes": {name: round(sum(rights) / len(rights), 4) for name, rights in sorted(votes.items())},
    }


def measure(
    pipeline: Any, num: int, seed: int = 0, guidance: float = GUIDANCE, steps: int = STEPS
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """Judged accuracy by kind on `num` held-out captions each, and the pictures."""
    by_kind: dict[str, Any] = {}
    pictures: dict[str, list[Image.Image]] = {}
    begun = time.monotonic()
    with Progress("measure", num * len(KINDS), unit="picture") as progress:
        for kind in KINDS:
            texts, pictures[kind] = prompts(num, seed, "heldout", kind), []
            for start in range(0, num, BATCH):
                batch = texts[start : start + BATCH]
                pictures[kind] += sample(pipeline, batch, seed + start, guidance, steps)
                progress.advance(len(batch))
            by_kind[kind] = summarise([judge(*pair) for pair in zip(pictures[kind], texts, strict=True)])
    report = {"split": "heldout", "guidance": guidance, "steps": steps, "seed": seed}
    report |= {"scheduler": type(pipeline.scheduler).__name__, "seconds": round(time.monotonic() - begun)}
    return report | {"kinds": by_kind}, pictures


def grid(rows: dict[str, list[Image.Image]], columns: int = 12, scale: int = 2) -> Image.Image:
    """The first `columns` pictures of every kind, a row each, enlarged without smoothing."""
    side = SIZE * scale
    sheet = Image.new("RGB", (columns * (side + 4), len(rows) * (side + 4)), "grey")
    for row, pictures in enumerate(rows.values()):
        for column, picture in enumerate(pictures[:columns]):
            large = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (column * (side + 4) + 2, row * (side + 4) + 2))
    return sheet


def commit() -> str | None:
    """The checkout's commit; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def stamp(folder: Path, report: dict[str, Any]) -> None:
    """Adds the report to the folder's training.json, replacing an earlier one; the file appears whole."""
    path = folder / "training.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    values["judged"] = report | {"cores": os.cpu_count(), "commit": commit()}  # of the measuring, not of the training
    temporary = path.with_name(f".training.{os.getpid()}.json")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{' or '.join(MODELS)}, or a pipeline folder")
    parser.add_argument("--num", type=int, default=100, help="held-out captions of each kind")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--grid", type=Path, help="also write a sheet of samples here (PNG)")
    parser.add_argument("--dry", action="store_true", help="print only, leave training.json as it is")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = model_path(arguments.model) if arguments.model in MODELS else Path(arguments.model)
    report, pictures = measure(load(folder), arguments.num, arguments.seed, arguments.guidance, arguments.steps)
    print(json.dumps(report, indent=2))
    if arguments.grid:
        grid(pictures).save(arguments.grid)
    if not arguments.dry:
        stamp(folder, report)


if __name__ == "__main__":
    main()
