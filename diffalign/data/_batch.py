"""Cached or freshly encoded records to one batch: the same function for both, so both give the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffalign.types import UserError


@dataclass(frozen=True)
class Item:
    """One record, encoded, in one of its two flips."""

    id: int
    mean: Float[Tensor, "K C h w"]
    std: Float[Tensor, "K C h w"]
    utility: Float[Tensor, " K"]
    original: Int64[Tensor, "K 2"]
    crop: Int64[Tensor, "K 2"]
    text: Mapping[str, Tensor]  # name -> [K, ...]
    scores: Mapping[str, Float[Tensor, " K"]]  # of the scorers that every record of the data has


def as_floats(values: Tensor) -> Tensor:
    """Floats as float32 (their rounding to the cache's dtype stays); the rest as it is."""
    return values.float() if values.is_floating_point() else values


def _padded(rows: Tensor, num: int) -> Tensor:
    """[K, ...] to [num, ...] by repeating candidate 0."""
    return torch.cat([rows, rows[:1].expand(num - len(rows), *rows.shape[1:])]) if len(rows) < num else rows


def collate(items: Sequence[Item], target: tuple[int, int]) -> dict[str, Any]:
    """A batch of records of one bucket.

    Returns `ids` [B] int64, `mean` and `std` [B K C h w] float32, `utility` [B K] float32, `mask` [B K] bool, `text`
    and `scores` name -> [B K ...], `original_size` and `crop` [B K 2] int64 as (height, width) and (top, left),
    `target_size` [B 2]. Records with fewer candidates than the longest repeat their first one there, with mask False.
    """
    num = max(len(item.utility) for item in items)

    def stack(name: str) -> Tensor:
        return torch.stack([_padded(getattr(item, name), num) for item in items])

    return {
        "ids": torch.tensor([item.id for item in items], dtype=torch.int64),
        "mean": as_floats(stack("mean")),
        "std": as_floats(stack("std")),
        "utility": stack("utility").float(),
        "mask": torch.stack([torch.arange(num) < len(item.utility) for item in items]),
        "text": {
            name: as_floats(torch.stack([_padded(item.text[name], num) for item in items])) for name in items[0].text
        },
        "scores": {
            name: torch.stack([_padded(item.scores[name], num) for item in items]).float() for name in items[0].scores
        },
        "original_size": stack("original"),
        "crop": stack("crop"),
        "target_size": torch.tensor([target] * len(items), dtype=torch.int64),
    }


def check_request(
    indices: Any, flips: Any, bucket_of: np.ndarray, has_flips: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Indices [B], flips [B] and their bucket, from lists, arrays or tensors; `flips` None means none.

    Raises:
        UserError: flips asked of a source that was built without, or records of two buckets in one batch.
    """
    rows = np.asarray(indices, dtype=np.int64).reshape(-1)
    mirrored = np.zeros(len(rows), bool) if flips is None else np.asarray(flips).astype(bool).reshape(-1)
    assert len(rows) == len(mirrored) > 0, "as many flips as indices, and at least one"
    if mirrored.any() and not has_flips:
        raise UserError("flips are asked for, but the latents are encoded without: set flip to true")
    buckets = np.unique(bucket_of[rows])
    if len(buckets) > 1:
        raise UserError(f"a batch must come from one bucket, these records are of {len(buckets)}; group by bucket_of")
    return rows, mirrored, int(buckets[0])


def count_buckets(bucket_of: np.ndarray) -> dict[int, int]:
    """Bucket -> number of records, for the buckets that have any."""
    buckets, counts = np.unique(bucket_of, return_counts=True)
    return {int(bucket): int(count) for bucket, count in zip(buckets, counts, strict=True)}
