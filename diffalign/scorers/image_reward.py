"""ImageReward v1.0 (arXiv 2304.05977): a BLIP that reads the prompt while it looks, standardised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffalign.scorers import _blip
from diffalign.scorers._batched import BatchedScorer
from diffalign.scorers._checkpoint import file_fingerprint, local_weights, read_checkpoint, resolve_weights
from diffalign.scorers._clip_files import DTYPES, OF_WORDS, folder_of
from diffalign.scorers._clip_pixels import Preprocess, clip_processor
from diffalign.types import ScorerInfo, UserError

FILE, CONFIG = "ImageReward.pt", "med_config.json"
WORDS = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class ImageReward(BatchedScorer):
    """The released reward, (mlp(BLIP(image, prompt)) - 0.167) / 1.033; weights are read at the first score.

    A checkpoint of the same architecture trained by others (VP-Score's recipe) loads the same way.

    path: the weights file, a folder with ImageReward.pt, or a hub id, with :file where it is called otherwise. Default:
        the release.
    tokenizer: a folder or hub id of bert-base-uncased's tokenizer. Default: the weights' folder, if it holds one, else
        google-bert/bert-base-uncased.
    config: BLIP's med_config.json. Default: the one beside the weights; without one, heads are 64 wide as published.

    The other fields are those of `BatchedScorer`.

    Raises:
        UserError: no such file, another network's weights, no tokenizer.
    """

    path: str = "zai-org/ImageReward"
    tokenizer: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        local_weights(self.path, FILE)

    @cached_property
    def info(self) -> ScorerInfo:
        """The version is a hash of weights, config, tokenizer and settings."""
        words = folder_of(self._words, OF_WORDS)
        names = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
        files = [self._file, self._config, *(words / name for name in names)]
        facts = [file_fingerprint(file) for file in files if file is not None and file.is_file()]
        return ScorerInfo(
            name="image_reward",
            version=hashlib.blake2b(repr((*facts, self.dtype)).encode(), digest_size=8).hexdigest(),
            inputs=("image", "prompt"),
            unit="reward, standardised to mean 0 and deviation 1 as published",
            expected_range=(-5.0, 5.0),
            differentiable=True,
        )

    @cached_property
    def _file(self) -> Path:
        return resolve_weights(self.path, FILE)

    @cached_property
    def _config(self) -> Path | None:
        beside = self._file.parent / CONFIG
        return Path(self.config).expanduser() if self.config else beside if beside.is_file() else None

    @property
    def _words(self) -> str:
        folder = self._file.parent
        is_there = any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
        return self.tokenizer or (str(folder) if is_there else WORDS)

    @cached_property
    def _network(self) -> _blip.Blip:
        tensors = read_checkpoint(self._file)
        network = _blip.load(tensors, self._file, self._config, DTYPES[self.dtype])
        return network.requires_grad_(False).to(self._device)

    @cached_property
    def _tokenizer(self) -> Any:
        words = _blip.load_tokenizer(self._words)
        vocabulary = self._network.text.config.vocab_size
        if len(words) != vocabulary:
            raise UserError(
                f"{self._words}: has {len(words) - 2} wordpieces and the weights know {vocabulary - 2}; name"
                " bert-base-uncased's tokenizer as `tokenizer`"
            )
        return words

    def _load_preprocess(self) -> Preprocess:
        return Preprocess(clip_processor(self._network.side), "torchvision")

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [N, 35]: [CLS] first, cut and padded to 35 wordpieces, as released."""
        made = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_blip.WORDPIECES, return_tensors="pt"
        )
        return made.input_ids, made.attention_mask

    def _run(
        self, pixels: Float[Tensor, "N 3 S S"], prompts: Sequence[str], timestep: Float[Tensor, " N"] | None
    ) -> Float[Tensor, " N"]:
        tokens, mask = self.tokens(prompts)
        return self._network(pixels, tokens.to(self._device), mask.to(self._device))
