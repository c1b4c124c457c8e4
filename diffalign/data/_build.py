"""Building the cache of a data set: latents chunks, text shards, and the index over both.

    <cache_dir>/latents-<key>/chunk-*.safetensors   posterior mean and std, key = VAE + reader + preprocessing
    <cache_dir>/text-<key>/text-*.safetensors       caption embeddings, key = text encoders; shared by all data sets
    <cache_dir>/set-<key>/index.npy, candidates.npy, report.json, meta.json (written last)

Keys are hashes of everything the content depends on, and every file repeats its key, so what is stale is not found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diffalign._atomic import sweep, write_atomic
from diffalign.data import _images
from diffalign.data._cache import Cache
from diffalign.data._encode import Encoder, Plan
from diffalign.data._index import FORMAT, POLL, chunk_captions, chunk_infos, write_index
from diffalign.data._latents import CHUNK, build_latents, chunk_path, num_chunks
from diffalign.data._report import Report
from diffalign.data._shard import DamagedFile
from diffalign.data._size import bytes_in, check_disk, estimate_cache_bytes
from diffalign.data._text import EMPTY, build_text, wait_for_text
from diffalign.types import UserError

logger = logging.getLogger("diffalign.data")


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def text_folder(cache_dir: Path, encoder: Encoder, dtype: str) -> Path:
    """Where captions' embeddings lie, for all data sets and prompt lists with the same text encoders."""
    return cache_dir / f"text-{_hash('text', encoder.fingerprint('text'), FORMAT, dtype)}"


class _Folders:
    """The three keys and folders of one combination of data, encoder and settings."""

    def __init__(self, cache_dir: Path, reader: Any, encoder: Encoder, plan: Plan) -> None:
        settings = (FORMAT, _images.VERSION, CHUNK, plan.buckets, plan.flip, plan.dtype)
        self.latents_key = _hash("latents", encoder.fingerprint("vae"), reader.fingerprint(), *settings)
        self.text = text_folder(cache_dir, encoder, plan.dtype)
        self.key = _hash("set", self.latents_key, self.text.name.removeprefix("text-"))
        self.latents = cache_dir / f"latents-{self.latents_key}"
        self.set = cache_dir / f"set-{self.key}"


def _complete(folders: _Folders, num: int, plan: Plan, report: Report) -> None:
    """Index, report and, last, meta.json: what makes a cache complete."""
    latents, text = folders.latents, folders.text
    store = wait_for_text(text, chunk_captions(chunk_infos(latents, folders.latents_key, num)))
    num_records, num_candidates, scorers, report = write_index(
        folders.set, latents, folders.latents_key, num, text, store, report
    )
    report.save(folders.set / "report.json")
    if not num_records:
        raise UserError(f"no rows left to cache: {report.summary()}; listed in {folders.set / 'report.json'}")
    if report.num_bad:
        logger.warning("%s; listed in %s", report.summary(), folders.set / "report.json")
    meta = {
        "format": FORMAT,
        "key": folders.key,
        "latents": latents.name,
        "text": text.name,
        "buckets": plan.buckets,
        "flip": plan.flip,
        "dtype": plan.dtype,
        "report": {"num_rows": report.num_rows, "bad": dict(report.bad), "dropped": dict(report.dropped)},
        "num_records": num_records,
        "num_candidates": num_candidates,
        "scores": scorers,
        "chunks": [(path.name, path.stat().st_size) for path in (chunk_path(latents, n) for n in range(num))],
        "text_shards": [(name, (text / name).stat().st_size) for name in (*store.shards, EMPTY)],
    }
    write_atomic(folders.set / "meta.json", json.dumps(meta).encode())


def build_cache(
    reader: Any,
    encoder: Encoder,
    cache_dir: Path | str,
    *,
    resolution: int | Sequence[int],
    buckets: Literal["square", "aspect"] = "square",
    flip: bool = False,
    dtype: str = "float16",
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Cache:
    """Encodes a data set once; what is there already is used, what is missing or damaged is built.

    Every rank calls it and builds its share; all return when the whole is complete. A build that was killed goes on at
    the next chunk and ends in the same bytes.

    Args:
        reader: `len(reader)`, `reader[i] -> Record` (raising BadRow), `reader.fingerprint()`.
        encoder: see `Encoder`; a model of this project is one.
        resolution: pixels of the square, or (height, width).
        flip: encode mirrored images too (really encoded, not mirrored latents).
        dtype: of the files: float16 or float32.
        batch_size: images or captions per call of an encoder.

    Raises:
        UserError: not enough disk, settings that do not fit, latents that are not finite, no readable row, or a bad
            row where the reader refuses them.
    """
    assert 0 <= rank < world_size and batch_size > 0, (rank, world_size, batch_size)
    plan = Plan.of(encoder, resolution, buckets, flip, dtype)
    folders = _Folders(Path(cache_dir), reader, encoder, plan)
    try:
        return Cache._open(folders.set, folders.key)
    except DamagedFile as error:
        logger.info("building the cache: %s", error)
    for folder in (folders.latents, folders.text, folders.set):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    size = estimate_cache_bytes(reader, encoder, resolution=resolution, flip=flip, dtype=dtype)
    if rank == 0:
        check_disk(Path(cache_dir), size, bytes_in(folders.latents) + bytes_in(folders.text))
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "rank": rank,
        "world_size": world_size,
        "hint": f"the cache needs {size}",
    }
    build_latents(folders.latents, folders.latents_key, reader, encoder, plan, is_shown=progress, **shared)
    num = num_chunks(len(reader))
    captions = chunk_captions(chunk_infos(folders.latents, folders.latents_key, num))
    build_text(folders.text, captions, encoder, dtype=dtype, **shared)
    if rank == 0:
        _complete(folders, num, plan, getattr(reader, "report", None) or Report(len(reader)))
        return Cache.open(folders.set, folders.key)
    while True:
        try:
            return Cache._open(folders.set, folders.key)
        except DamagedFile:
            time.sleep(POLL)
