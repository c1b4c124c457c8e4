"""The conditioning of a fixed list of prompts, encoded once into the text store that data sets use too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from diffalign.data._batch import as_floats
from diffalign.data._build import text_folder
from diffalign.data._reader import caption_key
from diffalign.data._shard import OpenShards, tensor
from diffalign.data._text import EMPTY, build_text, embedding_names, wait_for_text


class PromptCond:
    """Rows of conditioning by the prompts' places in the list, at the model's own resolution, uncropped.

    Float32, rounded to `dtype`: autocast to bfloat16 joins no float16 rows (cond and uncond, for guidance).

    Every process calls the constructor and encodes its share; all return when the whole is there.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        model: Any,
        cache_dir: Path | str,
        *,
        dtype: str = "float16",
        batch_size: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.prompts, self._model = prompts, model
        self._folder = text_folder(Path(cache_dir), model, dtype)
        self._folder.mkdir(parents=True, exist_ok=True)
        build_text(
            self._folder,
            prompts,
            model,
            dtype=dtype,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            hint="for the prompts' embeddings",
        )
        self._store = wait_for_text(self._folder, prompts)
        self._open = OpenShards()

    def cond(self, places: Int64[Tensor, " n"]) -> dict[str, Tensor]:
        """Rows [n, ...] of the prompts at these places."""
        keys = np.array([caption_key(self.prompts[place]) for place in places.tolist()])
        rows: list[Mapping[str, Tensor]] = []
        for shard, row in self._store.locate(keys).tolist():
            opened = self._open[self._folder / self._store.shards[shard]]
            rows.append({name: as_floats(tensor(opened.rows(name, row, 1))) for name in embedding_names(opened)})
        text = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        return text | self._size(len(places))

    def uncond(self, num: int) -> dict[str, Tensor]:
        """Rows [num, ...] of what inference takes as unconditional."""
        shard = self._open[self._folder / EMPTY]
        text = {name: as_floats(tensor(shard.rows(name, 0, 1))) for name in embedding_names(shard)}
        return {name: value.expand(num, *value.shape[1:]) for name, value in text.items()} | self._size(num)

    def _size(self, num: int) -> dict[str, Tensor]:
        size = torch.tensor(self._model.resolution).expand(num, 2)
        return dict(self._model.size_cond(size, torch.zeros_like(size), size))
