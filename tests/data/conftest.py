"""Tiny data sets in every layout and a fixed encoder that gives an image the same numbers in every batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.types import Record


class FakeEncoder:
    """Latents are fixed mixes of 4 x 4 pixel means, texts fixed numbers of the caption's hash."""

    vae_factor, latent_channels = 4, 4

    def __init__(self, vae: str = "v1", text: str = "t1", std: float = 0.1) -> None:
        self.marks = {"vae": vae, "text": text}
        self.std = std
        self.num_images = self.num_prompts = 0

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.num_images += len(pixels)
        small = pixels.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
        red, green, blue = small.unbind(1)
        mean = torch.stack([red, green - 0.5 * blue, blue + 0.3 * red, red * green], 1)
        return mean, self.std * (1 + mean.abs())

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self.num_prompts += len(prompts)
        rows = [np.frombuffer(hashlib.sha256(p.encode()).digest(), np.uint8).astype(np.float32) for p in prompts]
        values = torch.from_numpy(np.stack(rows)) / 97
        return {"prompt_embeds": values.reshape(-1, 8, 4), "pooled": values[:, :5]}

    def empty_prompt(self) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.zeros(1, 8, 4), "pooled": torch.full((1, 5), 0.25)}

    def fingerprint(self, part: str) -> str:
        return self.marks[part]


class ListReader:
    """Records in memory, for tests of what stands behind a reader."""

    def __init__(self, records: Sequence[Any], mark: str = "list") -> None:
        self.records, self.mark = list(records), mark

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        found = self.records[index]
        if isinstance(found, Exception):
            raise found
        return found

    def fingerprint(self) -> str:
        return self.mark


def picture(seed: int, size: tuple[int, int] = (32, 32), form: str = "PNG") -> bytes:
    """An encoded picture of (height, width) with its own pixels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = BytesIO()
    coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


def record(
    number: int, prompt: str | None = None, num: int = 2, size: tuple[int, int] = (32, 32), **extra: Any
) -> Record:
    """A record whose first candidate is best."""
    images = tuple(picture(100 * number + k, size) for k in range(num))
    utility = tuple(float(num - 1 - k) for k in range(num))
    return Record(number + 1, prompt or f"prompt {number}", images, utility, **extra)


def write_pickapic(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int = 4) -> Path:
    """A Parquet file in Pick-a-Pic's columns; rows may override any of them."""
    full = [
        {"caption": f"p{i}", "jpg_0": picture(2 * i), "jpg_1": picture(2 * i + 1), "label_0": 1.0, "user_id": i} | row
        for i, row in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(full), path, row_group_size=row_group_size)
    return path


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One line per row; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_folders(root: Path, num: int) -> Path:
    """Mirrored folders of `num` pairs."""
    for side in "wl":
        (root / side).mkdir(parents=True)
    for i in range(num):
        (root / "w" / f"{i:03d}.png").write_bytes(picture(2 * i))
        (root / "l" / f"{i:03d}.jpg").write_bytes(picture(2 * i + 1, form="JPEG"))
        (root / "w" / f"{i:03d}.txt").write_text(f"p{i}\n")
    return root


def tree(folder: Path) -> dict[str, bytes]:
    """Relative name -> content of every file, temporary ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def kit() -> Any:
    """The helpers above, as attributes."""
    names: dict[str, Callable[..., Any]] = {
        "Encoder": FakeEncoder, "ListReader": ListReader, "picture": picture, "record": record, "tree": tree,
        "pickapic": write_pickapic, "jsonl": write_jsonl, "folders": write_folders,
    }  # fmt: skip
    return type("Kit", (), {name: staticmethod(function) for name, function in names.items()})


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.data._progress.SILENT", 1e9)
    os.environ["OMP_NUM_THREADS"] = "1"
