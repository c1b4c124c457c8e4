"""Encoded bytes to the pixels a VAE sees: decode, bucket, resize, centre crop, with SDXL's size conditioning.

Sizes are (height, width) everywhere. Crops are the top-left corner in pixels of the resized image, as diffusers' SDXL
training scripts give it to the network (SDXL, arXiv 2307.01952, section 2.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from diffalign.data._report import BadRow
from diffalign.types import UserError

MAX_ASPECT = 4.0  # SDXL's widest bucket: 512 x 2048
VERSION = 1  # part of every cache key: raise it when any pixel changes

Size = tuple[int, int]


def _broken(error: Exception) -> BadRow:
    """What a decoder's error says about the image, in words that are the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return BadRow("broken image", "not in a known image format")  # Pillow's own words hold a memory address
    text = str(error)[:200]
    return BadRow("truncated image" if "truncated" in text else "broken image", text)


def probe(data: bytes) -> Size:
    """(height, width) as displayed (EXIF orientation applied), from the header alone.

    Raises:
        BadRow: not an image, or a decompression bomb.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Image.DecompressionBombError as error:
        raise BadRow("absurd size", str(error)) from error
    except Exception as error:  # hostile bytes make decoders raise anything
        raise _broken(error) from error
    return (width, height) if is_turned else (height, width)


def check_size(size: Size, min_size: int, max_size: int) -> None:
    """Refuses images whose short side is under `min_size` or whose long side is over `max_size` pixels.

    Raises:
        BadRow: names the size.
    """
    if min(size) < min_size or max(size) > max_size:
        raise BadRow("absurd size", f"{size[1]} x {size[0]} pixels, allowed are {min_size} to {max_size}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """An RGB image: upright by its EXIF orientation, transparency laid over white, the first frame of an animation.

    Raises:
        BadRow: broken or truncated bytes, or a decompression bomb.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise BadRow("absurd size", str(error)) from error
    except Exception as error:  # hostile bytes make decoders raise anything
        raise _broken(error) from error


def size_multiple(resolution: Size, vae_factor: int) -> int:
    """Sides of aspect buckets are multiples of this: 64 at real resolutions, four latent pixels in tiny models."""
    return 64 if min(resolution) >= 256 and 64 % vae_factor == 0 else 4 * vae_factor


def bucket_sizes(
    resolution: int | Sequence[int], buckets: Literal["square", "aspect"], vae_factor: int
) -> tuple[Size, ...]:
    """The (height, width) that records are brought to.

    `square`: one bucket, the resolution itself (which may be a (height, width) too). `aspect`: every height in
    multiples of `size_multiple`, with the largest width that keeps the area within resolution^2, and the transposes, to
    an aspect of 4: at 1024 all of them are buckets SDXL was trained with, and none needs more memory than the square.

    Raises:
        UserError: a resolution that the VAE's factor does not divide, or an unknown kind of buckets.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else (int(side) for side in resolution)
    if height < 1 or width < 1 or height % vae_factor or width % vae_factor:
        raise UserError(
            f"resolution {height} x {width}: both sides must be multiples of {vae_factor}, the VAE's factor"
        )
    if buckets == "square":
        return ((height, width),)
    if buckets != "aspect":
        raise UserError(f"buckets: {buckets!r} is unknown; legal: square, aspect")
    multiple, area = size_multiple((height, width), vae_factor), height * width
    wide = set()
    for short in range(multiple, math.isqrt(area) + 1, multiple):
        long = area // short // multiple * multiple
        if long / short <= MAX_ASPECT:
            wide.add((short, long))
    if not wide:
        raise UserError(f"resolution {height} x {width} is too small for aspect buckets; use buckets: square")
    return tuple(sorted(wide | {(long, short) for short, long in wide}))


def choose_bucket(sizes: Sequence[Size], buckets: Sequence[Size]) -> int:
    """The bucket of a record: nearest in log aspect to the mean log aspect of its images (the first one on a tie).

    One bucket per record, so that all its candidates go through the network in one folded call.
    """
    mean = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    distances = [abs(math.log(height / width) - mean) for height, width in buckets]
    return distances.index(min(distances))


def fit(image: Image.Image, size: Size) -> tuple[UInt8[Tensor, "3 H W"], tuple[int, int, int]]:
    """Resizes to cover `size` (Lanczos, antialiased) and crops the centre.

    Returns the pixels and (top, left, left of the mirrored image) of the crop, in pixels of the resized image. Mirrored
    pixels are the mirrored image's own crop at that third number.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    if resized != (image.height, image.width):
        image = image.resize((resized[1], resized[0]), Image.Resampling.LANCZOS)
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), (top, left, resized[1] - width - left)
