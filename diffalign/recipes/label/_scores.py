"""The scored images that `label` reads: one prompt's at a time, as often as asked."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from diffalign._json import read_json
from diffalign.recipes.generate import MANIFEST, read_manifest
from diffalign.scorers._build import scorer_key
from diffalign.sections import Label
from diffalign.types import UserError


@dataclass(frozen=True)
class Group:
    """One prompt's images that every labelling scorer judged."""

    number: int  # of the prompt, in the file's order
    rows: Sequence[Mapping[str, Any]]  # of the manifest, with `scores`, and `caption` where captions are given
    values: Float[NDArray[np.float64], "K J"]  # of the labelling scorers; [K K] of a judge that compares, P(row wins)
    num_unjudged: int  # images left out for want of a score


@dataclass(frozen=True)
class Scored:
    """A score file, and which of its scorers label."""

    path: Path
    root: Path  # of the image files
    names: tuple[str, ...]
    captions: Path | None
    scorers: Mapping[str, Any]  # what scores.json says of each scorer of the file
    embeddings: Path | None = None  # of `judge`, a line per picture
    judge: Any = None  # who compares two pictures, instead of scores

    def groups(self) -> Iterator[Group]:
        """All prompts in the file's order; one is in memory.

        Raises:
            UserError: a line of scores or captions that cannot be used.
        """
        captions = None if self.captions is None else _Beside(self.captions, "caption")
        embeddings = None if self.embeddings is None else _Beside(self.embeddings, "embedding")
        rows = read_manifest(self.path)
        for number, (_, found) in enumerate(itertools.groupby(rows, key=lambda row: row["prompt_id"])):
            group = list(found)
            if captions is not None:
                group = [row | {"caption": captions.of(row["file"])} for row in group]
            if embeddings is None:
                judged = [row for row in group if all(has_score(row, name) for name in self.names)]
                values = np.array([[row["scores"][name] for name in self.names] for row in judged], float)
                values = values.reshape(-1, len(self.names))
            else:
                seen = [(row, v) for row in group if (v := embeddings.of(row["file"])) is not None]
                judged = [row for row, _ in seen]
                values = self.judge.win_table(torch.tensor([v for _, v in seen])) if seen else np.zeros((0, 0))
            yield Group(number, judged, values.astype(float), len(group) - len(judged))
        for beside in (captions, embeddings):
            if beside is not None:
                beside.check_all_used(self.path)

    def digest(self) -> str:
        """Hash of all that is read but the pictures: what a resumed run must find again."""
        hashed = hashlib.blake2b(digest_size=16)
        for path in (self.path, self.captions, self.embeddings):
            if path is not None:
                with path.open("rb") as file:
                    while block := file.read(2**20):
                        hashed.update(block)
        return hashed.hexdigest()


class _Beside:
    """A file of what is known of pictures, read side by side with the scores, so that neither is held in memory."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key, self._rows = path, key, read_manifest(path)
        self._next = next(self._rows, None)

    def of(self, file: str) -> Any:
        """What its line says; None where it has no line or an empty answer."""
        if self._next is None or self._next.get("file") != file:
            return None
        value, self._next = self._next.get(self.key), next(self._rows, None)
        return value or None

    def check_all_used(self, scores: Path) -> None:
        if self._next is not None:
            raise UserError(
                f"{self.path}: {self._next.get('file')!r} is not the next image of {scores}: {self.key}s are lines of"
                f" {{file, {self.key}}} in the order of the scores"
            )


def has_score(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row holds a finite score of that scorer."""
    value = (row.get("scores") or {}).get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def open_scores(settings: Label) -> Scored:
    """What `label` was asked to read.

    Raises:
        UserError: no scores, an unknown scorer, or several where one is wanted.
    """
    if settings.scores is None:
        raise UserError("label.scores is missing: the scores.jsonl that `diffalign score` wrote")
    path = Path(settings.scores)
    if path.is_dir():
        is_scored = settings.judge is None or (path / "scores.jsonl").is_file()
        path = path / ("scores.jsonl" if is_scored else MANIFEST)
    there = next((list(row["scores"]) for row in read_manifest(path) if row.get("scores")), [])
    if not there and settings.judge is None:
        raise UserError(f"{path} holds no scores: run `diffalign score` to the end")
    facts = read_json(path.with_suffix(".json"))
    root = Path(facts.get("images", path.parent))
    names = _names(settings, there, path) if settings.judge is None else (scorer_key(settings.judge),)
    if settings.weights and len(settings.weights) != len(names):
        raise UserError(f"label.weights has {len(settings.weights)} numbers for {len(names)} scorers")
    captions = Path(settings.captions) if isinstance(settings.captions, str) else None
    if captions is not None and not captions.is_file():
        raise UserError(f"label.captions: {captions} is no file")
    return Scored(path, root if root.is_dir() else root.parent, names, captions, _facts_of(facts, there))


def _names(settings: Label, there: list[str], path: Path) -> tuple[str, ...]:
    """The labelling scorers."""
    if settings.by_users:
        if settings.scorer is not None or settings.scorers:
            raise UserError("label.by_users labels with every scorer: leave label.scorer empty")
        return tuple(there)
    wanted = [scorer_key(name) for name in (settings.scorers or [settings.scorer or ""]) if name]
    if not wanted and (len(there) == 1 or settings.prefer != "sum"):
        return tuple(there)
    listed = f"(there are: {', '.join(there)})"
    if not wanted:
        raise UserError(
            f"{path} holds several scorers: set label.scorer, or label.scorers for a sum of several {listed}"
        )
    for name in wanted:
        if name not in there:
            raise UserError(f"{path} has no scores of {name} {listed}")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"label.scorers names a scorer twice ({', '.join(wanted)})")
    return tuple(wanted)


def _facts_of(facts: Mapping[str, Any], there: list[str]) -> dict[str, Any]:
    """What scores.json says of each scorer; files of before it named the columns list them in their order."""
    said = facts.get("scorers", [])
    if len(said) == len(there) and not all("key" in fact for fact in said):
        return dict(zip(there, said, strict=True))
    return {fact["key"]: fact for fact in said if "key" in fact}


def version_of(fact: Mapping[str, Any]) -> str:
    """A scorer as a record names it: its fingerprint where scores.json has one, else name and version."""
    return str(fact.get("fingerprint") or " ".join(str(fact[key]) for key in ("name", "version") if key in fact))
