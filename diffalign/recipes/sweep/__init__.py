"""Several settings of one run: each trained, all judged on the same prompts and noise, and drawn as a front or curve.

Every run is an ordinary run folder below `sweep.out`; the same command goes on where it stopped, and a longer list of
settings reuses the finished ones.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import metrics
from diffalign._atomic import write_atomic
from diffalign._json import read_json
from diffalign.config import TRAINING_SECTIONS, Config
from diffalign.data import read_prompts
from diffalign.distributed import World
from diffalign.recipes import _run
from diffalign.recipes.evaluate import BASE
from diffalign.recipes.generate import read_manifest
from diffalign.recipes.sweep._jury import Jury
from diffalign.recipes.sweep._points import Setting, folder_name, settings_of
from diffalign.recipes.sweep._results import Judged, results
from diffalign.recipes.train import run_folder, train
from diffalign.scorers._build import build_scorers, scorer_key
from diffalign.sweep_report import write_sweep_report
from diffalign.types import Scorer, UserError


@dataclass(frozen=True)
class SweepResult:
    """Where the sweep is and what came out; `results` is sweep.json, `failed` says which runs have no part in it."""

    folder: Path
    report: Path
    results: Mapping[str, Any]
    failed: Sequence[Mapping[str, Any]]


def sweep(config: Config, quiet: bool = False) -> SweepResult:
    """Trains and judges what section `sweep` lists, and writes sweep.json, report.html and front.svg.

    A run that fails is reported and the others go on, except in several processes, where all must agree to go on.

    Raises:
        UserError: a key, value, scorer or folder that cannot be used; nothing was trained.
    """
    _refuse_unused(config)
    axes = axes_of(config)
    folder = Path(config.sweep.out or f"runs/{config.title}-sweep")
    scorers = build_scorers(config.evaluate.scorers)
    jury = Jury(read_prompts(config.evaluate.prompts, "evaluate.prompts"), scorers, folder, quiet)
    settings = settings_of(config, folder)
    world = World(config.evaluate.device, "auto")
    _run.open_together(folder, config, (*TRAINING_SECTIONS, "evaluate"), world)
    jury.check_prompts(BASE)
    base = jury.scores(config, None, BASE)
    finished: dict[str, list[Judged]] = {}
    failed: list[dict[str, Any]] = []
    for setting in settings:
        for seed, run in setting.runs.items():
            name = folder_name(setting.name, seed)
            try:
                judged = _judged(run, seed, name, jury)
            except Exception as error:  # whatever it is, a night of other runs does not depend on it
                if world.size > 1:
                    raise
                _report_failure(setting, seed, error, folder / "failures" / f"{name}.txt")
                failed.append({"name": setting.name, "seed": seed, "error": _one_line(error)})
            else:
                finished.setdefault(setting.name, []).append(judged)
    texts = [row["prompt"] for row in read_manifest(folder / "images" / BASE)]
    found = results(settings, finished, base, BASE, texts, axes, config.evaluate.seed)
    found = found | {"title": f"{config.title}: sweep of {', '.join(found['keys'])}", "failed": failed}
    found |= {"scorers": _judges(config, scorers), "facts": _facts(config, str(world.device))}
    return SweepResult(folder, write_sweep_report(folder, found), found, failed)


def _judges(config: Config, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """What the scores mean, and which of them the labels came from."""
    trained_on = {scorer_key(name) for name in config.evaluate.train_scorers}
    return {
        name: {"kind": "train" if name in trained_on else "held-out", **dataclasses.asdict(scorer.info)}
        for name, scorer in scorers.items()
    }


def _facts(config: Config, device: str) -> dict[str, Any]:
    """What a reader needs to repeat the sweep, beside the settings."""
    env, train_config, sampling = _run.environment(device), config.train, config.sampling
    return {
        "model": config.names["model"],
        "path": config.model.path,
        "method": {"objective": config.names["objective"], "reference": config.names["reference"]},
        "steps": train_config.steps,
        "pairs per step": train_config.batch_size,
        "learning rate": train_config.lr,
        "training seeds": list(config.sweep.seeds or (train_config.seed,)),
        "sampling": f"{sampling.sampler}, {sampling.num_steps} steps, CFG {sampling.cfg_scale}",
        "prompts": config.evaluate.prompts,
        "sampling seed": config.evaluate.seed,
        "environment": env,
    }


def axes_of(config: Config) -> tuple[str, str] | None:
    """The two scorers of the front, as files call them; None where only one judges.

    Raises:
        UserError: sweep.axes names what is not among evaluate.scorers.
    """
    scorers = [scorer_key(name) for name in config.evaluate.scorers]
    axes = [scorer_key(name) for name in config.sweep.axes] or scorers[:2]
    for name in axes:
        if name not in scorers:
            raise UserError(f"sweep.axes: {name!r} is not in evaluate.scorers ({', '.join(scorers)})")
    return (axes[0], axes[1]) if len(axes) == 2 else None


def _refuse_unused(config: Config) -> None:
    """Refuses keys that a sweep would ignore.

    Raises:
        UserError: names the key.
    """
    for key in ("adapters", "models", "names", "out", "run"):
        if getattr(config.evaluate, key):
            raise UserError(f"evaluate.{key} has no meaning in a sweep, which judges its own runs below sweep.out")
    if config.train.out:
        raise UserError("train.out has no meaning in a sweep: every run has its folder below sweep.out")


def _judged(run: Config, seed: int, name: str, jury: Jury) -> Judged:
    """One run trained, unless it is finished, and judged.

    Raises:
        RuntimeError: it ended without useful weights.
    """
    folder = run_folder(run)
    check = read_json(folder / "export_check.json")
    if check:
        _run.open_folder(folder, run, TRAINING_SECTIONS)  # refuses a folder of another config
    else:
        check = train(run, quiet=jury.quiet).check
    if check.get("problems"):
        raise RuntimeError(f"{folder} trained nothing useful: {'; '.join(check['problems'])}")
    scores = jury.scores(run, str(folder / "export"), name)
    exported = check.get("exported_step", math.inf)  # these weights are judged, not later ones
    rows = [row for row in metrics.read_metrics(folder) if row.get("holdout/num_prompts") and row["step"] < exported]
    accuracy = rows[-1].get("holdout/implicit_accuracy") if rows else None
    measured = {} if accuracy is None else {"held-out accuracy": float(accuracy)}
    return Judged(seed, str(folder), scores, measured)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _report_failure(setting: Setting, seed: int, error: BaseException, path: Path) -> None:
    """A line on stderr, and the traceback in a file."""
    write_atomic(path, "".join(traceback.format_exception(error)))
    print(f"diffalign sweep: {setting.name}, seed {seed} failed: {_one_line(error)} ({path})", file=sys.stderr)
