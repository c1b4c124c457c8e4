"""Models on the same prompts and seeds: win rates with intervals, diversity, drift, a picture grid, a report."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign import evaluation, report
from diffalign.config import Config, Generate, Score, resolve
from diffalign.data import Prompts, read_prompt_set
from diffalign.distributed import World
from diffalign.progress import Progress
from diffalign.recipes import _run
from diffalign.recipes.evaluate._report import Evaluated, report_data, write_grid
from diffalign.recipes.evaluate._spread import looks_of, spread
from diffalign.recipes.evaluate._training import Seen, kinds, run_folders, seen_by
from diffalign.recipes.generate import load_for_images, read_manifest, write_images
from diffalign.recipes.score._fill import Asker, Filler, open_cache, share
from diffalign.scorers._build import build_scorers
from diffalign.types import Scorer, UserError

BASE = "base"


@dataclass(frozen=True)
class Evaluation:
    """Where the report is and what it says."""

    folder: Path
    comparison: evaluation.Comparison
    report: Path
    summary: str  # the headline, as one line


@dataclass(frozen=True)
class Contestant:
    """What makes a model's pictures."""

    config: Config
    adapter: str | None = None


def model_names(adapters: Sequence[str], names: Sequence[str], models: Sequence[str] = ()) -> list[str]:
    """What base, adapters and whole models are called, in this order.

    Raises:
        UserError: names that do not fit, or repeat.
    """
    if names and len(names) != len(adapters) + len(models):
        others = f" and {len(models)} models" if models else ""
        raise UserError(f"evaluate.names holds {len(names)} names for {len(adapters)} adapters{others}")
    if not names:  # runs/x/export is called x
        paths = [Path(adapter) for adapter in adapters] + [Path(model.removesuffix(".yaml")) for model in models]
        names = [path.parent.name if path.name == "export" else path.name for path in paths]
    if len({BASE, *names}) != len(names) + 1:
        raise UserError(f"evaluate.names must differ from each other and from {BASE!r} (got {', '.join(names)})")
    return [BASE, *names]


def contestants(config: Config) -> dict[str, Contestant]:
    """name -> model; the base comes first.

    Raises:
        UserError: an unknown config, or names that do not fit.
    """
    settings = config.evaluate
    made = [Contestant(config), *(Contestant(config, adapter) for adapter in settings.adapters)]
    for token in settings.models:
        if Path(token).is_dir():
            made.append(Contestant(replace(config, model=replace(config.model, path=token))))
            continue
        other = resolve([token])
        other.require("model")
        made.append(
            Contestant(replace(config, model=other.model, names={**config.names, "model": other.names["model"]}))
        )
    return dict(zip(model_names(settings.adapters, settings.names, settings.models), made, strict=True))


def score_folder(
    folder: Path, scorers: Mapping[str, Scorer], settings: Score, world: World, name: str, quiet: bool
) -> dict[str, NDArray[np.float64]]:
    """scorer -> a score per picture, in the manifest's order. What the score cache holds is not asked again.

    Args:
        settings: where the cache is, and how much is asked at once; every picture must have every score.
        name: of the model, for the progress bar.

    Raises:
        UserError: a picture that cannot be read or judged.
    """
    settings = replace(settings, strict=True, retry=True)
    with warnings.catch_warnings(), open_cache(settings, folder / "scores") as cache:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by their size, in one line
        filler = Filler(folder, [Asker(*named, cache, settings) for named in scorers.items()], cache, settings)
        mine, num = share(read_manifest(folder), sum(1 for _ in read_manifest(folder)), settings.batch_size, world)
        with Progress(f"score {name}", num, unit="img", quiet=quiet or not world.is_main) as progress:
            filler.fill(mine, progress)
            for line in filter(None, (asker.drift() for asker in filler.askers)):
                progress.say(f"evaluate: {line}")
        world.barrier()
        given = [filler.outcome(row)[0] for row in read_manifest(folder)]
        world.barrier()
    if not settings.cache and world.is_main:
        cache.delete()
    return {scorer: np.array([scores[scorer] for scores in given]) for scorer in scorers}


def categories_of(prompts: list[str]) -> list[str] | None:
    """The kinds of sprites captions; None as soon as one is anything else."""
    from diffalign.sprites.scene import parse

    try:
        return [parse(prompt).kind for prompt in prompts]
    except ValueError:
        return None


