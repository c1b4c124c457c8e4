"""MPS, the multi-dimensional preference score (arXiv 2405.14705), its released overall model."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.scorers import _clip_files as files
from diffalign.scorers import _mps_cross
from diffalign.scorers._batched import BatchedScorer
from diffalign.scorers._checkpoint import file_fingerprint, first_line, local_weights, read_checkpoint, resolve_weights
from diffalign.scorers._clip_pixels import Preprocess
from diffalign.types import ScorerInfo, UserError

FILE = "model.safetensors"
TOWERS = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# the words the released model was conditioned on, part of its definition
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance,"
    " texture, quantity, attributes, position, number, location, word, things."
)
KEPT_TEXTS = 256  # prompts whose token features are kept: 80 MB at the released sizes


@dataclass(frozen=True)
class Mps(BatchedScorer):
    """exp(logit_scale) x cosine of the prompt and of what the picture's [CLS] read of it; weights at the first score.

    path: a weights file, its folder, or a hub id. Default: others' copy of the release in safetensors; the released
        file itself is a pickled module and is refused: save its state_dict() where you trust it.
    processor: a folder or hub id with config.json, tokenizer and preprocessor_config.json of the CLIP it was made of.
        Default: the weights' folder if it has a tokenizer, else laion's ViT-H-14.
    threshold: a prompt's token is read where its closeness to the condition, over the prompt's largest, is above. 0.3
        in both released evaluations; 0.01 in the released model's own forward, which gives other scores.
    condition: what is judged, as one string.

    The other fields are those of `BatchedScorer`.

    Differs from the released code: the largest closeness is the prompt's, not the batch's (see `Network.kept`); prompts
    are always padded with the end token, as released, whatever the tokenizer's folder says.

    Raises:
        UserError: no such file, another network's weights, no tokenizer.
    """

    path: str = "RE-N-Y/mpsv1"
    processor: str | None = None
    threshold: float = 0.3
    condition: str = OVERALL

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1:
            raise UserError(f"mps.threshold must lie in [0, 1) (got {self.threshold}); 0.3 is the published one")
        local_weights(self.path)

    @cached_property
    def info(self) -> ScorerInfo:
        """The version is a hash of weights, tokenizer, processor, condition and threshold."""
        words = sorted(path for path in self._words.iterdir() if path.suffix in (".json", ".txt"))
        facts = [file_fingerprint(file) for file in (self._file, *words)]
        settings = (*facts, self.threshold, self.condition, self.dtype)
        return ScorerInfo(
            name="mps",
            version=hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest(),
            inputs=("image", "prompt"),
            unit="logit: exp(logit_scale) x cosine",
            expected_range=(-100.0, 100.0),
            differentiable=True,
        )

    @cached_property
    def _file(self) -> Path:
        return resolve_weights(self.path, None if Path(self.path).expanduser().is_dir() else FILE)

    @cached_property
    def _words(self) -> Path:
        beside = self._file.parent
        if self.processor is None and files.has_words(beside):
            return beside
        return files.folder_of(self.processor or TOWERS, files.OF_WORDS)

    @cached_property
    def _network(self) -> _mps_cross.Network:
        from transformers import CLIPConfig

        if not (self._words / "config.json").is_file():
            raise UserError(f"{self._words}: no config.json of a CLIPModel, which says the towers' sizes")
        try:
            config = CLIPConfig.from_pretrained(str(self._words), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self._words}: no config.json of a CLIPModel ({first_line(error)})") from error
        network = _mps_cross.load(read_checkpoint(self._file), self._file, config, files.DTYPES[self.dtype])
        return network.requires_grad_(False).to(self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        return files.load_tokenizer(str(self._words))

    def _load_preprocess(self) -> Preprocess:
        side = self._network.clip.config.vision_config.image_size
        return Preprocess(files.load_processor(str(self._words), side))

    @cached_property
    def _condition(self) -> Float[Tensor, "1 M D"]:
        with torch.no_grad():
            return self._network.texts(self.tokens([self.condition]).to(self._device))[0]

    @cached_property
    def _texts(self) -> OrderedDict[str, tuple[Tensor, Tensor, Tensor]]:
        return OrderedDict()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids [N, L], cut at the text tower's length and padded to it with the end token: padding is attended to."""
        length = self._network.clip.config.text_config.max_position_embeddings
        made = self._tokenizer(list(prompts), truncation=True, max_length=length).input_ids
        padded = torch.full((len(made), length), self._tokenizer.eos_token_id)
        for row, ids in zip(padded, made, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return padded

    @torch.no_grad()
    def _text(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Token features [N L D], pooled ones [N D] and which tokens are read [N L]; distinct prompts are read once."""
        distinct = list(dict.fromkeys(prompts))
        new = [prompt for prompt in distinct if prompt not in self._texts]
        if new:
            words, pooled = self._network.texts(self.tokens(new).to(self._device))
            is_kept = self._network.kept(words, self._condition, self.threshold)
            self._texts.update(zip(new, zip(words, pooled, is_kept, strict=True), strict=True))
        for prompt in distinct:
            self._texts.move_to_end(prompt)
        words, pooled, is_kept = (torch.stack(part) for part in zip(*(self._texts[p] for p in prompts), strict=True))
        while len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return words, pooled, is_kept

    def _run(
        self, pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str], timestep: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        words, pooled, is_kept = self._text(prompts)
        return self._network.compare(self._network.images(pixels, words, is_kept), pooled)
