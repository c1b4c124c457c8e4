"""The conditioning of a prompt list: the model's own rows, encoded once, shared with data sets and processes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.data import PromptCond
from diffalign.data._text import BLOCK
from diffalign.registry import build
from diffalign.sampling import predict
from diffalign.types import UserError

PROMPTS = ("a red thing", "two things", "a red thing", "something blue")


class Letters:
    """An encoder that counts: a prompt's row is its length and its first letter."""

    resolution = (32, 48)
    vae_factor, latent_channels = 2, 4

    def __init__(self, scale: float = 1.0) -> None:
        self.encoded: list[str] = []
        self.scale = scale

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        self.encoded += prompts
        rows = [[float(len(prompt)), float(ord(prompt[0]))] for prompt in prompts]
        return {"text": torch.tensor(rows) * self.scale}

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        return {"text": torch.zeros(1, 2)}

    def size_cond(self, original: torch.Tensor, crop: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"size": torch.cat([original, crop, target], dim=1).float()}

    def fingerprint(self, part: str) -> str:
        return part


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_rows_are_the_models_own(family, tiny_folders, tmp_path):
    model: Any = build("model", {"name": family, "path": str(tiny_folders[family])}).load()
    rows = PromptCond(PROMPTS, model, tmp_path, dtype="float32")
    places = torch.tensor([3, 0, 2, 1, 0])
    size = torch.tensor(model.resolution).expand(5, 2)
    wanted = model.encode_prompts([PROMPTS[place] for place in places]) | model.size_cond(size, 0 * size, size)
    found = rows.cond(places)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-5, atol=1e-6)
    uncond = rows.uncond(3)
    for name, value in model.empty_prompt().items():
        assert torch.equal(uncond[name], value.expand(3, *value.shape[1:]))
    # what is sampled with it is what was asked for, in the cache's dtype too
    half = PromptCond(PROMPTS, model, tmp_path)
    xt, t = torch.randn(5, *model.latent_shape(*model.resolution)), torch.full((5,), 0.5)
    with torch.no_grad():
        exact = model(xt, t, wanted)
        torch.testing.assert_close(model(xt, t, found), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(xt, t, half.cond(places)), exact, rtol=0, atol=1e-2)
        assert model(xt, t, rows.uncond(5)).isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which joins float32 rows, and no float16 ones
            both = predict(model, xt, t, half.cond(places), half.uncond(5), 3.0)
    assert both.isfinite().all()
    assert all(value.dtype == torch.float32 for value in (*half.cond(places).values(), *half.uncond(1).values()))


def test_prompts_are_encoded_once(tmp_path):
    first, second = Letters(), Letters()
    PromptCond(PROMPTS, first, tmp_path)
    assert first.encoded == list(dict.fromkeys(PROMPTS))
    rows = PromptCond((*PROMPTS, "more"), second, tmp_path)
    assert second.encoded == ["more"]
    assert rows.cond(torch.tensor([4, 1]))["text"].tolist() == [[4, ord("m")], [10, ord("t")]]
    assert rows.cond(torch.tensor([1]))["size"].tolist() == [[32, 48, 0, 0, 32, 48]]
    assert rows.uncond(2)["text"].tolist() == [[0, 0]] * 2 and rows.uncond(2)["size"].shape == (2, 6)


def test_processes_share_the_work(tmp_path):
    prompts = [f"{number} things" for number in range(BLOCK + 5)]
    encoders, found = [Letters(), Letters()], [None, None]

    def work(rank: int) -> None:
        rows = PromptCond(prompts, encoders[rank], tmp_path, rank=rank, world_size=2)
        found[rank] = rows.cond(torch.arange(len(prompts)))["text"]

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(encoders[0].encoded + encoders[1].encoded) == sorted(prompts)
    assert len(encoders[0].encoded) == BLOCK and found[0] is not None and torch.equal(found[0], found[1])
    assert found[0][:, 0].tolist() == [len(prompt) for prompt in prompts]


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="leave the range of float16"):
        PromptCond(PROMPTS, Letters(scale=1e6), tmp_path)
    assert PromptCond(PROMPTS, Letters(scale=1e6), tmp_path, dtype="float32").cond(torch.tensor([1]))


def test_a_data_sets_captions_are_found(tmp_path):
    """The store is the one of recorded preferences: prompts of a data set are not encoded again."""
    from diffalign.data._build import text_folder

    encoder = Letters()
    PromptCond(PROMPTS, encoder, tmp_path)
    folders = [path.name for path in Path(tmp_path).iterdir()]
    assert folders == [text_folder(tmp_path, encoder, "float16").name]  # type: ignore[arg-type]
