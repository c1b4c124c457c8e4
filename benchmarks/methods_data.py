"""What the methods on sprites learn from: pictures of the base, judged once, as pairs, lists and single pictures."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffalign._json import write_json
from diffalign.config import Config, resolve
from diffalign.data import RecordWriter, Report, good_records
from diffalign.recipes.generate import generate
from diffalign.recipes.label import label
from diffalign.recipes.score import score
from diffalign.registry import build

GOLD, PROXY = SCORERS = ("sprites_gold", "sprites_proxy")


def data_of(model: str, root: Path, num_prompts: int, flips: float) -> dict[str, Path]:
    """Pairs, lists and single pictures of the same samples; made once."""
    spec = f"sprites:train:{num_prompts}:two"
    config = resolve([model, "demo", f"generate.prompts={spec}", f"score.scorers={list(SCORERS)}"])
    images = generate(replace(config, generate=replace(config.generate, out=str(root / "images"))))
    made = labelled(config, images, root)
    made["singles"] = singles(made["ranking"], root / "singles")
    made["scored"] = scored(made["all-pairs"], root / "scored")
    if flips:
        for kind in ("all-pairs", "singles"):
            made[kind] = flipped(made[kind], root / f"{kind}-flipped-{flips}", flips)
    return made


def labelled(config: Config, images: Path, root: Path) -> dict[str, Path]:
    """All pairs and ranked lists by the gold judge."""
    scores = score(replace(config, score=replace(config.score, images=str(images), scorers=SCORERS)))
    made = {}
    for rule in ("all-pairs", "ranking"):
        settings = replace(config.label, scores=str(scores), scorer=GOLD, rule=rule, out=str(root / rule))
        made[rule] = label(replace(config, label=settings))
    return made


def singles(path: Path, out: Path) -> Path:
    """Each picture of the lists on its own, liked where it beats its list's mean: the pictures that the pairs hold."""
    if not (out / "done.json").is_file():
        with RecordWriter(out) as writer:
            for _, record in good_records(build("data", {"name": "records", "path": str(path)}), Report()):
                mean = statistics.mean(record.utility)
                for k, utility in enumerate(record.utility):
                    own = {name: (values[k],) for name, values in record.scores.items()}
                    liked = (1.0,) if utility > mean else (0.0,)
                    images = (record.images[k],)
                    writer.write(
                        replace(record, id=record.id ^ (k + 1), images=images, utility=liked, scores=own, meta={})
                    )
        write_json(out / "done.json", {})
    return out


def scored(path: Path, out: Path) -> Path:
    """The pairs with the judge's scores as utilities."""
    if not (out / "done.json").is_file():
        with RecordWriter(out) as writer:
            for _, record in good_records(build("data", {"name": "records", "path": str(path)}), Report()):
                writer.write(replace(record, utility=record.scores[GOLD]))
        write_json(out / "done.json", {})
    return out


def flipped(path: Path, out: Path, share: float) -> Path:
    """The pairs, or the single pictures, with a share of the labels turned round, each decided by its number."""
    if not (out / "done.json").is_file():
        with RecordWriter(out) as writer:
            for row, record in good_records(build("data", {"name": "records", "path": str(path)}), Report()):
                turn = np.random.default_rng([0, row]).random() < share
                writer.write(replace(record, utility=tuple(1 - u for u in record.utility)) if turn else record)
        write_json(out / "done.json", {"share": share})
    return out
