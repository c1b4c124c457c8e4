"""Pairs for the training of a scorer: which at which step, their labels and weights, their pixels or latents.

Nothing but prompts' hashes is held in memory; pictures are read when their batch is made.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffalign import randomness
from diffalign._json import to_json
from diffalign.data import BadRow, build_cache, split_holdout
from diffalign.data._images import decode
from diffalign.progress import Progress
from diffalign.recipes._judging import batched, judge, keep_whole_lines
from diffalign.recipes.train_scorer._loss import label_of, prompt_weights, pseudo_label
from diffalign.registry import build
from diffalign.scorers._build import build_scorers
from diffalign.scorers._clip import Preprocess
from diffalign.sections import TrainScorer
from diffalign.types import Record, UserError

READERS = 4  # threads that decode pictures
PSEUDO_FILE = "pseudo_labels.jsonl"


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one step. Either `pixels` or `latents` is there."""

    ids: Int64[Tensor, " B"]
    visits: Int64[Tensor, " B"]
    prompts: list[str]
    label: Float[Tensor, " B"]  # probability that the first is preferred
    weight: Float[Tensor, " B"]  # sums to 1
    pixels: Float[Tensor, "B 2 3 S S"] | None  # normalised for the tower
    latents: dict[str, Any] | None  # what the cache gives: mean and std [B 2 C h w], text

    def __len__(self) -> int:
        return len(self.ids)


def open_reader(settings: TrainScorer) -> Any:
    """The reader of `train_scorer.data`; ties are kept, unlike elsewhere, because the loss knows them.

    Raises:
        UserError: no path, or nothing usable there.
    """
    if not settings.data.get("path"):
        raise UserError("train_scorer.data.path is missing: preference records, as for source.data.path")
    return build("data", {"name": "auto", "ties": "keep", **settings.data})


