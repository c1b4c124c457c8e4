"""What scorers of pixels share: batches, both roads of pictures, and a precision that is their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign.scorers._calls import check_lengths, device_of
from diffalign.scorers._clip_pixels import PixelRoads, Resize
from diffalign.types import UserError


@dataclass(frozen=True)
class BatchedScorer(ABC):
    """A network that scores the pixels of a picture for its prompt; its weights are read at the first score.

    path: the weights: a folder as transformers' save_pretrained writes it, a weights file, or a hub id.
    dtype: of the weights. In bfloat16 scores moved by 0.2 against float32 (a random tower), the size of real margins.
    batch_size: pictures per call; no score depends on it beyond rounding.
    device: auto takes the GPU where there is one.

    Raises:
        UserError: a batch_size below 1.
    """

    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1 (got {self.batch_size})")

    @cached_property
    def _device(self) -> torch.device:
        return device_of(self.device)

    @cached_property
    def _preprocess(self) -> PixelRoads:
        return self._load_preprocess()

    @abstractmethod
    def _load_preprocess(self) -> PixelRoads:
        """What makes the network's pixels."""

    @abstractmethod
    def _run(
        self, pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str], timestep: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        """Scores of the network's own pixels, which are on its device."""

    @property
    def _resize(self) -> Resize:
        return "antialiased"

    def _precisely(self) -> AbstractContextManager[None]:
        """Without the caller's autocast: a score's precision is that of `dtype`."""
        return torch.autocast(self._device.type, enabled=False)

    def _time(self, num: int, timestep: Tensor | None) -> Tensor | None:
        """The timestep of each picture; a network that knows none is not told."""
        return None

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [N] of finished pictures, with exactly the published preprocessing (Pillow).

        Raises:
            ValueError: not as many prompts as pictures, or a picture too narrow to be resized.
        """
        check_lengths(images, prompts)
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            pixels = self._preprocess.pictures(images[rows]).to(self._device)
            with torch.no_grad(), self._precisely():
                judged = self._run(pixels, prompts[rows], self._time(len(pixels), None))
                scores.append(judged.float().cpu().numpy())
        return np.concatenate(scores)

    def score_tensor(
        self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str], timestep: Tensor | None = None
    ) -> Float[Tensor, " N"]:
        """float32 [N] on the device of `pixels` (in [0, 1]), differentiable in them; in calls of `batch_size`.

        `timestep` [N] or a scalar is the diffusion network's own time (0..999), for scorers that know one.

        Raises:
            ValueError: not as many prompts as pictures.
        """
        check_lengths(pixels, prompts)
        times = self._time(len(pixels), timestep)
        scores = [pixels.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(pixels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            inputs = self._preprocess.tensor(pixels[rows].to(self._device, torch.float32), self._resize)
            with self._precisely():
                judged = self._run(inputs, prompts[rows], None if times is None else times[rows])
                scores.append(judged.float().to(pixels.device))
        return torch.cat(scores)
