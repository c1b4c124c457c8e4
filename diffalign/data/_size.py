"""How much disk a cache takes, before it is built."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data._encode import DTYPES, Encoder, encode_empty
from diffalign.data._reader import good_records
from diffalign.data._report import Report
from diffalign.types import UserError

SAMPLE = 32  # records looked at for the number of images
PER_CAPTION, PER_RECORD = 64, 600  # bytes beside the numbers: index, headers


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the two sub-caches."""

    latents: int
    text: int

    @property
    def total(self) -> int:
        """Bytes of both."""
        return self.latents + self.text

    def __str__(self) -> str:
        return f"{self.total / 1e9:.3g} GB (latents {self.latents / 1e9:.3g}, text {self.text / 1e9:.3g})"


def images_per_record(reader: Any) -> float:
    """The mean over the first few readable records; an image that several of them share is one."""
    num = 0
    distinct: set[bytes] = set()
    for _, record in islice(good_records(reader, Report()), SAMPLE):
        num += 1
        distinct.update(hashlib.blake2b(image, digest_size=16).digest() for image in record.images)
    return len(distinct) / max(num, 1)


def estimate_cache_bytes(
    reader: Any, encoder: Encoder, *, resolution: int | Sequence[int], flip: bool = False, dtype: str = "float16"
) -> CacheSize:
    """Bytes that `build_cache` will write, from above: aspect buckets and captions shared with other sets need less.

    The number of images per record is that of the first few readable records.

    Raises:
        UserError: an unknown dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} cannot be cached; legal: {', '.join(DTYPES)}")
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    latent = encoder.latent_channels * (height // encoder.vae_factor) * (width // encoder.vae_factor)
    images = len(reader) * images_per_record(reader) * (2 if flip else 1)
    row = sum(rows.numel() * rows.element_size() for rows in encode_empty(encoder, dtype).values())
    num_captions = getattr(reader, "num_captions", len(reader))
    return CacheSize(
        latents=round(images * 2 * latent * DTYPES[dtype].itemsize + PER_RECORD * len(reader)),
        text=(num_captions + 1) * (row + PER_CAPTION),
    )


def check_disk(folder: Path, needed: CacheSize, existing: int) -> None:
    """Refuses to begin what will not fit.

    Raises:
        UserError: says how many bytes are needed and how many are free.
    """
    free = shutil.disk_usage(folder).free
    missing = needed.total - existing
    if missing > free:
        raise UserError(
            f"{folder}: the cache needs {missing:,} bytes more ({needed}) and the disk has {free:,} free; give another "
            "cache folder, lower the resolution, switch flip off, or set source.cache to false"
        )


def bytes_in(folder: Path) -> int:
    """Bytes of the files directly in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
