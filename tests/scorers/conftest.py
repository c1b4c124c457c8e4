"""Random-weight CLIP folders, built offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.recipes import train_scorer
from diffalign.scorers import _clip_files as files
from diffalign.scorers._step_clip import Modulation
from diffalign.sprites.scorer import clip, write_clip

PROMPTS = ["a small red circle", "two blue crosses", "a large green square", "a small red circle", "word " * 40]


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its initial value, or an error in norms, biases and positions would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module


def pictures(num: int = 5, side: int = 64) -> list[Image.Image]:
    """Noise over a ramp, of several sizes for a side of None-like 0."""
    rng = np.random.default_rng(0)
    sizes = [(side, side)] * num if side else [(64, 64), (90, 70), (48, 128), (200, 150), (64, 65)][:num]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def tensor(images: list[Image.Image]) -> torch.Tensor:
    """float32 [N, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def same_in_any_batch(
    made: Callable[..., Any], images: Sequence[Image.Image], prompts: Sequence[str], atol: float
) -> np.ndarray:
    """Scores depend neither on batch mates nor on their order; returns them. `made` takes a scorer's fields."""
    together = made().score(images, prompts)
    for size in (1, 3):
        turned = made(batch_size=size).score(images[::-1], prompts[::-1])[::-1]
        np.testing.assert_allclose(together, turned, atol=atol)
    return together


def same_under_autocast(made: Callable[[], Any], images: list[Image.Image], prompts: Sequence[str]) -> None:
    """A caller's autocast changes no bit of a scorer that is loaded and asked under it; images of one size."""
    alone = made()
    expected = alone.score(images, prompts), alone.score_tensor(tensor(images), prompts)
    with torch.autocast("cpu", torch.bfloat16):
        under = made()
        np.testing.assert_array_equal(under.score(images, prompts), expected[0])
        assert torch.equal(under.score_tensor(tensor(images), prompts), expected[1])


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """`train-scorer` is interrupted in place of that step, and must be."""
    train_step = train_scorer.train_step

    def cut(trainer: Any, batch: Any, number: int) -> dict[str, float]:
        if number == step:
            raise KeyboardInterrupt
        return train_step(trainer, batch, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_scorer, "train_step", cut)
        yield


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    write_clip(randomised(clip()), folder)
    return folder


def write_step(clip_folder: Path, folder: Path, modulation: Modulation | None = None) -> Path:
    """The same CLIP with a modulation beside it, at its initial values unless given."""
    loaded = files.load_clip(str(clip_folder))
    made = modulation or files.new_modulation(loaded)
    words = str(clip_folder)
    files.save_folder(folder, loaded, made, files.load_tokenizer(words), files.load_processor(words, 64))
    return folder


@pytest.fixture(scope="session")
def step_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step-aware folder whose modulation is random too."""
    torch.manual_seed(1)
    made = randomised(files.new_modulation(files.load_clip(str(clip_folder))), 2)
    assert isinstance(made, Modulation)
    return write_step(clip_folder, tmp_path_factory.mktemp("step"), made)
