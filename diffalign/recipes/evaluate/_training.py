"""Which scorers training saw, read from the run folders beside exported weights: they cannot be held-out judges."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffalign.registry import spelled
from diffalign.score_cache import scorer_fingerprint
from diffalign.scorers._build import build_scorers
from diffalign.types import Scorer, UserError

MAX_DEPTH = 8  # runs that began where another ended
NEUTRAL = ("device", "dtype", "batch_size")  # keys that make no other judge of a scorer
LABEL = re.compile(r"^\S.*? by (?P<names>.+?)(?: \((?P<prefer>[\w-]+)\))?(?:, (?:soft|sampled))?$")


@dataclass(frozen=True)
class Judge:
    """A scorer that training saw."""

    name: str  # as `scorer_key` has it
    why: str
    spec: Mapping[str, Any] | None = None  # its fields, where a config told them
    fingerprint: str | None = None  # where the labels told it

    def is_same(self, spec: Mapping[str, Any], scorer: Scorer) -> bool:
        """Whether an evaluation's scorer, built from `spec`, is this one.

        A fingerprint tells one renamed. One of the same name is, unless the one of training can be built here and turns
        out to be another (other weights, another pixel reward).
        """
        if self.fingerprint is not None and self.fingerprint == scorer_fingerprint(scorer):
            return True
        if self.name not in (plain(spec["name"]), plain(spec.get("as", "")), plain(scorer.info.name)):
            return False
        if self.spec is None:
            return True
        fields = {key: value for key, value in self.spec.items() if key not in NEUTRAL}
        try:
            (own,) = build_scorers([fields | {key: spec[key] for key in NEUTRAL if key in spec}]).values()
            return own.info == scorer.info
        except UserError:  # its files are gone
            return True


@dataclass
class Seen:
    """What is known of one model's training."""

    judges: list[Judge] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)  # what could not be found out, as lines


def plain(name: Any) -> str:
    """A scorer's name however it is written."""
    return spelled("scorer", str(name))


