"""From a record to what the network sees: the one path that the cache's build and `OnTheFly` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from diffalign.data import _images
from diffalign.types import Record, UserError

DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Encoder(Protocol):
    """What the cache needs of a model family."""

    vae_factor: int
    latent_channels: int

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...  # [n 3 H W] in [-1, 1] -> mean, std [n C h w]
    def encode_prompts(self, prompts: list[str]) -> Mapping[str, Tensor]: ...  # name -> [n, ...]
    def empty_prompt(self) -> Mapping[str, Tensor]: ...  # name -> [1, ...]
    def fingerprint(self, part: str) -> str: ...  # of "vae" or "text"


@dataclass(frozen=True)
class Plan:
    """The preprocessing settings: part of the key of every cached latent."""

    buckets: tuple[tuple[int, int], ...]  # (height, width) in pixels
    flip: bool
    dtype: str

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        resolution: int | Sequence[int],
        buckets: Literal["square", "aspect"],
        flip: bool,
        dtype: str,
    ) -> Plan:
        """Checks the settings.

        Raises:
            UserError: a resolution, kind of buckets or dtype that cannot be used.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} cannot be cached; legal: {', '.join(DTYPES)}")
        return cls(_images.bucket_sizes(resolution, buckets, encoder.vae_factor), bool(flip), dtype)

    @property
    def num_flips(self) -> int:
        """Encoded versions of an image: 1, or 2 with the mirrored one."""
        return 2 if self.flip else 1


@dataclass(frozen=True)
class Prepared:
    """A record's images, decoded and brought to one bucket."""

    record: Record
    bucket: int
    pixels: UInt8[Tensor, "K 3 H W"]
    original: Int64[Tensor, "K 2"]  # (height, width) before the resize
    crop: Int64[Tensor, "K 3"]  # top, left, left of the mirrored image


def prepare(record: Record, plan: Plan) -> Prepared:
    """Decodes, buckets, resizes and crops all images of a record.

    Raises:
        BadRow: an image that does not decode.
    """
    images = [_images.decode(data) for data in record.images]
    sizes = [(image.height, image.width) for image in images]
    bucket = _images.choose_bucket(sizes, plan.buckets)
    fitted = [_images.fit(image, plan.buckets[bucket]) for image in images]
    return Prepared(
        record,
        bucket,
        torch.stack([pixels for pixels, _ in fitted]),
        torch.tensor(sizes),
        torch.tensor([crop for _, crop in fitted]),
    )


def _rounded(values: Tensor, dtype: str, what: str) -> Tensor:
    """On the CPU, in the cache's dtype; other than floats stay as they are.

    Raises:
        UserError: values that are not finite, or not any more.
    """
    values = values.detach().cpu()
    if not values.is_floating_point():
        return values.contiguous()
    rounded = values.to(DTYPES[dtype]).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        if bool(torch.isfinite(values).all()):
            raise UserError(f"{what} leave the range of {dtype}; set the cache's dtype to float32")
        raise UserError(f"{what} hold NaN or infinity; run the encoder in float32 (model.vae_dtype, model.dtype)")
    return rounded


@torch.no_grad()
def encode_pixels(
    encoder: Encoder, pixels: UInt8[Tensor, "n 3 H W"], dtype: str
) -> tuple[Float[Tensor, "n C h w"], Float[Tensor, "n C h w"]]:
    """Mean and std of the VAE's posterior, rounded to `dtype`.

    Raises:
        UserError: values that are not finite in `dtype`.
    """
    mean, std = encoder.encode_images(pixels.float() / 127.5 - 1.0)
    return _rounded(mean, dtype, "latents"), _rounded(std, dtype, "latents")


@torch.no_grad()
def encode_texts(encoder: Encoder, texts: list[str], dtype: str) -> dict[str, Tensor]:
    """Text embeddings [n, ...] by name, rounded to `dtype`.

    Raises:
        UserError: values that are not finite in `dtype`.
    """
    return {name: _rounded(rows, dtype, "text embeddings") for name, rows in encoder.encode_prompts(texts).items()}


@torch.no_grad()
def encode_empty(encoder: Encoder, dtype: str) -> dict[str, Tensor]:
    """The empty prompt's embeddings [1, ...] by name, rounded to `dtype`."""
    return {name: _rounded(rows, dtype, "text embeddings") for name, rows in encoder.empty_prompt().items()}
