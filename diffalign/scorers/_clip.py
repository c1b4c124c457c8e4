"""CLIP-type preference scorers: exp(logit_scale) * cosine(image, text); what the scorer files share.

PickScore (arXiv 2305.01569) is the published one of this form, SPO's step-aware model (arXiv 2406.04314) one with a
timestep. The difference of two scores is the log-odds that the first picture is preferred.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from diffalign.scorers import _clip_files as files
from diffalign.scorers._batched import BatchedScorer
from diffalign.scorers._clip_pixels import Crop, PixelRoads
from diffalign.scorers._clip_pixels import Preprocess as Preprocess
from diffalign.scorers._clip_pixels import Resize as Resize
from diffalign.scorers._clip_towers import Towers as Towers
from diffalign.scorers._clip_towers import tokenize as tokenize
from diffalign.types import ScorerInfo

KEPT_TEXTS = 4096  # prompts whose features are kept: 16 MiB at PickScore's 1024 dimensions


@dataclass(frozen=True)
class TowerScorer(BatchedScorer):
    """What scorers over two towers share: features of pictures, and of prompts, each of which is embedded once."""

    @cached_property
    def _towers(self) -> Any:
        return self._load().requires_grad_(False).eval().to(self._device)

    @abstractmethod
    def _load(self) -> nn.Module:
        """The towers: `images(pixels, timestep)` gives features of unit length."""

    @abstractmethod
    def _embedded(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Features of unit length of prompts not seen before."""

    @abstractmethod
    def _judged(
        self, images: Float[Tensor, "N D"], pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str]
    ) -> Float[Tensor, " N"]:
        """Scores of image features of unit length; `pixels` are the towers' own."""

    @cached_property
    def _texts(self) -> OrderedDict[str, Tensor]:
        return OrderedDict()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Features of unit length; each distinct prompt is embedded once and kept among the latest 4096."""
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._texts]
        for start in range(0, len(new), self.batch_size):
            some = new[start : start + self.batch_size]
            with self._precisely():
                self._texts.update(zip(some, self._embedded(some), strict=True))
        for prompt in distinct:
            self._texts.move_to_end(prompt)
        rows = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return rows

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """Features of unit length of finished pictures, as `score` compares them; one call: the caller makes batches.

        Raises:
            ValueError: see `rgb`.
        """
        pixels = self._preprocess.pictures(images).to(self._device)
        with self._precisely():
            return self._towers.images(pixels, self._time(len(pixels), None))

    def _run(
        self, pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str], timestep: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        return self._judged(self._towers.images(pixels, timestep), pixels, prompts)


@dataclass(frozen=True)
class ClipScorer(TowerScorer):
    """exp(logit_scale) * cosine over a CLIPModel; what the scorers of transformers' CLIP folders share.

    path: a folder as transformers' save_pretrained writes it (config.json, model.safetensors, tokenizer), a weights
        file in transformers' or open_clip's layout (with config.json beside it where the sizes are not the published
        ones), or a hub id.
    processor: where tokenizer and preprocessor_config.json are, if not in `path`.
    resize: of `score_tensor`: antialiased, or spo as the released SPO code (see `Preprocess.tensor`).

    Raises:
        UserError: a folder that is none or lacks a file.
    """

    is_step_aware: ClassVar[bool] = False

    processor: str | None = None
    resize: Resize = "antialiased"

    def __post_init__(self) -> None:
        super().__post_init__()
        if files.lone_file(self._source) is None:
            files.check_folder(self._source, self._words, self.is_step_aware)
        else:
            files.check_words(self._words)

    @property
    def _source(self) -> str:
        """The weights: `path`, or what stands for it where it is empty."""
        return self.path

    @property
    def _architecture(self) -> str | None:
        """The open_clip model of the published sizes, for a lone weights file."""
        return None

    @property
    def _hub_words(self) -> str | None:
        """The hub id of tokenizer and processor, where `path` has none."""
        return None

    @property
    def _words(self) -> str:
        """Where tokenizer and processor are."""
        file = files.lone_file(self._source)
        beside = str(file.parent) if file is not None else self._source
        if self.processor or self._hub_words is None:
            return self.processor or beside
        folder = files.local_folder(beside)
        return beside if folder is not None and files.has_words(folder) else self._hub_words

    @property
    def _crop(self) -> Crop:
        """Whose crop the published numbers were made with; see `Preprocess`."""
        return "transformers"

    @property
    def _settings(self) -> tuple[str, ...]:
        """What changes a score beside the files."""
        return (self.dtype,)

    @property
    def _inputs(self) -> tuple[str, ...]:
        return ("image", "prompt", *(("timestep",) if self.is_step_aware else ()))

    @property
    def _meaning(self) -> tuple[str, tuple[float, float]]:
        """The unit, and the range that scores are expected in."""
        return "logit: exp(logit_scale) x cosine", (-100.0, 100.0)

    @cached_property
    def info(self) -> ScorerInfo:
        """The version is a hash of the files and settings: it changes when a score may."""
        unit, expected = self._meaning
        return ScorerInfo(
            name=type(self).__module__.rpartition(".")[2],
            version=files.fingerprint(self._source, self._words, *self._settings),
            inputs=self._inputs,
            unit=unit,
            expected_range=expected,
            differentiable=True,
        )

    def _load(self) -> Towers:
        clip = files.load_clip(self._source, self.dtype, self._architecture)
        modulation = files.load_modulation(self._source, clip) if self.is_step_aware else None
        return Towers(clip, modulation)

    @cached_property
    def _tokenizer(self) -> Any:
        return files.load_tokenizer(self._words)

    def _load_preprocess(self) -> PixelRoads:
        side = self._towers.clip.config.vision_config.image_size
        return Preprocess(files.load_processor(self._words, side), self._crop)

    @property
    def _resize(self) -> Resize:
        return self.resize

    def _embedded(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        return self._towers.texts(tokenize(self._tokenizer, prompts, self._towers.clip).to(self._device))

    def _judged(
        self, images: Float[Tensor, "N D"], pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str]
    ) -> Float[Tensor, " N"]:
        return self._towers.compare(images, self.text_features(prompts))
