"""The index of a data set's cache: where each record's latents and texts lie; written when both are complete."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffalign._atomic import atomic_path
from diffalign.data._latents import chunk_path
from diffalign.data._reader import caption_key
from diffalign.data._report import Report
from diffalign.data._shard import DamagedFile, OpenShards, Shard
from diffalign.data._text import CRCS, TextStore

logger = logging.getLogger("diffalign.data")

FORMAT = 3  # of all files of the cache; part of every key
POLL = 0.2  # seconds between looks at what other ranks wrote
PATIENCE = 60.0  # seconds between lines about waiting for them

INDEX = np.dtype(
    [
        ("id", "<i8"),
        ("prompt", "<i8"),  # hash of the prompt, for hold-outs
        ("row", "<i8"),  # of the reader
        ("first", "<i8"),  # of its rows in candidates.npy
        ("chunk", "<i4"),
        ("bucket", "<i2"),
        ("num", "<i2"),  # candidates
    ]
)
CANDIDATES = np.dtype(
    [
        ("utility", "<f8"),
        ("latents", "<i4"),  # row in the chunk's tensors; the mirrored image's is the next
        ("latents_crc", "<u4", (2,)),  # by flip; the second says nothing where nothing is mirrored
        ("text_shard", "<i4"),
        ("text_row", "<i4"),
        ("text_crc", "<u4"),
        ("original", "<i4", (2,)),
        ("crop", "<i4", (3,)),  # top, left, left of the mirrored image
    ]
)
SCORES = np.dtype("<f8")


def chunk_infos(folder: Path, key: str, num: int) -> Iterator[dict[str, Any]]:
    """What is written in each chunk, in order; waits for those that other ranks have still to write."""
    told = time.monotonic()
    for number in range(num):
        while True:
            try:
                info = Shard(chunk_path(folder, number)).info
                if info["key"] == key:
                    break
            except (DamagedFile, KeyError, ValueError):
                pass  # not there yet
            if time.monotonic() - told > PATIENCE:
                logger.info("waiting for other ranks: chunk %d of %d", number, num)
                told = time.monotonic()
            time.sleep(POLL)
        yield info


def chunk_captions(infos: Iterable[dict[str, Any]]) -> Iterator[str]:
    for info in infos:
        yield from info["captions"]


def common_scores(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The scorers of which every record has scores: half a column is of no use to a loss."""
    common: set[str] | None = None
    for of_record in names:
        common = set(of_record) if common is None else common & set(of_record)
    return tuple(sorted(common or ()))


def _header(file: BinaryIO, kind: np.dtype, *shape: int) -> None:
    """The head of a .npy file whose rows follow piece by piece (a memory map would hide a full disk)."""
    descr = np.lib.format.dtype_to_descr(kind)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


def _rows_of(
    info: dict[str, Any], number: int, first: int, text: Path, store: TextStore, shards: OpenShards
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one chunk for index.npy and candidates.npy; `first` is its first row in the second."""
    places = store.locate(np.array([caption_key(caption) for caption in info["captions"]], np.int64))
    crcs = [int(shards[text / store.shards[shard]].rows(CRCS, row, 1)[0]) for shard, row in places]
    records: list[tuple[Any, ...]] = []
    candidates: list[tuple[Any, ...]] = []
    for record in info["records"]:
        place = (record["id"], record["prompt"], record["row"], first + len(candidates), number)
        records.append((*place, record["bucket"], len(record["utility"])))
        latents_crcs = info["crc"][str(record["bucket"])]
        for k, caption in enumerate(record["captions"]):
            at = record["latents"][k]
            latents = (at, tuple((latents_crcs[at : at + 2] * 2)[:2]))
            embedding = (*places[caption], crcs[caption])
            sizes = (tuple(record["original"][k]), tuple(record["crop"][k]))
            candidates.append((record["utility"][k], *latents, *embedding, *sizes))
    return np.array(records, INDEX), np.array(candidates, CANDIDATES)


def write_index(
    folder: Path, latents: Path, key: str, num_chunks: int, text: Path, store: TextStore, report: Report
) -> tuple[int, int, tuple[str, ...], Report]:
    """Writes index.npy, candidates.npy and scores.npy.

    Returns the numbers of records and candidates, the scorers (columns of scores.npy) and the completed report.

    Raises:
        UserError: the disk is full.
    """
    infos = chunk_infos(latents, key, num_chunks)
    counts = [(len(info["records"]), sum(len(r["utility"]) for r in info["records"])) for info in infos]
    num_records, num_candidates = sum(count[0] for count in counts), sum(count[1] for count in counts)
    scorers = common_scores(r["scores"] for info in chunk_infos(latents, key, num_chunks) for r in info["records"])
    shards = OpenShards()
    first = 0
    with ExitStack() as stack:
        paths = [stack.enter_context(atomic_path(folder / f"{name}.npy")) for name in ("index", "candidates", "scores")]
        index, candidates, scores = (stack.enter_context(open(path, "wb")) for path in paths)
        _header(index, INDEX, num_records)
        _header(candidates, CANDIDATES, num_candidates)
        _header(scores, SCORES, num_candidates, len(scorers))
        for number, info in enumerate(chunk_infos(latents, key, num_chunks)):
            report = report.merged(info["bad"])
            records_rows, candidates_rows = _rows_of(info, number, first, text, store, shards)
            index.write(records_rows.tobytes())
            candidates.write(candidates_rows.tobytes())
            for record in info["records"]:
                scores.write(np.array([record["scores"][name] for name in scorers], SCORES).T.tobytes())
            first += len(candidates_rows)
    return num_records, num_candidates, scorers, report
