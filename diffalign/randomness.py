"""Addressed randomness: every draw is a pure function of (seed, stream, record id, draw number).

A stream of random numbers makes results depend on batch size, world size, worker count and the step a run resumed at.
An address does not, so one process equals two, a resumed run equals an uninterrupted one, and the reference's error of
a (record, draw) can be cached on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def address(*parts: int | str) -> int:
    """A 63-bit hash of the parts: a generator's seed, or a record's id."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the address. On the CPU even for GPU runs: the same draw on every device."""
    return torch.Generator().manual_seed(address(*parts))


def _draw(kind: str, seed: int, stream: str, ids: Tensor, draws: Tensor, shape: Sequence[int]) -> Tensor:
    sample = torch.randn if kind == "normal" else torch.rand
    rows = [
        sample(tuple(shape), generator=generator(seed, stream, record, draw))
        for record, draw in zip(ids.tolist(), draws.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def normal(
    seed: int, stream: str, ids: Int64[Tensor, " B"], draws: Int64[Tensor, " B"], shape: Sequence[int]
) -> Float[Tensor, "B ..."]:
    """Standard normal float32 [B, *shape] on the CPU, one generator per row."""
    return _draw("normal", seed, stream, ids, draws, shape)


def uniform(
    seed: int, stream: str, ids: Int64[Tensor, " B"], draws: Int64[Tensor, " B"], shape: Sequence[int] = ()
) -> Float[Tensor, "B ..."]:
    """Uniform float32 in [0, 1), [B, *shape] on the CPU, one generator per row."""
    return _draw("uniform", seed, stream, ids, draws, shape)


def permute(index: int, size: int, *key: int | str) -> int:
    """Position `index` of a pseudo-random permutation of range(size), in constant memory.

    A four-round Feistel network on the smallest even number of bits that covers `size`, walked until it lands inside
    (Black and Rogaway 2002, cycle walking): an epoch's order needs neither a stored shuffle nor replay on resume.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & low
        for round_number in range(4):
            left, right = right, left ^ (address("feistel", round_number, right, *key) & low)
        value = (left << half) | right
        if value < size:
            return value