def evaluate(config: Config, quiet: bool = False, seconds: Mapping[str, float] | None = None) -> Evaluation:
    """Generates what is missing, scores, compares, and writes report.html, report.md and results.json.

    Several processes share pictures and scores; the main one writes the report.

    Args:
        seconds: stages that ran before, for the report (`demo` gives them).

    Raises:
        UserError: unusable prompts, models, adapters, scorers or folder.
    """
    config.require("model")
    settings = config.evaluate
    prompts = read_prompt_set(settings.prompts, "evaluate.prompts")
    scorers = build_scorers(settings.scorers, "evaluate.scorers")
    looks = looks_of(settings.features, scorers)
    models = contestants(config)
    trained = {name: training_of(model, settings.run) for name, model in models.items()}
    judges = kinds(settings.scorers, scorers, trained, settings.train_scorers, settings.ground_truth)
    folder = Path(settings.out or f"runs/{config.title}-evaluation")
    world = World(settings.device, "auto")
    _run.open_together(folder, config, ("model", "sampling", "evaluate"), world)
    begun = time.perf_counter()
    folders = {name: folder / "images" / name for name in models}
    sizes = {name: _write(model, name, folders[name], prompts, world, quiet) for name, model in models.items()}
    rows = same_rows(folders, prompts.texts, settings.seeds)
    scores = {name: score_folder(folders[name], scorers, config.score, world, name, quiet) for name in models}
    of_rows = prompts.categories or categories_of(prompts.texts) or []
    comparison = evaluation.compare(
        scores,
        [row["prompt"] for row in rows],
        [row["number"] for row in rows],
        BASE,
        categories=[of_rows[row["prompt_id"]] for row in rows] if len(set(of_rows)) > 1 else None,
        train_scorers=[name for name, of in judges.items() if of["kind"] == "train"],
        seed=settings.seed,
    )
    varied = None
    if world.is_main:  # nothing else waits for it
        varied = spread(folders, BASE, looks, level=comparison.level, seed=settings.seed, quiet=quiet)
    stages = dict(seconds or {}) | {"evaluate": time.perf_counter() - begun}
    gaps = [f"{name}: {gap}" for name, of in trained.items() for gap in of.gaps]
    found = Evaluated(config, comparison, varied, scorers, judges, gaps, scores, rows, folders, sizes, prompts.facts)
    data = report_data(found, stages, str(world.device))
    if world.is_main:
        report.write_report(folder, data)
        write_grid(data.pictures, folder / "grid.png")
    world.close()
    head = report.headline(data)
    return Evaluation(folder, comparison, folder / "report.html", head["text"] if head else "nothing is compared")


def training_of(model: Contestant, run: str | None) -> Seen:
    """What the training of a model's weights saw; `run` where an adapter lies beside no run folder."""
    if model.adapter is not None:
        beside = run_folders(Path(model.adapter))
        return seen_by(model.adapter if beside or run is None else run)
    path = Path(str(model.config.model.path))
    return seen_by(path) if path.is_dir() and run_folders(path) else Seen()  # else what was published


def _write(model: Contestant, name: str, folder: Path, prompts: Prompts, world: World, quiet: bool) -> tuple[int, int]:
    """A model's pictures; returns their height and width."""
    settings = model.config.evaluate
    how = Generate(images_per_prompt=settings.seeds, seed=settings.seed, device=settings.device)
    if model.adapter is not None:
        how = replace(how, user=settings.user, user_data=settings.user_data, user_shots=settings.user_shots)
    loaded = load_for_images(model.config, model.adapter, 1.0, world)
    label, sampling = f"sample {name}", model.config.sampling
    write_images(loaded, prompts.texts, folder, how, sampling, world, quiet, label, "evaluate")
    height, width = loaded.resolution
    return int(height), int(width)


def same_rows(folders: Mapping[str, Path], prompts: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """The base's manifest, after a look that every model has exactly the same prompts and numbers in the same order.

    A list of another length, zipped, would judge some pictures and drop the rest without a word.

    Raises:
        UserError: names the folder and what it has.
    """
    for folder in folders.values():
        wanted = ((p, text, number) for p, text in enumerate(prompts) for number in range(seeds))
        there = ((row["prompt_id"], row["prompt"], row["number"]) for row in read_manifest(folder))
        if any(own != other for own, other in zip_longest(there, wanted)):
            num = sum(1 for _ in read_manifest(folder))
            raise UserError(
                f"{folder} holds {num} pictures, and not those of {len(prompts)} prompts x {seeds} seeds in order:"
                " delete it, or choose another evaluate.out"
            )
    return list(read_manifest(next(iter(folders.values()))))
