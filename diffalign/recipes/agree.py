"""How often scorers agree with the recorded preferences of people, by a named rule: agree.json."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from diffalign import _statistics
from diffalign._json import read_json, write_json
from diffalign.agreement import Agreement, Points, agreement, best_tie_gap, points
from diffalign.config import Config
from diffalign.data import Report, good_records
from diffalign.data._images import decode
from diffalign.progress import Progress
from diffalign.recipes._judging import BATCH
from diffalign.recipes.score._fill import Asker, open_cache
from diffalign.registry import build
from diffalign.score_cache import image_id
from diffalign.scorers._build import build_scorers, scorer_key
from diffalign.sections import Agree
from diffalign.types import Record, UserError

FILE = "agree.json"


def agree(config: Config, quiet: bool = False) -> Path:
    """Scores the images of `agree.data` and writes agree.json into `agree.out`; returns its path.

    Scores come from, and go to, the score cache (`score.cache`, `score.cache_dir`): no scorer is asked twice.

    A record's `utility` is the people's ranking: the higher the better, equal ones are a tie. Intervals resample
    records. A record with an image that a scorer cannot judge does not count for that scorer, and is counted as
    `unjudged`.

    Raises:
        UserError: no records, records that cannot be used, or what a scorer needs is not there.
    """
    settings: Agree = config.agree
    scorers = build_scorers(settings.scorers)
    for name in settings.scale:
        if scorer_key(name) not in scorers:
            raise UserError(f"agree.scale: {name} is none of agree.scorers ({', '.join(scorers)})")
    scale = {scorer_key(name): value for name, value in settings.scale.items()}
    path = Path(settings.out or "runs/agree") / FILE
    found: dict[str, list[Points]] = {name: [] for name in scorers}
    unjudged = dict.fromkeys(scorers, 0)
    report = Report()
    how = replace(config.score, strict=False)
    with open_cache(how, path) as cache:
        askers = [Asker(*named, cache, how) for named in scorers.items()]
        gaps = _tie_gaps(settings, askers, scale, quiet)
        for utility, scores in _ranked(settings.data, "agree.data", askers, report, quiet):
            for name, values in scores.items():
                if values is None:
                    unjudged[name] += 1
                    continue
                found[name].append(points(values, -utility, settings.rule, gaps.get(name), scale.get(name, 1.0)))
        for line in filter(None, (asker.drift() for asker in askers)):
            print(f"agree: {line}", file=sys.stderr)
    if not how.cache:
        cache.delete()
    results = {name: _result(agreement(of_prompts, settings.rule)) for name, of_prompts in found.items()}
    for name in results:
        results[name] |= {"info": asdict(scorers[name].info), "unjudged": unjudged[name]}
        results[name] |= {"tie_gap": gaps[name], "scale": scale.get(name, 1.0)} if name in gaps else {}
    facts = {"rule": settings.rule, "data": settings.data, "report": report.as_dict(), "scorers": results}
    write_json(path, facts)
    if not any(result["pairs"] for result in results.values()):
        raise UserError(f"agree.data has no pair that the rule {settings.rule} counts")
    return path


def _tie_gaps(settings: Agree, askers: Sequence[Asker], scale: Mapping[str, float], quiet: bool) -> dict[str, float]:
    """Pick-a-Pic's tie gap of each scorer: given, or fitted on the validation records."""
    if settings.rule != "pickapic":
        return {}
    if settings.tie_gap is not None:
        return dict.fromkeys((asker.name for asker in askers), settings.tie_gap)
    ranked: dict[str, list[tuple[Any, Any]]] = {asker.name: [] for asker in askers}  # numbers only, no images
    for utility, scores in _ranked(settings.validation, "agree.validation", askers, Report(), quiet):
        for name, values in scores.items():
            if values is not None:
                ranked[name].append((values, -utility))
    return {name: best_tie_gap(pairs, scale.get(name, 1.0)) for name, pairs in ranked.items()}


def _ranked(
    data: Mapping[str, Any], key: str, askers: Sequence[Asker], report: Report, quiet: bool
) -> Iterator[tuple[Float[NDArray[np.float64], " K"], dict[str, list[float] | None]]]:
    """(utility, scorer -> scores, None where it cannot judge an image) of each record with at least two images.

    A batch of images is in memory.
    """
    if not data.get("path"):
        raise UserError(f"{key}.path is missing: preference records, as for source.data.path")
    reader = build("data", {"name": "auto", "ties": "keep", **data})
    batch: list[Record] = []
    with Progress(key, len(reader), unit="record", quiet=quiet) as progress:
        for _, record in good_records(reader, report):
            if len(record.images) < 2:
                continue
            batch.append(record)
            if sum(len(kept.images) for kept in batch) >= BATCH:
                yield from _scored(batch, askers)
                progress.advance(len(batch))
                batch = []
        if batch:
            yield from _scored(batch, askers)
            progress.advance(len(batch))


def _scored(
    batch: list[Record], askers: Sequence[Asker]
) -> Iterator[tuple[Float[NDArray[np.float64], " K"], dict[str, list[float] | None]]]:
    addresses: list[list[tuple[bytes, str]]] = []
    for record in batch:
        addresses.append([])
        for k, data in enumerate(record.images):
            image, text = decode(data), record.caption(k)
            name = image_id(image.size, image.tobytes())
            addresses[-1].append((name, text))
            for asker in askers:
                if asker.lacks(name, text):
                    asker.add(name, image, text, f"record {record.id}")
    for asker in askers:
        asker.flush()
    for record, of_record in zip(batch, addresses, strict=True):
        scores: dict[str, list[float] | None] = {}
        for asker in askers:
            found = [asker.answer(*where) for where in of_record]
            values = [value for value in found if isinstance(value, float)]
            scores[asker.name] = values if len(values) == len(found) else None
        yield np.array(record.utility), scores


def _result(found: Agreement) -> dict[str, Any]:
    """Value with an interval over prompts."""
    if not found.per_prompt:
        return {"agreement": None, "pairs": 0, "prompts": 0}
    earned, num = np.array(found.per_prompt).T
    if found.is_pooled:
        # a value per pair whose mean is the prompt's: the pooled mean, and its spread between prompts, are the same
        values, groups = np.repeat(earned / num, num.astype(int)), np.repeat(np.arange(len(num)), num.astype(int))
    else:
        values, groups = earned / num, np.arange(len(num))
    estimate = _statistics.mean_difference(values, np.zeros(len(values)), groups.tolist())
    return {
        "agreement": found.value,
        "low": estimate.low,
        "high": estimate.high,
        "se": estimate.se,
        "pairs": found.num_pairs,
        "prompts": len(found.per_prompt),
    }


def summary(path: Path) -> list[str]:
    """What agree.json says, as lines for the terminal."""
    facts = read_json(path)
    lines = [
        f"{name}: {100 * of['agreement']:.1f} % [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"
        f" of {of['pairs']} pairs, {of['prompts']} prompts, rule {facts['rule']}"
        for name, of in facts["scorers"].items()
        if of["agreement"] is not None
    ]
    lines += [
        f"{name}: {of['unjudged']} records not judged, left out"
        for name, of in facts["scorers"].items()
        if of["unjudged"]
    ]
    return [*lines, str(path)]
