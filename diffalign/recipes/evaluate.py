"""Base and adapters on the same prompts and seeds: win rates with intervals, means, a picture grid, a report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign import evaluation, metrics, report
from diffalign._json import read_json
from diffalign._statistics import holdout_accuracy
from diffalign.config import Config, Generate
from diffalign.data import read_prompts
from diffalign.distributed import World
from diffalign.progress import Progress
from diffalign.recipes import _run
from diffalign.recipes._stopping import ALARM_FILE
from diffalign.recipes.generate import load_for_images, read_manifest, write_images
from diffalign.recipes.score import BATCH, batched, build_scorers, open_image, score_rows
from diffalign.registry import find
from diffalign.types import Scorer, UserError

BASE = "base"
REPORT_PROMPTS = 24  # rows of the picture grid
REPORT_SEEDS = 2
GRID_PROMPTS = 8  # rows of grid.png


@dataclass(frozen=True)
class Evaluation:
    """Where the report is and what it says; `results` is `results.json` without the curves."""

    folder: Path
    comparison: evaluation.Comparison
    report: Path


def model_names(adapters: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str | None]:
    """name -> adapter folder; the base model comes first.

    Raises:
        UserError: names that do not fit the adapters, or repeat.
    """
    if names and len(names) != len(adapters):
        raise UserError(f"evaluate.names holds {len(names)} names for {len(adapters)} adapters")
    if not names:  # runs/x/export is called x
        paths = [Path(adapter) for adapter in adapters]
        names = tuple(path.parent.name if path.name == "export" else path.name for path in paths)
    models = {BASE: None} | dict(zip(names, adapters, strict=True))
    if len(models) != len(names) + 1:
        raise UserError(f"evaluate.names must differ from each other and from {BASE!r} (got {', '.join(names)})")
    return models


def score_folder(folder: Path, scorers: dict[str, Scorer], name: str, quiet: bool) -> dict[str, NDArray[np.float64]]:
    total = sum(1 for _ in read_manifest(folder))
    scores: dict[str, list[float]] = {scorer: [] for scorer in scorers}
    with Progress(f"score {name}", total, unit="img", quiet=quiet) as progress:
        for batch in batched(read_manifest(folder), BATCH):
            for row in score_rows(batch, folder, scorers):
                for scorer, value in row.items():
                    scores[scorer].append(value)
            progress.advance(len(batch))
    return {scorer: np.array(values) for scorer, values in scores.items()}


def categories_of(prompts: list[str]) -> list[str] | None:
    """The kinds of sprites captions; None as soon as one is anything else."""
    from diffalign.sprites.scene import parse

    try:
        return [parse(prompt).kind for prompt in prompts]
    except ValueError:
        return None


def evaluate(config: Config, quiet: bool = False, seconds: Mapping[str, float] | None = None) -> Evaluation:
    """Generates what is missing, scores, compares, and writes report.html and results.json.

    Args:
        seconds: stages that ran before, for the report (`demo` gives them).

    Raises:
        UserError: unusable prompts, adapters, scorers or folder.
    """
    config.require("model")
    settings = config.evaluate
    prompts = read_prompts(settings.prompts, "evaluate.prompts")
    scorers = build_scorers(settings.scorers)
    models = model_names(settings.adapters, settings.names)
    folder = Path(settings.out or f"runs/{config.title}-evaluation")
    world = World(settings.device, "auto")
    _run.open_together(folder, config, ("model", "sampling", "evaluate"), world)
    begun = time.perf_counter()
    of_base = Generate(images_per_prompt=settings.seeds, seed=settings.seed, device=settings.device)
    of_user = replace(of_base, user=settings.user, user_data=settings.user_data, user_shots=settings.user_shots)
    for name, adapter in models.items():
        model = load_for_images(config, adapter, 1.0, world)
        how = of_base if adapter is None else of_user
        write_images(
            model, prompts, folder / "images" / name, how, config.sampling, world, quiet, f"sample {name}", "evaluate"
        )
    scores = {name: score_folder(folder / "images" / name, scorers, name, quiet) for name in models}
    rows = list(read_manifest(folder / "images" / BASE))
    texts = [row["prompt"] for row in rows]
    comparison = evaluation.compare(
        scores, texts, [row["number"] for row in rows], BASE, categories=categories_of(texts), seed=settings.seed
    )
    stages = dict(seconds or {}) | {"evaluate": time.perf_counter() - begun}
    data = _report_data(config, comparison, scores, rows, folder, stages, str(world.device))
    path = report.write_report(folder, data)
    _write_grid(data.pictures, folder / "grid.png")
    world.close()
    return Evaluation(folder, comparison, path)


def _report_data(
    config: Config,
    comparison: evaluation.Comparison,
    scores: dict[str, dict[str, NDArray[np.float64]]],
    rows: list[dict[str, Any]],
    folder: Path,
    seconds: Mapping[str, float],
    device: str,
) -> report.ReportData:
    settings = config.evaluate
    scorers = build_scorers(settings.scorers)
    judges = {name.replace("-", "_") for name in settings.train_scorers}
    main = next((name for name in scorers if name not in judges), next(iter(scorers)))
    run = Path(settings.run) if settings.run else None
    env = _run.environment(device)
    facts: dict[str, Any] = {
        "model": config.names["model"],
        "path": config.model.path,
        "sampling": f"{config.sampling.sampler}, {config.sampling.num_steps} steps, CFG {config.sampling.cfg_scale}",
        "seed": settings.seed,
        "commit": env["git"].get("commit", "unknown") + (" (modified)" if env["git"].get("dirty") else ""),
        "device": env["device"],
        "versions": env["versions"],
    }
    parts: dict[str, Any] = {}
    if run is not None:
        of_run = read_json(run / "run.json")
        check = read_json(run / "export_check.json")
        exported = check.get("exported_step", math.inf)  # these weights are judged, not later ones
        margins = [r for r in metrics.read_metrics(run) if r.get("holdout/num_prompts") and r["step"] < exported]
        facts = _run_facts(run) | facts
        parts = {
            "metrics": metrics.read_metrics(run),
            "data": of_run["data"].get("report"),
            "export": check,
            "warnings": _alarm(run),
            "holdout": _holdout(margins[-1]) if margins else None,
        }
    return report.ReportData(
        title=f"{config.title}: {' against '.join([*comparison.models[1:], BASE]) or BASE}",
        comparison=comparison.to_dict(),
        scorer=main,
        scorers={
            name: {"kind": "train" if name in judges else "held-out", **dataclasses.asdict(scorer.info)}
            for name, scorer in scorers.items()
        },
        facts=facts,
        seconds=seconds,
        pictures=_pictures(rows, scores, main, folder),
        **parts,
    )


def _holdout(row: Mapping[str, float]) -> dict[str, Any]:
    """The last held-out accuracy as the report wants it."""
    rate, num = row["holdout/implicit_accuracy"], int(row["holdout/num_prompts"])
    right = round(rate * num)
    return dataclasses.asdict(replace(holdout_accuracy([1.0] * right + [-1.0] * (num - right)), rate=rate))


def _alarm(run: Path) -> list[str]:
    """The run's over-optimisation alarm as lines of the banner."""
    alarm = read_json(run / ALARM_FILE)
    return [f"The over-optimisation alarm rang after step {alarm['step']}: {alarm['reason']}."] if alarm else []


