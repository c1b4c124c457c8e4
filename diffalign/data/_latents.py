"""The latents sub-cache: chunks of records, each encoded once and written whole.

A chunk covers a fixed range of the reader's rows, so which rank builds it, and whether a killed build did, changes
nothing about its bytes. The rows of a record lie together: K candidates, then the K mirrored ones.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data._encode import Encoder, Plan, Prepared, encode_pixels, prepare
from diffalign.data._progress import track
from diffalign.data._reader import prompt_key
from diffalign.data._report import BadRow
from diffalign.data._shard import DamagedFile, Shard, crc_of, write_shard

CHUNK = 64  # reader rows per chunk

Outcome = Prepared | BadRow


def chunk_path(folder: Path, number: int) -> Path:
    """The file of a chunk."""
    return folder / f"chunk-{number:06d}.safetensors"


def num_chunks(num_rows: int) -> int:
    """Chunks of a reader with so many rows."""
    return -(-num_rows // CHUNK)


def _settle(reader: Any, row: int, outcome: Prepared | BadRow | Future[Prepared]) -> Outcome:
    """The future's result; a bad row gets its place. Raises it where the reader refuses bad rows."""
    try:
        if isinstance(outcome, BadRow):
            raise outcome
        return outcome.result() if isinstance(outcome, Future) else outcome
    except BadRow as error:
        placed = error if error.file or not hasattr(reader, "where") else error.at(*reader.where(row))
        if getattr(reader, "bad_rows", "skip") == "refuse":
            raise placed from error
        return placed


def prepared_rows(reader: Any, rows: Iterable[int], plan: Plan, ahead: int) -> Iterator[tuple[int, Outcome]]:
    """(row, its images or what is bad about it), in order, decoded by threads at most `ahead` rows in advance.

    The reader itself is only used by the calling thread.
    """
    queue: deque[tuple[int, Prepared | BadRow | Future[Prepared]]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as executor:
        try:
            for row in rows:
                try:
                    queue.append((row, executor.submit(prepare, reader[row], plan)))
                except BadRow as error:
                    queue.append((row, error))
                if len(queue) > ahead:
                    first, outcome = queue.popleft()
                    yield first, _settle(reader, first, outcome)
            while queue:
                first, outcome = queue.popleft()
                yield first, _settle(reader, first, outcome)
        finally:
            for _, outcome in queue:
                if isinstance(outcome, Future):
                    outcome.cancel()


def encode_record_rows(
    encoder: Encoder, items: Sequence[Prepared], plan: Plan, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """(mean, std) [F K C h w] of each record of one bucket; F is 2 with the mirrored images."""
    views = []
    for item in items:
        views += [item.pixels, item.pixels.flip(-1)] if plan.flip else [item.pixels]
    pixels = torch.cat(views)
    parts = [
        encode_pixels(encoder, pixels[at : at + batch_size], plan.dtype) for at in range(0, len(pixels), batch_size)
    ]
    lengths = [plan.num_flips * len(item.pixels) for item in items]
    means = torch.cat([mean for mean, _ in parts]).split(lengths)
    stds = torch.cat([std for _, std in parts]).split(lengths)
    return [
        (mean.unflatten(0, (plan.num_flips, -1)), std.unflatten(0, (plan.num_flips, -1)))
        for mean, std in zip(means, stds, strict=True)
    ]


class _Chunk:
    """Collects the records of one chunk, bucket by bucket, encoding as soon as a batch is full."""

    def __init__(self, encoder: Encoder, plan: Plan, batch_size: int) -> None:
        self._encoder, self._plan, self._batch_size = encoder, plan, batch_size
        self._pending: dict[int, list[tuple[int, Prepared]]] = {}
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._starts: dict[int, int] = {}
        self._captions: dict[str, int] = {}
        self.records: list[dict[str, Any]] = []
        self.bad: list[dict[str, Any]] = []

    def add(self, row: int, outcome: Outcome) -> None:
        if isinstance(outcome, BadRow):
            self.bad.append(outcome.entry())
            return
        pending = self._pending.setdefault(outcome.bucket, [])
        pending.append((row, outcome))
        record = outcome.record
        for k in range(len(record.images)):
            self._captions.setdefault(record.caption(k), len(self._captions))
        if sum(self._plan.num_flips * len(item.pixels) for _, item in pending) >= self._batch_size:
            self._encode(outcome.bucket)

    def _encode(self, bucket: int) -> None:
        pending = self._pending.pop(bucket)
        encoded = encode_record_rows(self._encoder, [item for _, item in pending], self._plan, self._batch_size)
        for (row, item), (mean, std) in zip(pending, encoded, strict=True):
            start, num = self._starts.get(bucket, 0), len(item.pixels)
            self._starts[bucket] = start + self._plan.num_flips * num
            self._rows.setdefault(bucket, []).append((mean.flatten(0, 1), std.flatten(0, 1)))
            record = item.record
            self.records.append(
                {
                    "row": row,
                    "id": record.id,
                    "prompt": prompt_key(record.prompt),
                    "captions": [self._captions[record.caption(k)] for k in range(num)],
                    "utility": list(record.utility),
                    "scores": {name: list(values) for name, values in record.scores.items()},
                    "bucket": bucket,
                    "start": start,
                    "original": item.original.tolist(),
                    "crop": item.crop.tolist(),
                    "crc": [crc_of(mean[flip], std[flip]) for flip in range(self._plan.num_flips)],
                }
            )

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and info of the file."""
        for bucket in sorted(self._pending):
            self._encode(bucket)
        tensors = {}
        for bucket, rows in self._rows.items():
            tensors[f"mean.{bucket}"] = torch.cat([mean for mean, _ in rows])
            tensors[f"std.{bucket}"] = torch.cat([std for _, std in rows])
        records = sorted(self.records, key=lambda record: record["row"])
        return tensors, {"records": records, "captions": list(self._captions), "bad": self.bad}


def is_valid(path: Path, key: str, num_flips: int) -> bool:
    """Whether a chunk is there, belongs to `key`, and all its bytes are as they were written."""
    try:
        shard = Shard(path)
        info = shard.info
        if info["key"] != key:
            return False
        for record in info["records"]:
            bucket, num = record["bucket"], len(record["utility"])
            for flip in range(num_flips):
                found = shard.crc((f"mean.{bucket}", f"std.{bucket}"), record["start"] + flip * num, num)
                if found != record["crc"][flip]:
                    return False
    except (DamagedFile, KeyError, ValueError, AssertionError):
        return False
    return True


def build_latents(
    folder: Path,
    key: str,
    reader: Any,
    encoder: Encoder,
    plan: Plan,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    is_shown: bool,
    hint: str,
) -> None:
    """Builds this rank's chunks (every `world_size`-th) that are missing or damaged.

    Raises:
        UserError: the disk is full, latents that are not finite, or a bad row where the reader refuses them.
    """
    mine = range(rank, num_chunks(len(reader)), world_size)
    todo = [number for number in mine if not is_valid(chunk_path(folder, number), key, plan.num_flips)]
    spans = {number: range(number * CHUNK, min((number + 1) * CHUNK, len(reader))) for number in todo}
    rows = (row for number in todo for row in spans[number])
    total = sum(len(span) for span in spans.values())
    source = track(prepared_rows(reader, rows, plan, 2 * batch_size), total, "encoding images", is_shown)
    for number in todo:
        chunk = _Chunk(encoder, plan, batch_size)
        for _ in spans[number]:
            row, outcome = next(source)
            chunk.add(row, outcome)
        tensors, info = chunk.finish()
        write_shard(chunk_path(folder, number), tensors, {**info, "key": key}, hint)
