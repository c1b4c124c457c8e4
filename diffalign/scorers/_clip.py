"""CLIP-type preference scorers: exp(logit_scale) * cosine(image, text); what the scorer files share.

PickScore (arXiv 2305.01569) is the published one of this form, SPO's step-aware model (arXiv 2406.04314) one with a
timestep. The difference of two scores is the log-odds that the first picture is preferred.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from diffalign.scorers import _clip_files as files
from diffalign.scorers._step_clip import Modulation, pooled
from diffalign.types import ScorerInfo, UserError

Resize = Literal["antialiased", "spo"]
KEPT_TEXTS = 4096  # prompts whose features are kept: 16 MiB at PickScore's 1024 dimensions


class Preprocess:
    """Pictures to the tower's normalised pixels: exactly as CLIP's processor does, or differentiably.

    Args:
        processor: a CLIPImageProcessorPil.

    Raises:
        UserError: a processor that does not resize, crop, rescale and normalise.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        if not all(getattr(processor, f"do_{what}") for what in ("resize", "center_crop", "rescale", "normalize")):
            raise UserError("the preprocessor_config.json must resize, centre-crop, rescale and normalise, as CLIP's")
        self._mean, self._std = (torch.tensor(getattr(processor, f"image_{what}")) for what in ("mean", "std"))
        self._mode = {2: "bilinear", 3: "bicubic"}.get(int(processor.resample), "bicubic")

    def pictures(self, images: Sequence[Image.Image]) -> Float[Tensor, "N 3 S S"]:
        """The processor's own road: Pillow's resize of uint8 pixels. Transparency is dropped, as `convert` does."""
        rgb = [image.convert("RGB") for image in images]
        return self.processor(images=rgb, return_tensors="pt")["pixel_values"].float()

    def tensor(self, pixels: Float[Tensor, "N 3 H W"], resize: Resize) -> Float[Tensor, "N 3 S S"]:
        """The differentiable road from pixels in [0, 1].

        `antialiased` follows the processor up to its rounding to uint8. `spo` is what the released SPO code does when
        it compares candidates: bicubic without antialiasing, of pixels that may leave [0, 1], and clamped after.
        """
        height, width = self._resized(*pixels.shape[-2:])
        if (height, width) != tuple(pixels.shape[-2:]):
            if resize == "spo":
                pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False)
            else:
                pixels = F.interpolate(
                    pixels.clamp(0, 1), (height, width), mode=self._mode, align_corners=False, antialias=True
                )
        crop = self.processor.crop_size
        top, left = (height - crop["height"]) // 2, (width - crop["width"]) // 2
        cut = pixels[..., top : top + crop["height"], left : left + crop["width"]].clamp(0, 1)
        mean, std = (values.to(cut)[:, None, None] for values in (self._mean, self._std))
        return (cut - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize, rounded as the processor does."""
        size = self.processor.size
        if not size.get("shortest_edge"):
            return size["height"], size["width"]
        short = size["shortest_edge"]
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)


class Towers(nn.Module):
    """A CLIPModel, and what modulates its vision tower where it is step-aware."""

    def __init__(self, clip: Any, modulation: Modulation | None = None) -> None:
        super().__init__()
        self.clip, self.modulation = clip, modulation

    def images(self, pixels: Float[Tensor, "N 3 S S"], timestep: Float[Tensor, " N"] | None) -> Float[Tensor, "N D"]:
        """Features of unit length, float32, of normalised pixels; without a timestep, of the plain CLIP tower."""
        pixels = pixels.to(self.clip.dtype)
        if self.modulation is None or timestep is None:
            features = self.clip.vision_model(pixel_values=pixels).pooler_output
        else:
            features = pooled(self.clip.vision_model, self.modulation, pixels, timestep)
        return F.normalize(self.clip.visual_projection(features).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Float[Tensor, "N D"]:
        """Features of unit length, float32. No mask: the text tower is causal and pools at the end of the text."""
        features = self.clip.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.clip.text_projection(features).float(), dim=-1)

    def compare(self, image: Float[Tensor, "N D"], text: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """exp(logit_scale) * cosine, a logit."""
        return self.clip.logit_scale.float().exp() * (image * text).sum(dim=-1)

    def forward(self, pixels: Tensor, tokens: Tensor, rows: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Scores [N] of normalised pixels; picture i belongs to text `rows[i]` of `tokens`."""
        return self.compare(self.images(pixels, timestep), self.texts(tokens)[rows])


def tokenize(tokenizer: Any, prompts: Sequence[str], clip: Any) -> Tensor:
    """Token ids [N, L], cut and padded to the text tower's length, so that no prompt's depend on another's."""
    length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
    made = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return made.input_ids


@dataclass(frozen=True)
class ClipScorer:
    """The fields and the behaviour that all CLIP-type scorers share. Weights are read at the first score.

    path: a folder as transformers' save_pretrained writes it (config.json, model.safetensors, tokenizer), or a hub id.
    processor: where tokenizer and preprocessor_config.json are, if not in `path`.
    dtype: of the weights. In bfloat16 scores moved by 0.2 against float32 (a random tower), the size of real margins.
    batch_size: pictures per call; no score depends on it beyond rounding.
    device: auto takes the GPU where there is one.
    resize: of `score_tensor`: antialiased, or spo as the released SPO code (see `Preprocess.tensor`).

    Raises:
        UserError: a folder that is none or lacks a file.
    """

    is_step_aware: ClassVar[bool] = False

    path: str
    processor: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 32
    device: str = "auto"
    resize: Resize = "antialiased"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1 (got {self.batch_size})")
        files.check_folder(self.path, self.processor, self.is_step_aware)

    @cached_property
    def info(self) -> ScorerInfo:
        """The version is a hash of the files and settings: it changes when a score may."""
        return ScorerInfo(
            name=type(self).__module__.rpartition(".")[2],
            version=files.fingerprint(self.path, str(self.processor), self.dtype),
            inputs=("image", "prompt", *(("timestep",) if self.is_step_aware else ())),
            unit="logit: exp(logit_scale) x cosine",
            expected_range=(-100.0, 100.0),
            differentiable=True,
        )

    @cached_property
    def _device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _towers(self) -> Towers:
        clip = files.load_clip(self.path, self.dtype)
        modulation = files.load_modulation(self.path, clip) if self.is_step_aware else None
        return Towers(clip, modulation).requires_grad_(False).eval().to(self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        return files.load_tokenizer(self.processor or self.path)

    @cached_property
    def _preprocess(self) -> Preprocess:
        side = self._towers.clip.config.vision_config.image_size
        return Preprocess(files.load_processor(self.processor or self.path, side))

    @cached_property
    def _texts(self) -> OrderedDict[str, Tensor]:
        return OrderedDict()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "N D"]:
        """Features of unit length; each distinct prompt is embedded once and kept among the latest 4096."""
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._texts]
        if new:
            tokens = tokenize(self._tokenizer, new, self._towers.clip).to(self._device)
            self._texts.update(zip(new, self._towers.texts(tokens), strict=True))
        for prompt in distinct:
            self._texts.move_to_end(prompt)
        rows = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return rows

    def _time(self, num: int, timestep: Tensor | None) -> Tensor | None:
        """The timestep of each picture; a tower that knows none is not told."""
        return None

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [N] of finished pictures, with exactly the preprocessing of the folder's processor (Pillow)."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        scores = [np.zeros(0, np.float32)]
        for start in range(0, len(images), self.batch_size):
            pixels = self._preprocess.pictures(images[start : start + self.batch_size]).to(self._device)
            with torch.no_grad():
                image = self._towers.images(pixels, self._time(len(pixels), None))
                text = self.text_features(prompts[start : start + self.batch_size])
                scores.append(self._towers.compare(image, text).cpu().numpy())
        return np.concatenate(scores)

    def score_tensor(
        self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str], timestep: Tensor | None = None
    ) -> Float[Tensor, " N"]:
        """float32 [N] on the device of `pixels` (in [0, 1]), differentiable in them; in calls of `batch_size`.

        `timestep` [N] or a scalar is the diffusion network's own time (0..999), for scorers that know one.
        """
        if len(pixels) != len(prompts):
            raise ValueError(f"{len(pixels)} images for {len(prompts)} prompts")
        times = self._time(len(pixels), timestep)
        scores = [pixels.new_zeros(0, dtype=torch.float32)]
        for start in range(0, len(pixels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            inputs = self._preprocess.tensor(pixels[rows].to(self._device, torch.float32), self.resize)
            image = self._towers.images(inputs, None if times is None else times[rows])
            text = self.text_features(prompts[rows])
            scores.append(self._towers.compare(image, text).to(pixels.device))
        return torch.cat(scores)