class Pairs:
    """The pairs of a reader; `batch(step)` is a pure function of the step.

    Args:
        settings: the section.
        reader: see `open_reader`.
        preprocess: makes the tower's pixels of pictures.
        model: makes the latents of previews; None trains on the pictures themselves.
        folder: the run's, where pseudo-labels are kept.

    Raises:
        UserError: no pair to train on, or a scorer that cannot judge the pictures.
    """

    def __init__(
        self, settings: TrainScorer, reader: Any, preprocess: Preprocess, model: Any, folder: Path, quiet: bool
    ) -> None:
        self.settings, self.reader, self.preprocess = settings, reader, preprocess
        self.train_rows, self.holdout_rows = split_holdout(reader, settings.holdout, settings.seed)
        self.cache: Any = None
        if model is not None:
            self.cache = build_cache(reader, model, settings.cache_dir, resolution=model.resolution, progress=not quiet)
            self.place = np.full(len(reader), -1)  # in the cache, of each row of the reader
            self.place[self.cache.rows] = np.arange(len(self.cache.rows))
            self.train_rows, self.holdout_rows = (
                rows[self.place[rows] >= 0] for rows in (self.train_rows, self.holdout_rows)
            )
        if not len(self.train_rows):
            raise UserError(f"{settings.data['path']}: no pair to train on; lower train_scorer.holdout")
        _, inverse, counts = np.unique(reader.prompt_keys[self.train_rows], return_inverse=True, return_counts=True)
        self.count = np.ones(len(reader))
        if settings.prompt_weights:
            self.count[self.train_rows] = counts[inverse]
        self.pseudo = _pseudo_labels(settings, reader, folder / PSEUDO_FILE, quiet)
        self._threads = ThreadPoolExecutor(READERS)
        self._lock = threading.Lock()  # readers and caches are not thread-safe; validation reads beside the loader

    def batch(self, step: int) -> PairBatch:
        """The pairs of 0-based `step`: an endless stream, permuted anew in every epoch."""
        places = [
            divmod(step * self.settings.batch_size + i, len(self.train_rows)) for i in range(self.settings.batch_size)
        ]
        order = (self.settings.seed, "scorer order")
        rows = [
            int(self.train_rows[randomness.permute(index, len(self.train_rows), *order, visit)])
            for visit, index in places
        ]
        return self._collate(rows, [visit for visit, _ in places])

    def holdout(self) -> Iterator[PairBatch]:
        """Up to `validate_pairs` held-out pairs in batches, in the data's order."""
        for rows in batched(self.holdout_rows[: self.settings.validate_pairs].tolist(), self.settings.batch_size):
            yield self._collate(rows, [0] * len(rows))

    def _record(self, row: int) -> Record | None:
        """A pair, None where the reader cannot read it."""
        try:
            record: Record = self.reader[row]
            if len(record.images) != 2:
                file, line = self.reader.where(row)
                raise UserError(
                    f"{file}, row {line}: {len(record.images)} images; train-scorer compares pairs: make them with"
                    " `diffalign label label.rule=all-pairs`"
                )
            return record
        except BadRow as error:
            self._refuse(error)
            return None

    def _refuse(self, error: BadRow) -> None:
        if self.reader.bad_rows == "refuse":
            raise UserError(str(error)) from error

    def _pixels(self, record: Record | None) -> Tensor | None:
        """Both pictures for the tower, None where one does not decode."""
        try:
            return None if record is None else self.preprocess.pictures([decode(image) for image in record.images])
        except BadRow as error:
            self._refuse(error)
            return None

    def _collate(self, rows: Sequence[int], visits: Sequence[int]) -> PairBatch:
        with self._lock:
            read = {row: self._record(row) for row in sorted(set(rows))}  # in the order of the files
        found = [read[row] for row in rows]
        pixels = [None] * len(rows) if self.cache is not None else list(self._threads.map(self._pixels, found))
        good = [
            index
            for index, (record, seen) in enumerate(zip(found, pixels, strict=True))
            if record is not None and (self.cache is not None or seen is not None)
        ]
        if not good:
            raise UserError(f"{self.settings.data['path']}: no picture of {len(rows)} pairs in turn can be read")
        # a pair that cannot be read is left out of its batch: the others' weights grow
        records = [record for index in good if (record := found[index]) is not None]
        rows, visits = [rows[index] for index in good], [visits[index] for index in good]
        latents = None
        if self.cache is not None:
            with self._lock:
                latents = self.cache.batch(self.place[rows])
        label = [
            label_of(record.utility) if self.pseudo is None else float(self.pseudo[row])
            for row, record in zip(rows, records, strict=True)
        ]
        return PairBatch(
            ids=torch.tensor([record.id for record in records]),
            visits=torch.tensor(visits),
            prompts=[record.prompt for record in records],
            label=torch.tensor(label),
            weight=prompt_weights(torch.from_numpy(self.count[rows]).float()),
            pixels=None if self.cache is not None else torch.stack([p for p in pixels if p is not None]),
            latents=latents,
        )

    def facts(self) -> dict[str, Any]:
        """What run.json says about the data."""
        return {
            "fingerprint": self.reader.fingerprint(),
            "num_pairs": len(self.train_rows),
            "num_holdout": len(self.holdout_rows),
            "labels": self.settings.labels,
        }

    def close(self) -> None:
        """Ends the reading threads."""
        self._threads.shutdown()


def _pseudo_labels(settings: TrainScorer, reader: Any, path: Path, quiet: bool) -> np.ndarray | None:
    """A label per row of the reader from `label_scorer`, NaN where a row cannot be read; None with the data's labels.

    The scores are kept in the run folder, a line per row, and computed once; a killed run goes on where it stopped.
    """
    if settings.label_scorer is None:
        return None
    scorers = build_scorers([settings.label_scorer])
    done = keep_whole_lines(path)
    with Progress("pseudo-labels", len(reader), done, "pair", quiet) as progress, path.open("a") as out:
        for rows in batched(range(done, len(reader)), settings.batch_size):
            records = {row: record for row in rows if (record := _readable(reader, row)) is not None}
            images = [decode(image) for record in records.values() for image in record.images]
            prompts = [record.prompt for record in records.values() for _ in record.images]
            names = [f"an image of {'row '.join(map(str, reader.where(row)))}" for row in records for _ in range(2)]
            (values,) = judge(images, prompts, scorers, names).values()
            of_row = dict(zip(records, batched(values, 2), strict=True))
            out.write("".join(to_json({"row": row, "scores": of_row.get(row)}) + "\n" for row in rows))
            out.flush()
            progress.advance(len(rows))
    labels = np.full(len(reader), np.nan)
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            if row["scores"] is not None:
                labels[row["row"]] = pseudo_label(row["scores"], settings.label_scale, settings.tie_gap)
    return labels


def _readable(reader: Any, row: int) -> Record | None:
    """A pair whose pictures decode, None of others."""
    try:
        record = reader[row]
        for image in record.images:
            decode(image)
        return record if len(record.images) == 2 else None
    except BadRow:
        return None
