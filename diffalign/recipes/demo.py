"""The whole loop on an embedded model: generate, score, label, train, evaluate, report; resumable at any point."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.recipes.evaluate import Evaluation, evaluate
from diffalign.recipes.generate import generate
from diffalign.recipes.label import label
from diffalign.recipes.score import score
from diffalign.recipes.train import train


def demo(config: Config, out: Path, quiet: bool = False) -> Evaluation:
    """Runs every verb in turn below `out`; the seconds of each stage go into the report.

    Raises:
        UserError: from any of the verbs.
    """
    times_path = out / "seconds.json"
    seconds: dict[str, float] = read_json(times_path)

    def timed(stage: str, begun: float) -> None:
        # a stage that a resumed demo finds done takes no time: keep what it took
        seconds[stage] = max(seconds.get(stage, 0.0), time.perf_counter() - begun)
        write_json(times_path, seconds)

    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    images = generate(replace(config, generate=replace(config.generate, out=str(out / "images"))), quiet)
    timed("generate", begun)
    begun = time.perf_counter()
    scores = score(replace(config, score=replace(config.score, images=str(images))), quiet)
    timed("score", begun)
    begun = time.perf_counter()
    pairs = label(replace(config, label=replace(config.label, scores=str(scores), out=str(out / "pairs"))), quiet)
    timed("label", begun)
    begun = time.perf_counter()
    source = replace(config.source, data={"name": "auto", "path": str(pairs)}, cache_dir=str(out / "cache"))
    run = train(replace(config, source=source, train=replace(config.train, out=str(out / "train"))), quiet=quiet).folder
    timed("train", begun)
    settings = replace(
        config.evaluate, adapters=(str(run / "export"),), names=("aligned",), run=str(run), out=str(out / "evaluation")
    )
    return evaluate(replace(config, evaluate=settings), quiet, seconds)
