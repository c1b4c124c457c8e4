"""Prompts to image files, resumable and split over processes, each image addressed by seed and prompt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from diffalign._atomic import atomic_path, sweep
from diffalign._json import read_json, to_json, write_json
from diffalign.config import Config, Generate, Sampling
from diffalign.distributed import World
from diffalign.models._user_files import FILE as USER_FILE
from diffalign.progress import Progress
from diffalign.recipes import _run
from diffalign.recipes._images import sample_images
from diffalign.recipes._user import user_cond
from diffalign.recipes.generate._manifest import MANIFEST as MANIFEST
from diffalign.recipes.generate._manifest import PNG_KEY, check_only, write_manifest
from diffalign.recipes.generate._manifest import image_name as image_name
from diffalign.recipes.generate._manifest import read_manifest as read_manifest
from diffalign.recipes.generate._prompts import PromptSequence, digest, open_prompts
from diffalign.recipes.generate._select import selection_of
from diffalign.recipes.generate._select_pictures import Chooser
from diffalign.recipes.generate._variants import Variant, changed, made_by, variants
from diffalign.types import UserError

# prompts and numbers of one batch -> pixels [H, W, 3] and, where they were selected, what the manifest says of it
Make = Callable[[Sequence[str], Sequence[int]], Sequence[tuple[NDArray[np.uint8], Mapping[str, Any] | None]]]


def write_images(
    model: Any,
    prompts: PromptSequence,
    folder: Path,
    settings: Generate,
    sampling: Sampling,
    world: World,
    quiet: bool = False,
    label: str = "generate",
    section: str = "generate",
) -> None:
    """The images that are not there yet, then the manifest, which is there for all processes when this returns.

    Resumes by the files it finds; each lands whole or not.
    """
    make = maker(model, settings, sampling, section)
    _write_missing(lambda: make, prompts, folder, settings, _batch_size(settings, sampling), world, quiet, label)
    world.barrier()
    if world.is_main:
        write_manifest(folder, prompts, settings)
    world.barrier()


def maker(model: Any, settings: Generate, sampling: Sampling, section: str = "generate") -> Make:
    """How a batch is made: as it comes, or each picture chosen among candidates.

    Raises:
        UserError: a user or selection that does not fit the model.
    """
    user, chosen = user_cond(model, settings, section), selection_of(settings)
    if chosen is not None:
        return Chooser(model, settings, sampling, *chosen, user)

    def plain(prompts: Sequence[str], numbers: Sequence[int]) -> list[tuple[NDArray[np.uint8], None]]:
        pixels = sample_images(model, prompts, numbers, settings.seed, sampling, user)
        return [(array, None) for array in pixels]

    return plain


def _batch_size(settings: Generate, sampling: Sampling) -> int:
    """Pictures that are kept of a batch, whose candidates fill one call of the network."""
    return sampling.batch_size if settings.select is None else max(1, sampling.batch_size // settings.candidates)


def _batches(prompts: PromptSequence, per_prompt: int, size: int) -> Iterator[list[tuple[int, str, int]]]:
    """(prompt_id, prompt, number) in lists of up to `size`."""
    batch: list[tuple[int, str, int]] = []
    for prompt_id, prompt in enumerate(prompts):
        for number in range(per_prompt):
            batch.append((prompt_id, prompt, number))
            if len(batch) == size:
                yield batch
                batch = []
    if batch:
        yield batch


def _write_missing(
    maker: Callable[[], Make],
    prompts: PromptSequence,
    folder: Path,
    settings: Generate,
    size: int,
    world: World,
    quiet: bool,
    label: str,
    only: Collection[Path] | None = None,
) -> None:
    """This process's pictures that are not there yet; `maker` is called where there are any."""
    total = len(prompts) * settings.images_per_prompt
    mine = sum(min(size, total - start) for start in range(world.rank * size, total, world.size * size))
    make: Make | None = None
    with Progress(label, mine, unit="img", quiet=quiet or not world.is_main) as progress:
        for index, batch in enumerate(_batches(prompts, settings.images_per_prompt, size)):
            if index % world.size != world.rank:
                continue
            files = [folder / image_name(p, k) for p, _, k in batch]
            missing = [i for i, file in enumerate(files) if (only is None or file in only) and not file.is_file()]
            if missing:
                make = make or maker()
                # all of the batch: a network call of other rows rounds otherwise, and a resumed folder would differ
                made = make([text for _, text, _ in batch], [k for _, _, k in batch])
                for i in missing:
                    pixels, facts = made[i]
                    save_image(Image.fromarray(pixels), files[i], facts)
            progress.advance(len(batch))


