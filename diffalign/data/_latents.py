"""The latents sub-cache: chunks of records, each encoded once and written whole.

A chunk covers a fixed range of the reader's rows, so which rank builds it, and whether a killed build did, changes
nothing about its bytes. An image that several records of a chunk share (all pairs of a prompt's images) is encoded and
stored once, its mirrored version in the row after it; records say which row each of their candidates is.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
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


def _encoded(encoder: Encoder, pixels: Sequence[Tensor], plan: Plan, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and std of images of one size, every image's mirrored version after it where the plan has those."""
    views = [view for image in pixels for view in ([image, image.flip(-1)] if plan.flip else [image])]
    parts = [
        encode_pixels(encoder, torch.stack(views[at : at + batch_size]), plan.dtype)
        for at in range(0, len(views), batch_size)
    ]
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


class _Chunk:
    """Collects the records of one chunk, encoding a bucket's images as soon as a batch is full."""

    def __init__(self, encoder: Encoder, plan: Plan, batch_size: int) -> None:
        self._encoder, self._plan, self._batch_size = encoder, plan, batch_size
        self._places: dict[tuple[int, bytes], int] = {}  # bucket and digest of an image: its row in the bucket
        self._num: Counter[int] = Counter()  # rows of a bucket
        self._pending: dict[int, list[Tensor]] = {}
        self._encoded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._captions: dict[str, int] = {}
        self.records: list[dict[str, Any]] = []
        self.bad: list[dict[str, Any]] = []

    def add(self, row: int, outcome: Outcome) -> None:
        if isinstance(outcome, BadRow):
            self.bad.append(outcome.entry())
            return
        record, bucket = outcome.record, outcome.bucket
        self.records.append(
            {
                "row": row,
                "id": record.id,
                "prompt": prompt_key(record.prompt),
                "captions": [
                    self._captions.setdefault(record.caption(k), len(self._captions)) for k in range(len(record.images))
                ],
                "utility": list(record.utility),
                "scores": {name: list(values) for name, values in record.scores.items()},
                "bucket": bucket,
                "latents": [self._place(bucket, *image) for image in zip(record.images, outcome.pixels, strict=True)],
                "original": outcome.original.tolist(),
                "crop": outcome.crop.tolist(),
            }
        )
        if self._plan.num_flips * len(self._pending.get(bucket, ())) >= self._batch_size:
            self._encode(bucket)

    def _place(self, bucket: int, data: bytes, pixels: Tensor) -> int:
        """The image's row, a new one if this chunk has not met it in this bucket."""
        image = (bucket, hashlib.blake2b(data, digest_size=16).digest())
        if image not in self._places:
            self._places[image] = self._num[bucket]
            self._num[bucket] += self._plan.num_flips
            self._pending.setdefault(bucket, []).append(pixels)
        return self._places[image]

    def _encode(self, bucket: int) -> None:
        encoded = _encoded(self._encoder, self._pending.pop(bucket), self._plan, self._batch_size)
        self._encoded.setdefault(bucket, []).append(encoded)

    def finish(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and info of the file."""
        for bucket in sorted(self._pending):
            self._encode(bucket)
        tensors, crcs = {}, {}
        for bucket, parts in self._encoded.items():
            mean, std = (torch.cat(rows) for rows in zip(*parts, strict=True))
            tensors[f"mean.{bucket}"], tensors[f"std.{bucket}"] = mean, std
            crcs[str(bucket)] = [crc_of(*row) for row in zip(mean, std, strict=True)]
        return tensors, {"records": self.records, "crc": crcs, "captions": list(self._captions), "bad": self.bad}


def is_valid(path: Path, key: str) -> bool:
    """Whether a chunk is there, belongs to `key`, and all its bytes are as they were written."""
    try:
        shard = Shard(path)
        info = shard.info
        return info["key"] == key and all(
            shard.crc((f"mean.{bucket}", f"std.{bucket}"), row, 1) == crc
            for bucket, crcs in info["crc"].items()
            for row, crc in enumerate(crcs)
        )
    except (DamagedFile, KeyError, ValueError, AssertionError):
        return False


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
    todo = [number for number in mine if not is_valid(chunk_path(folder, number), key)]
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
