"""A general preference model over CLIP (arXiv 2410.02197): which of two pictures wins, cycles allowed; needs `path`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign.scorers import _clip_files as files
from diffalign.scorers import _preference_head as heads
from diffalign.scorers._calls import check_lengths
from diffalign.scorers._clip import ClipScorer
from diffalign.types import ScorerInfo


@dataclass(frozen=True)
class GeneralPreference(ClipScorer):
    """P(a beats b | prompt) = sigmoid(<R v_a, v_b>), what `train-scorer` with `train_scorer.head=general` exports.

    It compares: `prefer` pairs, `compare_group` all pictures of a prompt, with one pass of the towers per picture. A
    score per picture would force an order that the model may not have, and a win rate would depend on which other
    pictures are there, so `score` and `score_tensor` refuse. `label.judge` and, with `source.prefer=pairwise`, rollouts
    compare by it. The mean of a row of `compare_group` over the rivals is the win rate that objective `sppo` takes as
    utility with `target=winrate`.

    Fields: see `ClipScorer`; `path` is a folder or hub id.

    Raises:
        UserError: a folder without a preference head.
    """

    def __post_init__(self) -> None:
        heads.check(self.path)
        super().__post_init__()

    @property
    def _meaning(self) -> tuple[str, tuple[float, float]]:
        return "none: P(a beats b) of two pictures, in [0, 1]", (0.0, 1.0)

    @cached_property
    def info(self) -> ScorerInfo:
        """The version is a hash of the files and settings: it changes when a preference may."""
        return replace(super().info, differentiable=False)

    def _load(self) -> heads.PreferenceTowers:
        clip = files.load_clip(self.path, self.dtype)
        return heads.PreferenceTowers(clip, heads.load(files.folder_of(self.path, files.OF_WEIGHTS), clip))

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NoReturn:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "compares two pictures and has no score of one; use prefer or compare_group, or label with label.judge"
        )

    def score_tensor(
        self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str], timestep: Tensor | None = None
    ) -> NoReturn:
        """Refuses, as `score` does."""
        self.score([], [])

    @property
    def dim(self) -> int:
        """Numbers per picture that `represent` gives."""
        return len(self._towers.head.bias)

    @torch.no_grad()
    def represent(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[Tensor, "N M"]:
        """Embeddings v, float32 on the CPU, of finished pictures; `win_table` compares those of a prompt.

        Raises:
            ValueError: not as many prompts as pictures, or a picture too narrow to be resized.
        """
        check_lengths(images, prompts)
        made = [torch.zeros(0, self.dim)]
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            features, texts = self.image_features(images[rows]), self.text_features(prompts[rows])
            with self._precisely():
                made.append(self._towers.embed(features, texts).cpu())
        return torch.cat(made)

    def prefer(
        self, images_a: Sequence[Image.Image], images_b: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Float[NDArray[np.float32], " N"]:
        """P(a beats b), exactly 1 minus that of the swapped call.

        Args:
            images_a: N pictures.
            images_b: N pictures.
            prompts: N prompts.

        Raises:
            ValueError: see `represent`.
        """
        first, second = (self.represent(images, prompts) for images in (images_a, images_b))
        return heads.probability(heads.log_odds(first, second)).numpy()

    def compare_group(self, images: Sequence[Image.Image], prompt: str) -> Float[NDArray[np.float32], "K K"]:
        """P[i, j] that picture i of the prompt beats picture j; P + P.T = 1 exactly, 1/2 on the diagonal.

        Raises:
            ValueError: see `represent`.
        """
        return self.win_table(self.represent(images, [prompt] * len(images)))

    @staticmethod
    def win_table(v: Float[Tensor, "K M"]) -> Float[NDArray[np.float32], "K K"]:
        """P[i, j] that picture i beats picture j, of the embeddings of one prompt's pictures."""
        return heads.probability(heads.log_odds(v[:, None], v[None])).numpy()
