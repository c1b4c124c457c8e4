"""One safetensors file of the cache: written whole, read through a memory map, checked by size and checksum."""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign._atomic import write_atomic

# The file's own names of types; what the cache holds and NumPy knows.
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
MAX_HEADER = 100 * 2**20  # bytes; safetensors' own limit


class DamagedFile(Exception):
    """A file of the cache that is missing, truncated or altered: it has to be built again."""


def write_shard(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any], hint: str = "") -> None:
    """Writes tensors and a JSON-able `info`, atomically; equal content gives equal bytes.

    Raises:
        UserError: the disk is full; `hint` says how much is needed.
    """
    from safetensors.torch import save

    # One metadata key only: safetensors does not keep an order of several.
    text = json.dumps(info, sort_keys=True, separators=(",", ":"))
    write_atomic(path, save(dict(tensors), metadata={"diffalign": text}), hint)


class Shard:
    """A memory-mapped shard.

    Raises:
        DamagedFile: missing, truncated, or not a shard.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(MAX_HEADER, size - 8):
                    raise DamagedFile(f"{path}: damaged header")
                header = json.loads(file.read(length))
            self._info = header.pop("__metadata__")["diffalign"]
            self._tensors = header
            ends = [entry["data_offsets"][1] for entry in header.values()]
            expected = 8 + length + max(ends, default=0)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedFile(f"{path}: {error}") from error
        if size != expected:
            raise DamagedFile(f"{path}: {size} bytes instead of {expected}")
        self._start = 8 + length
        self._map = np.memmap(path, np.uint8, "r")

    @property
    def info(self) -> dict[str, Any]:
        """What was written beside the tensors."""
        return json.loads(self._info)

    @property
    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._tensors)

    def num_rows(self, name: str) -> int:
        """The length of a tensor's first axis."""
        return self._tensors[name]["shape"][0]

    def rows(self, name: str, start: int, num: int) -> np.ndarray:
        """`num` rows of a tensor as a view of the map: nothing is read before it is used."""
        entry = self._tensors[name]
        shape, kind = entry["shape"], np.dtype(NUMPY[entry["dtype"]])
        assert 0 <= start and start + num <= shape[0], (name, start, num, shape)
        stride = kind.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        first = self._start + entry["data_offsets"][0] + start * stride
        return self._map[first : first + num * stride].view(kind).reshape(num, *shape[1:])

    def crc(self, names: Sequence[str], start: int, num: int) -> int:
        """Checksum (CRC-32) of the same rows of several tensors."""
        value = 0
        for name in names:
            value = zlib.crc32(self.rows(name, start, num).reshape(-1).data, value)
        return value


def crc_of(*tensors: Tensor) -> int:
    """Checksum of the bytes of tensors, one after the other: what `Shard.crc` finds in the file."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().numpy().reshape(-1).data, value)
    return value


class OpenShards:
    """A bounded number of open shards, the least recently used closed first."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, Shard] = OrderedDict()

    def __getitem__(self, path: Path) -> Shard:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = Shard(path)
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return self._open[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit, "_open": OrderedDict()}  # workers map the files themselves


def tensor(rows: np.ndarray) -> Tensor:
    """A tensor with its own memory."""
    return torch.from_numpy(np.array(rows))
