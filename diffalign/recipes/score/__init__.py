"""Scores pictures with any number of scorers, each picture once; a killed run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign._atomic import atomic_path
from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.distributed import World
from diffalign.progress import Progress
from diffalign.recipes.score._fill import Asker, Filler, open_cache, share
from diffalign.recipes.score._rows import Pictures, open_pictures
from diffalign.score_cache import scorer_fingerprint
from diffalign.scorers._build import build_scorers
from diffalign.types import Scorer, UserError


def score(config: Config, quiet: bool = False) -> Path:
    """Writes scores.jsonl: the row of every picture that all scorers judged, with `scores` {scorer: number}.

    Beside it, scores.skipped.jsonl holds the rows of all other pictures with `reasons`, and scores.json what the scores
    mean, how many there are, and why others are not.

    Raises:
        UserError: no pictures, prompts or scorers; nothing could be scored; scores of other scorers are there already.
        RuntimeError: a scorer failed, or a picture changed meanwhile.
    """
    settings = config.score
    scorers = build_scorers(settings.scorers, "score.scorers")
    pictures = open_pictures(settings, any("prompt" in scorer.info.inputs for scorer in scorers.values()))
    path = Path(settings.out or pictures.root / "scores.jsonl")
    facts = _facts(pictures.root, scorers)
    _refuse_other(path, facts)
    world = World()
    mine, num = share(pictures.rows(), pictures.num, settings.batch_size, world)
    is_quiet = quiet or not world.is_main
    with (
        warnings.catch_warnings(),
        open_cache(settings, path) as cache,
        Progress("score", num, 0, "img", is_quiet) as progress,
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by their size, in one line
        askers = [Asker(name, scorer, cache, settings) for name, scorer in scorers.items()]
        filler = Filler(pictures.root, askers, cache, settings)
        filler.fill(mine, progress)
        world.barrier()
        if world.is_main:
            drifts = [f"score: {line}" for asker in askers if (line := asker.drift())]
            for line in [*drifts, *_write(path, pictures, filler, facts)]:
                progress.say(line)
        world.barrier()
    if not settings.cache and world.is_main:
        cache.delete()
    world.close()
    return path


def _facts(root: Path, scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    of_scorers = [
        {"key": name, "fingerprint": scorer_fingerprint(scorer), **dataclasses.asdict(scorer.info)}
        for name, scorer in scorers.items()
    ]
    return {"images": str(root), "scorers": of_scorers}


def _refuse_other(path: Path, facts: Mapping[str, Any]) -> None:
    old = read_json(path.with_suffix(".json"))
    if not old:
        return
    there, now = old.get("scorers", ()), json.loads(json.dumps(facts["scorers"]))
    # key by key: files of before a key existed go on
    is_same = len(there) == len(now) and all(
        was.get(key, value) == value for was, new in zip(there, now, strict=True) for key, value in new.items()
    )
    if not is_same or old.get("images") != facts["images"]:
        raise UserError(f"{path} holds scores of other scorers or images: choose another score.out")


def _write(path: Path, pictures: Pictures, filler: Filler, facts: Mapping[str, Any]) -> list[str]:
    """The files, from the cache, in the order of the rows; returns what a reader must know, as lines."""
    ranges = {asker.name: asker.scorer.info.expected_range for asker in filler.askers}
    outside, because = Counter({name: 0 for name in ranges}), Counter[str]()
    first, num = "", 0
    skipped = path.with_suffix(".skipped.jsonl")
    with (
        atomic_path(path) as kept_path,
        atomic_path(skipped) as skipped_path,
        kept_path.open("w", encoding="utf-8") as kept,
        skipped_path.open("w", encoding="utf-8") as left_out,
    ):
        for row in pictures.rows():
            scores, reasons = filler.outcome(row)
            if reasons:
                left_out.write(json.dumps(row | {"scores": scores, "reasons": reasons}) + "\n")
                because.update(_reason(*item) for item in reasons.items())
                first = first or _said(pictures.root / row["file"], reasons)
                continue
            kept.write(json.dumps(row | {"scores": scores}) + "\n")
            num += 1
            outside.update(name for name, value in scores.items() if not ranges[name][0] <= value <= ranges[name][1])
        if not num:
            raise UserError(f"no picture could be scored; {first} (score.retry=true asks again)")
    left = pictures.num - num
    if not left:
        skipped.unlink()
    counts = {
        "pictures": pictures.num,
        "scored": num,
        "skipped": left,
        "skipped_because": dict(sorted(because.items())),
    }
    write_json(path.with_suffix(".json"), {**facts, **counts, "outside_expected_range": dict(outside)})
    why = ", ".join(f"{count} {reason}" for reason, count in because.most_common())
    lines = [f"score: {left} of {pictures.num} pictures skipped ({why}); see {skipped}"] if left else []
    return lines + [
        f"score: {count} of {num} scores of {name} lie outside its expected range {ranges[name][0]:g} to"
        f" {ranges[name][1]:g}: look at weights, prompts and pictures (nothing was clipped)"
        for name, count in outside.items()
        if count
    ]


def _said(file: Path, reasons: Mapping[str, str]) -> str:
    if "picture" in reasons:
        return f"{file} is no readable image ({reasons['picture']})"
    return f"{file}: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _reason(who: str, text: str) -> str:
    """What is counted together: kinds of broken pictures, and refusals of a scorer."""
    return text.partition(":")[0] if who == "picture" else f"not judged by {who}"
