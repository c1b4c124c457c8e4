"""From what an evaluation found to what its report shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from numpy.typing import NDArray

from diffalign import metrics, report
from diffalign._json import read_json
from diffalign._statistics import holdout_accuracy
from diffalign.config import Config
from diffalign.evaluation import Comparison
from diffalign.recipes import _run
from diffalign.recipes._judging import open_image
from diffalign.recipes._stopping import ALARM_FILE
from diffalign.recipes.evaluate._spread import Spread
from diffalign.registry import find
from diffalign.types import Scorer

REPORT_PROMPTS = 24  # rows of the picture grid
REPORT_SEEDS = 2
GRID_PROMPTS = 8  # rows of grid.png


@dataclass(frozen=True)
class Evaluated:
    """All that was found; `rows` are the base's, `scores` model -> scorer -> [n] in their order."""

    config: Config
    comparison: Comparison
    spread: Spread | None  # of the main process alone
    scorers: Mapping[str, Scorer]
    judges: Mapping[str, Mapping[str, Any]]  # scorer -> kind, trained
    gaps: Sequence[str]
    scores: Mapping[str, Mapping[str, NDArray[Any]]]
    rows: Sequence[Mapping[str, Any]]
    folders: Mapping[str, Path]
    sizes: Mapping[str, tuple[int, int]]  # model -> height, width
    prompts: Mapping[str, Any]


def report_data(found: Evaluated, seconds: Mapping[str, float], device: str) -> report.ReportData:
    """The report of one evaluation, with what `evaluate.run` says of the training."""
    config, comparison = found.config, found.comparison
    main = next((name for name, of in found.judges.items() if of["kind"] != "train"), next(iter(found.scorers)))
    parts: dict[str, Any] = {}
    facts = _facts(found, device)
    warnings = [f"What training saw is not fully known. {gap}." for gap in found.gaps]
    if config.evaluate.run:
        run = Path(config.evaluate.run)
        check = read_json(run / "export_check.json")
        exported = check.get("exported_step", math.inf)  # these weights are judged, not later ones
        rows = list(metrics.read_metrics(run))
        margins = [row for row in rows if row.get("holdout/num_prompts") and row["step"] < exported]
        facts = _run_facts(run) | facts
        warnings += _alarm(run)
        parts = {
            "metrics": rows,
            "data": read_json(run / "run.json")["data"].get("report"),
            "export": check,
            "holdout": _holdout(margins[-1]) if margins else None,
        }
    return report.ReportData(
        title=f"{config.title}: {' against '.join([*comparison.models[1:], comparison.models[0]])}",
        comparison=comparison.to_dict(),
        scorer=main,
        scorers={
            name: {**found.judges[name], **dataclasses.asdict(scorer.info)} for name, scorer in found.scorers.items()
        },
        facts=facts,
        seconds=seconds,
        pictures=_pictures(found, main),
        spread=None if found.spread is None else dataclasses.asdict(found.spread),
        warnings=warnings,
        **parts,
    )


def _facts(found: Evaluated, device: str) -> dict[str, Any]:
    """What a reader needs to repeat the numbers."""
    settings, sampling, env = found.config.evaluate, found.config.sampling, _run.environment(device)
    sizes = {name: f"{height} x {width}" for name, (height, width) in found.sizes.items()}
    is_one = len(set(sizes.values())) == 1
    facts: dict[str, Any] = {
        "model": found.config.names["model"],
        "path": found.config.model.path,
        "adapters": list(settings.adapters),
        "models": list(settings.models),
        "prompts": {key: value for key, value in found.prompts.items() if value is not None},
        "images": f"{settings.seeds} per prompt, {found.comparison.num_images} per model",
        "resolution": next(iter(sizes.values())) if is_one else sizes,
        "sampling": {
            "sampler": sampling.sampler,
            "steps": sampling.num_steps,
            "CFG": sampling.cfg_scale,
            "eta": sampling.eta,
        },
        "seed": settings.seed,
        "commit": env["git"].get("commit", "unknown") + (" (modified)" if env["git"].get("dirty") else ""),
        "device": env["device"],
        "diffalign": env["diffalign"],
        "versions": env["versions"],
    }
    return {key: value for key, value in facts.items() if value != []}


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


def write_grid(rows: Sequence[report.PictureRow], path: Path) -> None:
    """The report's pictures as one PNG: a prompt per row, models side by side for each seed."""
    shown = rows[:GRID_PROMPTS]
    images = [picture.image for row in shown for picture in row.pictures]
    report.image_grid(images, len(shown), len(images) // len(shown), [row.prompt for row in shown], path)


def _pictures(found: Evaluated, scorer: str) -> list[report.PictureRow]:
    """The first prompts in file order: chosen before anything was scored."""
    grid: dict[int, list[report.Picture]] = {}
    texts: dict[int, str] = {}
    for index, row in enumerate(found.rows):
        if row["prompt_id"] >= REPORT_PROMPTS:
            break
        if row["number"] >= REPORT_SEEDS:
            continue
        texts[row["prompt_id"]] = row["prompt"]
        for name in found.scores:
            image = open_image(found.folders[name] / row["file"])
            value = float(found.scores[name][scorer][index])
            grid.setdefault(row["prompt_id"], []).append(report.Picture(image, name, row["number"], value))
    return [report.PictureRow(texts[key], tuple(pictures)) for key, pictures in grid.items()]
