"""Reading the cache of a data set: an index over latents chunks and text shards, all of it memory-mapped."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.data import _gaps
from diffalign.data._batch import Item, as_floats, check_request, collate, count_buckets
from diffalign.data._index import FORMAT
from diffalign.data._latents import chunk_path
from diffalign.data._report import Report
from diffalign.data._shard import DamagedFile, OpenShards, Shard, tensor
from diffalign.data._text import EMPTY, embedding_names
from diffalign.types import UserError

GAPS = 1 << 16  # records looked at together


class Cache:
    """A built cache, read through memory maps; memory does not grow with the data.

    `len`, `ids`, `prompt_keys`, `rows` (the reader's row of each record), `buckets` and `bucket_counts` describe it;
    `batch` gives records. Records are numbered as the reader's, without the bad ones.
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], index: np.ndarray, candidates: np.ndarray, scores: np.ndarray
    ) -> None:
        self.folder, self._meta = folder, meta
        self._index, self._candidates, self._scores = index, candidates, scores
        self._latents = folder.parent / meta["latents"]
        self._text = folder.parent / meta["text"]
        self.buckets = [tuple(size) for size in meta["buckets"]]
        self.has_flips = bool(meta["flip"])
        self._shards = OpenShards()

    @classmethod
    def open(cls, folder: Path | str, key: str | None = None) -> Cache:
        """The cache whose `set-<key>` folder is given; `key` is checked where one is expected.

        Raises:
            UserError: no complete cache there, another key, or files that are missing or truncated.
        """
        try:
            return cls._open(Path(folder), key)
        except DamagedFile as error:
            raise UserError(f"{error}; build the cache again, only what is damaged is redone") from error

    @classmethod
    def _open(cls, folder: Path, key: str | None) -> Cache:
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            if meta["format"] != FORMAT or (key is not None and meta["key"] != key):
                raise DamagedFile(f"{folder}: the cache was built for something else")
            index = np.load(folder / "index.npy", mmap_mode="r", allow_pickle=False)
            candidates = np.load(folder / "candidates.npy", mmap_mode="r", allow_pickle=False)
            scores = np.load(folder / "scores.npy", mmap_mode="r", allow_pickle=False)
            sizes = [(folder.parent / meta["latents"] / name, size) for name, size in meta["chunks"]]
            sizes += [(folder.parent / meta["text"] / name, size) for name, size in meta["text_shards"]]
            if len(index) != meta["num_records"] or not len(candidates) == len(scores) == meta["num_candidates"]:
                raise DamagedFile(f"{folder}: the index is truncated")
            for path, size in sizes:
                if path.stat().st_size != size:
                    raise DamagedFile(f"{path}: {path.stat().st_size} bytes instead of {size}")
        except (OSError, ValueError, KeyError) as error:
            raise DamagedFile(f"{folder}: not a complete cache ({error})") from error
        return cls(folder, meta, index, candidates, scores)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def ids(self) -> np.ndarray:
        """[len] int64: the records' content addresses."""
        return self._index["id"]

    @property
    def prompt_keys(self) -> np.ndarray:
        """[len] int64: hashes of the prompts."""
        return self._index["prompt"]

    @property
    def rows(self) -> np.ndarray:
        """[len] int64: where each record is in the reader."""
        return self._index["row"]

    @property
    def is_desirable(self) -> np.ndarray:
        """[len] bool: whether the utility of each record's first image is above 1/2."""
        return np.asarray(self._candidates["utility"][self._index["first"]] > 0.5)

    def gaps(self, indices: np.ndarray, by: str | None) -> tuple[str, np.ndarray]:
        """The column meant by `by` (see `_gaps.column_of`), and how much better the winners of those pairs are in it.

        Raises:
            UserError: no such column, records that are no pairs, or gaps that tell nothing.
        """
        column = _gaps.column_of(by, self._meta["scores"])
        gaps = np.empty(len(indices))
        for start in range(0, len(indices), GAPS):
            entries = self._index[indices[start : start + GAPS]]
            _gaps.check_pairs(entries["num"])
            places = entries["first"][:, None] + np.arange(2)
            utility = self._candidates["utility"][places]
            values = utility if column == _gaps.UTILITY else self._scores[places, self._meta["scores"].index(column)]
            gaps[start : start + GAPS] = _gaps.signed_gap(utility, values)
        return column, _gaps.check_gaps(gaps, column)

    def bucket_of(self, indices: Any) -> np.ndarray:
        """The bucket (a position in `buckets`) of each record."""
        return np.asarray(self._index["bucket"][np.asarray(indices, np.int64)])

    @property
    def bucket_counts(self) -> dict[int, int]:
        """Bucket -> number of records."""
        return count_buckets(self._index["bucket"])

    @property
    def report(self) -> Report:
        """The counts of bad and left-out rows; `report.json` in `folder` lists the bad ones too."""
        counts = self._meta["report"]
        return Report(counts["num_rows"], Counter(counts["bad"]), Counter(counts["dropped"]))

    @property
    def empty_text(self) -> dict[str, torch.Tensor]:
        """The empty prompt's embeddings, name -> [1, ...] float32."""
        shard = self._shard(self._text / EMPTY)
        return {name: as_floats(tensor(shard.rows(name, 0, 1))) for name in embedding_names(shard)}

    def batch(self, indices: Any, flips: Any = None) -> dict[str, Any]:
        """Records `indices` [B] of one bucket, mirrored where `flips` [B] is true; see `_batch.collate` for the keys.

        Raises:
            UserError: records of several buckets, flips that are not cached, or a damaged file.
        """
        rows, mirrored, bucket = check_request(indices, flips, self._index["bucket"], self.has_flips)
        items = [self._item(int(row), int(flip)) for row, flip in zip(rows, mirrored, strict=True)]
        return collate(items, self.buckets[bucket])

    def _shard(self, path: Path) -> Shard:
        try:
            return self._shards[path]
        except DamagedFile as error:
            raise UserError(f"{error}; build the cache again, only what is damaged is redone") from error

    def _check(self, found: int, expected: int, path: Path) -> None:
        if found != expected:
            raise UserError(f"{path}: altered since it was written; delete this file and run again, it is built anew")

    def _item(self, row: int, flip: int) -> Item:
        entry = self._index[row]
        num = int(entry["num"])
        mine = slice(int(entry["first"]), int(entry["first"]) + num)
        candidates = self._candidates[mine]
        shard = self._shard(chunk_path(self._latents, int(entry["chunk"])))
        names = (f"mean.{entry['bucket']}", f"std.{entry['bucket']}")
        places = [int(place) + flip for place in candidates["latents"]]
        for place, crc in zip(places, candidates["latents_crc"][:, flip], strict=True):
            self._check(shard.crc(names, place, 1), int(crc), shard.path)
        mean, std = (tensor(np.concatenate([shard.rows(name, place, 1) for place in places])) for name in names)
        return Item(
            id=int(entry["id"]),
            mean=mean,
            std=std,
            utility=tensor(candidates["utility"]),
            original=tensor(candidates["original"]).long(),
            crop=tensor(candidates["crop"][:, [0, 2 if flip else 1]]).long(),
            text=self._texts(candidates),
            scores={name: tensor(self._scores[mine, at]) for at, name in enumerate(self._meta["scores"])},
        )

    def _texts(self, candidates: np.ndarray) -> dict[str, torch.Tensor]:
        rows: list[dict[str, torch.Tensor]] = []
        for candidate in candidates:
            place = (int(candidate["text_shard"]), int(candidate["text_row"]))
            shard = self._shard(self._text / self._meta["text_shards"][place[0]][0])
            names = embedding_names(shard)
            self._check(shard.crc(names, place[1], 1), int(candidate["text_crc"]), shard.path)
            rows.append({name: tensor(shard.rows(name, place[1], 1))[0] for name in names})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