def save_image(image: Image.Image, path: Path, facts: Mapping[str, Any] | None = None) -> None:
    """A PNG that is there whole or not at all; `facts` travel inside it, as JSON text."""
    chunks = PngImagePlugin.PngInfo()
    if facts is not None:
        chunks.add_text(PNG_KEY, to_json(facts))
    with atomic_path(path) as temporary:
        image.save(temporary, format="png", pnginfo=chunks)


def generate(config: Config, quiet: bool = False) -> Path:
    """Images of the configured model, or of every variant, for the configured prompts; returns their folder.

    Raises:
        UserError: unusable prompts, model, scorers or folder; nothing is overwritten.
    """
    settings, parts = config.generate, variants(config)
    prompts = open_prompts(settings.prompts, "generate.prompts")
    check_only(settings, [part.name for part in parts], len(prompts))
    for part in parts:
        chosen = selection_of(part.config.generate)
        if chosen is not None:
            chosen[0].steps(part.config.sampling.num_steps)
    folder = Path(settings.out or f"runs/{config.title}-images")
    world = World(settings.device, "auto")
    _run.open_together(folder, config, ("model", "sampling", "generate"), world)
    facts = _facts(folder, prompts)
    world.barrier()
    if world.is_main:
        _sweep(folder, [part.name for part in parts])
        if "diffalign" not in facts:
            facts = _run.environment(str(world.device)) | facts
        write_json(folder / "run.json", facts)
    made = {part.name: _write_part(part, prompts, folder, world, facts, quiet) for part in parts}
    world.barrier()
    if world.is_main:
        write_manifest(folder, prompts, settings, made)
    world.close()
    return folder


def _facts(folder: Path, prompts: PromptSequence) -> dict[str, Any]:
    """What run.json says, of the same prompts.

    Raises:
        UserError: it is of others.
    """
    facts = dict(read_facts(folder))
    new = {"prompts": len(prompts), "prompts_digest": digest(prompts)}
    if any(facts.get(key, value) != value for key, value in new.items()):
        raise UserError(f"the prompts changed since {folder} began: choose another generate.out")
    return facts | new


def _write_part(
    part: Variant, prompts: PromptSequence, folder: Path, world: World, facts: dict[str, Any], quiet: bool
) -> Mapping[str, Any]:
    """The pictures of one variant. Its model is loaded where pictures, or the facts of how they are made, are missing.

    Raises:
        UserError: the weights are others than when the folder began.
    """
    config, settings = part.config, part.config.generate
    known = facts.get("made", {}).get(part.name)
    loaded: list[Any] = []

    def load() -> Any:
        if not loaded:
            loaded.append(load_for_images(config, settings.adapter, settings.adapter_scale, world))
            now = made_by(loaded[0], config)
            if known is not None and changed(known, now):
                where = f" of variant {part.name}" if part.name else ""
                told = ", ".join(changed(known, now))
                raise UserError(f"{told}{where} changed since {folder} began: choose another generate.out")
            if known is None and world.is_main:
                facts["made"] = facts.get("made", {}) | {part.name: now}
                write_json(folder / "run.json", facts)
        return loaded[0]

    if world.is_main and known is None:
        load()
    only = {folder / file for file in settings.only} if settings.only else None
    _write_missing(
        lambda: maker(load(), settings, config.sampling),
        prompts,
        folder / part.name,
        settings,
        _batch_size(settings, config.sampling),
        world,
        quiet,
        f"generate {part.name}".strip(),
        only,
    )
    return facts["made"][part.name] if world.is_main else {}


def _sweep(folder: Path, names: Sequence[str]) -> None:
    """Removes what a killed run left half written."""
    sweep(folder)
    for name in names:
        for inner in (folder / name).glob("*/"):
            sweep(inner)


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
