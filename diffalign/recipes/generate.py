"""Prompts x numbers to image files, resumable and split over processes, each image addressed by seed and prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign._atomic import write_atomic
from diffalign._json import read_json, write_json
from diffalign.config import Config, Generate, Sampling
from diffalign.data import read_prompts
from diffalign.distributed import World
from diffalign.models._user_files import FILE as USER_FILE
from diffalign.progress import Progress
from diffalign.recipes import _run
from diffalign.recipes._images import sample_images
from diffalign.recipes._user import user_cond
from diffalign.types import UserError

MANIFEST = "manifest.jsonl"


def image_name(prompt_id: int, number: int) -> str:
    """Folders of a thousand prompts: file systems dislike a million files in one."""
    return f"{prompt_id // 1000:05d}/{prompt_id:07d}-{number:03d}.png"


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that `generate` wrote, one at a time: file, prompt, prompt_id, number, seed.

    Raises:
        UserError: no manifest there, or a broken line.
    """
    manifest = path / MANIFEST if path.is_dir() else path
    if not manifest.is_file():
        raise UserError(f"{path} holds no {MANIFEST}: name a folder that `diffalign generate` finished")
    with manifest.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{manifest}: line {number} is not JSON: generate again or delete the line") from error


def write_images(
    model: Any,
    prompts: list[str],
    folder: Path,
    settings: Generate,
    sampling: Sampling,
    world: World,
    quiet: bool = False,
    label: str = "generate",
    section: str = "generate",
) -> None:
    """The images that are not there yet, then the manifest. Resumes by the files it finds; each lands whole or not."""
    user = user_cond(model, settings, section)
    wanted = [(p, k) for p in range(len(prompts)) for k in range(settings.images_per_prompt)]
    size = sampling.batch_size
    batches = [wanted[i : i + size] for i in range(0, len(wanted), size)][world.rank :: world.size]
    with Progress(label, sum(map(len, batches)), unit="img", quiet=quiet or not world.is_main) as progress:
        for batch in batches:
            missing = [(p, k) for p, k in batch if not (folder / image_name(p, k)).is_file()]
            if missing:
                texts, numbers = [prompts[p] for p, _ in missing], [k for _, k in missing]
                pixels = sample_images(model, texts, numbers, settings.seed, sampling, user)
                for (p, k), array in zip(missing, pixels, strict=True):
                    save_image(Image.fromarray(array), folder / image_name(p, k))
            progress.advance(len(batch))
    world.barrier()
    if world.is_main:
        rows = (
            {"file": image_name(p, k), "prompt": prompts[p], "prompt_id": p, "number": k, "seed": settings.seed}
            for p, k in wanted
        )
        write_atomic(folder / MANIFEST, "".join(json.dumps(row) + "\n" for row in rows))


def save_image(image: Image.Image, path: Path) -> None:
    """A PNG that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.writing")
    image.save(temporary, format="png")
    os.replace(temporary, path)


def generate(config: Config, quiet: bool = False) -> Path:
    """Images of the configured model (and adapter) for the configured prompts; returns their folder.

    Raises:
        UserError: unusable prompts, model or folder; nothing is overwritten.
    """
    config.require("model")
    settings = config.generate
    prompts = read_prompts(settings.prompts, "generate.prompts")
    folder = Path(settings.out or f"runs/{config.title}-images")
    world = World(settings.device, "auto")
    _run.open_together(folder, config, ("model", "sampling", "generate"), world)
    facts = read_facts(folder)
    if facts and facts["prompts"] != len(prompts):
        raise UserError(f"the prompts changed since {folder} began: choose another generate.out")
    world.barrier()
    model = load_for_images(config, settings.adapter, settings.adapter_scale, world)
    if world.is_main and not facts:
        write_json(folder / "run.json", _run.environment(str(world.device)) | {"prompts": len(prompts)})
    write_images(model, prompts, folder, settings, config.sampling, world, quiet)
    world.close()
    return folder


def read_facts(folder: Path) -> Mapping[str, Any]:
    """What run.json says."""
    return read_json(folder / "run.json")


def load_for_images(config: Config, adapter: str | None, scale: float, world: World) -> Any:
    """The model on the world's device, with what a run exported where it is named: an adapter, or full weights."""
    is_pipeline = adapter is not None and (Path(adapter) / "model_index.json").is_file()
    model = (replace(config.model, path=adapter) if is_pipeline else config.model).load()
    if adapter and (not is_pipeline or (Path(adapter) / USER_FILE).is_file()):
        model.load_adapter(adapter, scale)
    model.to(world.device)
    return model