def _changed(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Name, beta, and the slots that differ from their defaults."""
    default = {f.name: f.default for f in dataclasses.fields(find("objective", objective["name"]))}
    return {
        key: value
        for key, value in objective.items()
        if key in ("name", "beta") or (value != default.get(key) and value not in ({}, []))
    }


def _run_facts(run: Path) -> dict[str, Any]:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    data = read_json(run / "run.json")["data"]
    return {
        "method": {"objective": _changed(config["objective"]), "reference": config["reference"]["name"]},
        "steps": read_json(run / "export_check.json").get("steps", config["train"]["steps"]),
        "pairs per step": config["train"]["batch_size"],
        "learning rate": config["train"]["lr"],
        "training records": data.get("num_records"),
        "training seed": config["train"]["seed"],
    }


def _write_grid(rows: Sequence[report.PictureRow], path: Path) -> None:
    """The report's pictures as one PNG: a prompt per row, models side by side for each seed."""
    shown = rows[:GRID_PROMPTS]
    images = [picture.image for row in shown for picture in row.pictures]
    report.image_grid(images, len(shown), len(images) // len(shown), [row.prompt for row in shown], path)


def _pictures(
    rows: list[dict[str, Any]], scores: dict[str, dict[str, NDArray[np.float64]]], scorer: str, folder: Path
) -> list[report.PictureRow]:
    """The first prompts in file order: chosen before anything was scored."""
    grid: dict[int, list[report.Picture]] = {}
    texts: dict[int, str] = {}
    for index, row in enumerate(rows):
        if row["prompt_id"] >= REPORT_PROMPTS:
            break
        if row["number"] >= REPORT_SEEDS:
            continue
        texts[row["prompt_id"]] = row["prompt"]
        for name in scores:
            image = open_image(folder / "images" / name / row["file"])
            value = float(scores[name][scorer][index])
            grid.setdefault(row["prompt_id"], []).append(report.Picture(image, name, row["number"], value))
    return [report.PictureRow(texts[key], tuple(pictures)) for key, pictures in grid.items()]
