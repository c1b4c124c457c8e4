"""A round's pictures: decoded for the judge, kept as PNG, and as preference records for later runs."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign import randomness
from diffalign._atomic import write_atomic
from diffalign.data import RecordWriter
from diffalign.sources._judge import Judge
from diffalign.types import Record

NUM_SAMPLE_PROMPTS = 8  # of the list, offered for sample grids


def decoded(policy: Any, latents: Float[Tensor, "N C h w"]) -> list[Image.Image]:
    """Pictures of finished latents."""
    pixels = policy.decode(latents).permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(array) for array in (pixels * 255).round().clip(0, 255).astype(np.uint8)]


def picture(folder: Path, part: int, number: int) -> Path:
    """Where image `number` of a part lies."""
    return folder / "images" / f"{part:05d}-{number:03d}.png"


def save(images: Sequence[Image.Image], folder: Path, part: int) -> None:
    """PNG files that are there whole or not at all."""
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        image.save(buffer, format="png")
        write_atomic(picture(folder, part, number), buffer.getvalue())


def write_records(
    parts: Iterable[tuple[Sequence[str], Float[NDArray[np.float32], "P K J"]]], folder: Path, judge: Judge
) -> None:
    """`<round>/records`: a record per prompt with all its judged images, their utility and every score.

    What an interrupted call left is written anew.
    """
    if (folder / "round.json").is_file():
        return
    shutil.rmtree(folder / "records", ignore_errors=True)
    with RecordWriter(folder / "records") as writer:
        for part, (prompts, scores) in enumerate(parts):
            for p, prompt in enumerate(prompts):
                judged = np.flatnonzero(np.isfinite(scores[p]).all(axis=1)).tolist()
                if len(judged) < 2:
                    continue
                k = scores.shape[1]
                images = tuple(picture(folder, part, p * k + c).read_bytes() for c in judged)
                utility = judge.utility(scores[p][judged])
                columns = {name: tuple(scores[p][judged, j].tolist()) for j, name in enumerate(judge.names)}
                record_id = randomness.address(prompt, *(hashlib.blake2b(image).hexdigest() for image in images))
                writer.write(Record(record_id, prompt, images, tuple(utility.tolist()), scores=columns))


def prompt_facts(prompts: Sequence[str], judge: Judge) -> Mapping[str, Any]:
    """What run.json says: which prompts, and what the judge's scores mean."""
    digest = hashlib.blake2b(json.dumps(list(prompts)).encode(), digest_size=8).hexdigest()
    return {
        "fingerprint": f"prompts-{digest}",
        "num_records": len(prompts),
        "scorers": {name: asdict(scorer.info) if scorer else "people" for name, scorer in judge.scorers.items()},
        "sample_prompts": list(dict.fromkeys(prompts))[:NUM_SAMPLE_PROMPTS],
    }
