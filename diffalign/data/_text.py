"""The text sub-cache: the embedding of every caption once, shared by all data sets and runs with the same encoder.

A folder of shards. A shard is named by the captions in it, so data sets that grow keep what they have, and runs at the
same time at worst encode a caption twice, to the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffalign.data._encode import Encoder, encode_empty, encode_texts
from diffalign.data._reader import caption_key
from diffalign.data._shard import DamagedFile, Shard, crc_of, write_shard
from diffalign.randomness import address

BLOCK = 256  # captions per shard
EMPTY = "empty.safetensors"
KEYS, CRCS = "#key", "#crc"  # int64 rows beside the embeddings


def embedding_names(shard: Shard) -> list[str]:
    """The embeddings' names in a text shard, sorted."""
    return [name for name in shard.names if not name.startswith("#")]


def _write(path: Path, keys: list[int], embeddings: dict[str, Tensor], hint: str) -> None:
    names = sorted(embeddings)
    crcs = [crc_of(*(embeddings[name][row] for name in names)) for row in range(len(keys))]
    columns = {KEYS: torch.tensor(keys, dtype=torch.int64), CRCS: torch.tensor(crcs, dtype=torch.int64)}
    write_shard(path, {**embeddings, **columns}, {}, hint)


class TextStore:
    """Where each caption's embedding lies: 16 bytes of memory per caption."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.refresh()

    def refresh(self) -> None:
        """Looks at the folder again; damaged shards are as good as missing."""
        self.shards: list[str] = []
        keys, places = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
        for path in sorted(self.folder.glob("text-*.safetensors")):
            try:
                shard = Shard(path)
            except DamagedFile:
                continue
            found = np.array(shard.rows(KEYS, 0, shard.num_rows(KEYS)))
            keys.append(found)
            places.append(np.stack([np.full(len(found), len(self.shards)), np.arange(len(found))], 1))
            self.shards.append(path.name)
        every = np.concatenate(keys)
        order = np.argsort(every, kind="stable")
        self._keys, self._places = every[order], np.concatenate(places)[order]

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """[n, 2]: shard and row of each caption key; -1 where it is missing."""
        if not len(self._keys):
            return np.full((len(keys), 2), -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where((self._keys[at] == keys)[:, None], self._places[at], -1)


def unique_blocks(captions: Iterable[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Keys and texts of the distinct captions in blocks, in order of first occurrence: the same on every rank."""
    seen: set[int] = set()
    keys: list[int] = []
    texts: list[str] = []
    for caption in captions:
        key = caption_key(caption)
        if key not in seen:
            seen.add(key)
            keys.append(key)
            texts.append(caption)
            if len(keys) == BLOCK:
                yield keys, texts
                keys, texts = [], []
    if keys:
        yield keys, texts


def build_text(
    folder: Path,
    captions: Iterable[str],
    encoder: Encoder,
    *,
    dtype: str,
    batch_size: int,
    rank: int,
    world_size: int,
    hint: str,
) -> None:
    """Encodes the captions of this rank's blocks that the store lacks, and (rank 0) the empty prompt.

    Raises:
        UserError: the disk is full, or embeddings that are not finite in `dtype`.
    """
    store = TextStore(folder)
    if rank == 0:
        try:
            Shard(folder / EMPTY)
        except DamagedFile:
            _write(folder / EMPTY, [caption_key("")], encode_empty(encoder, dtype), hint)
    for number, (keys, texts) in enumerate(unique_blocks(captions)):
        if number % world_size != rank:
            continue
        missing = np.flatnonzero(store.locate(np.array(keys))[:, 0] < 0).tolist()
        if not missing:
            continue
        parts = [
            encode_texts(encoder, [texts[i] for i in missing[at : at + batch_size]], dtype)
            for at in range(0, len(missing), batch_size)
        ]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        chosen = [keys[i] for i in missing]
        _write(folder / f"text-{address(*chosen):016x}.safetensors", chosen, joined, hint)


def wait_for_text(folder: Path, captions: Iterable[str], poll: float = 0.2) -> TextStore:
    """The store once it holds all captions: the other ranks may still be at work."""
    store = TextStore(folder)
    for keys, _ in unique_blocks(captions):
        while (store.locate(np.array(keys))[:, 0] < 0).any() or not (folder / EMPTY).exists():
            time.sleep(poll)
            store.refresh()
    return store