def specs_of(spec: str | Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A scorer's spec and those of the scorers that it is made of."""
    fields = {"name": spec} if isinstance(spec, str) else spec
    yield fields
    for part in fields.get("scorers") or ():
        yield from specs_of(part)


def seen_by(weights: str | Path) -> Seen:
    """The scorers that the training of exported weights saw, from the run folder where `train` and `stages` put it."""
    seen, runs = Seen(), run_folders(Path(weights))
    if not runs:
        seen.gaps.append(f"no run folder beside {weights} says what it was trained on")
    for run in runs:
        _read_run(run, seen, MAX_DEPTH)
    return seen


def run_folders(weights: Path) -> list[Path]:
    """The run folders that exported weights belong to; several for those of stages."""
    folder = weights.parent if weights.is_file() else weights
    for place in (folder, folder.parent):
        if (place / "config.yaml").is_file() and (place / "run.json").is_file():
            return [place]
        if stages := sorted(path.parent for path in place.glob("stage-*/config.yaml")):
            return stages
    return []


def _read_run(run: Path, seen: Seen, depth: int) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    source, stop = config.get("source") or {}, config.get("stop") or {}
    for top in source.get("scorers") or ():
        for spec in specs_of(top):
            seen.judges.append(Judge(plain(spec.get("name")), f"source.scorers of {run}", spec))
    for name in _score_weights(config.get("objective") or {}):
        seen.judges.append(Judge(plain(name), f"objective.score_weights of {run}"))
    if stop.get("train_scorer"):
        seen.judges.append(Judge(plain(stop["train_scorer"]), f"stop.train_scorer of {run}"))
    metric = str(stop.get("metric") or "")
    if metric.startswith("samples/") and (stop.get("restore_best") or stop.get("patience")):
        seen.judges.append(
            Judge(plain(metric.removeprefix("samples/")), f"stop.metric of {run} chose the weights by it")
        )
    if path := (source.get("data") or {}).get("path"):
        _read_labels(Path(str(path)), run, seen)
    model = config.get("model") or {}
    for start in (model.get("path"), (model.get("lora") or {}).get("init")):
        before = run_folders(Path(str(start))) if start and Path(str(start)).is_dir() else []
        for folder in before:
            if depth and folder != run:
                _read_run(folder, seen, depth - 1)


def _score_weights(objective: Any) -> Iterator[str]:
    """Scorer columns that the loss counts, of an objective and of its terms."""
    if isinstance(objective, Mapping):
        yield from objective.get("score_weights") or ()
        for value in objective.values():
            yield from _score_weights(value)
    elif isinstance(objective, list):
        for value in objective:
            yield from _score_weights(value)


def _read_labels(path: Path, run: Path, seen: Seen) -> None:
    """Who labelled the records: what `label` wrote into each. People's records name nobody, which is a gap."""
    if not path.exists():
        seen.gaps.append(f"{path}, the data of {run}, is not here: its labels may come from any scorer")
        return
    found: dict[str, Judge] = {}
    for meta in _metas(path):
        match = LABEL.match(str(meta.get("label") or ""))
        told = meta.get("scorers")
        versions: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
        for name in match["names"].split(", ") if match else ():
            found.setdefault(name, Judge(plain(name), f"labelled {path}", fingerprint=versions.get(name)))
    seen.judges += found.values()
    if not found:
        seen.gaps.append(f"the records of {path} name no scorer as their judge: people's labels, or made elsewhere")


def _metas(path: Path) -> Iterator[Mapping[str, Any]]:
    """`meta` of the first rows of every file of records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [path] if path.is_file() else sorted(path.rglob("*.parquet")) + sorted(path.rglob("*.jsonl"))
    for file in files:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8", errors="replace") as lines:
                texts = [line for _, line in zip(range(64), lines, strict=False)]
            values = [row.get("meta") for row in map(_parsed, texts)]
        else:
            try:
                opened = pq.ParquetFile(file)
            except pa.ArrowException:  # no file of records, then: the reader of training tells
                continue
            if "meta" not in opened.schema_arrow.names or not opened.num_row_groups:
                continue
            values = opened.read_row_group(0, columns=["meta"])["meta"].to_pylist()
        for value in values:
            yield _parsed(value) if isinstance(value, str) else value or {}


def _parsed(text: str) -> Mapping[str, Any]:
    """A JSON object; nothing where it is none, which is for the reader of training to tell."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, Mapping) else {}


def _names(spec: Mapping[str, Any]) -> set[str]:
    return {plain(spec[key]) for key in ("as", "name") if spec.get(key)}


def kinds(
    specs: Sequence[str | Mapping[str, Any]],
    scorers: Mapping[str, Scorer],
    seen: Mapping[str, Seen],
    named: Sequence[str],
    ground_truth: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """scorer -> its `kind` (held-out, train, or ground truth) and, where training saw it, `trained`: how.

    Args:
        seen: model -> what its training saw.
        named: scorers that the user calls training judges; these are, whatever else they are called.
        ground_truth: exact judges, which stay judges when training saw them.
    """
    result: dict[str, dict[str, Any]] = {}
    for spec, (key, scorer) in zip(specs, scorers.items(), strict=True):
        whole, *parts = specs_of(spec)
        built = [(whole, scorer), *((part, next(iter(build_scorers([part]).values()))) for part in parts)]
        why = [
            f"{model}: {judge.why}"
            for model, of in seen.items()
            for judge in of.judges
            if any(judge.is_same(part, of_part) for part, of_part in built)
        ]
        kind = "train" if why else "held-out"
        if why and _names(whole) & set(map(plain, ground_truth)):
            kind = "ground truth"
        if set().union(*map(_names, (whole, *parts))) & set(map(plain, named)):
            kind, why = "train", [*why, "named in evaluate.train_scorers"]
        result[key] = {"kind": kind, **({"trained": list(dict.fromkeys(why))} if why else {})}
    return result
