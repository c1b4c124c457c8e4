"""PickScore: the published formula, every place its weights may lie in, the measured gap of the differentiable road."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffalign.registry import build
from diffalign.scorers import _open_clip
from diffalign.scorers._clip_pixels import Preprocess
from diffalign.types import UserError

from .conftest import same_in_any_batch, same_under_autocast
from .towers import (
    PROMPTS,
    clip_pixels,
    clip_tokenizer,
    nasty_pictures,
    pixels_of,
    reference_cosine,
    write_folder,
    write_hub,
    write_release,
    write_words,
)

STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pickscore"))


def scorer(path: Path, **fields: object) -> Any:
    return build("scorer", {"name": "pickscore", "path": str(path), "device": "cpu", **fields})


def expected() -> np.ndarray:
    tokens = clip_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    pixels = torch.stack([clip_pixels(image) for image in nasty_pictures()])
    return (torch.tensor(4.0).exp() * reference_cosine(pixels, tokens)).numpy()


def test_score_is_the_published_formula(folder: Path) -> None:
    scores = scorer(folder).score(nasty_pictures(), PROMPTS)
    np.testing.assert_allclose(scores, expected(), atol=3e-5)  # of about 10
    assert scores.std() > 1 and scores.dtype == np.float32


@pytest.mark.parametrize("name", ["model.safetensors", "released.pt", "open_clip.safetensors"])
def test_a_lone_weights_file_in_either_layout(name: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "model.safetensors":
        shutil.copy(folder / name, file)
    else:
        write_release(file)
    shutil.copy(folder / "config.json", tmp_path)
    made = scorer(file, processor=str(folder))
    np.testing.assert_allclose(made.score(nasty_pictures(), PROMPTS), expected(), atol=3e-5)
    assert made.info.version != scorer(folder).info.version


def test_a_file_without_a_config_is_of_the_published_sizes() -> None:
    config = _open_clip.clip_config("ViT-H-14")
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.intermediate_size, vision.patch_size, vision.hidden_act) == (5120, 14, "gelu")
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (config.projection_dim, text.vocab_size, text.max_position_embeddings) == (1024, 49408, 77)
    assert _open_clip.clip_config("ViT-L-14-quickgelu").vision_config.hidden_act == "quick_gelu"


def test_hub_ids_are_the_defaults(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = build("scorer", {"name": "pickscore", "device": "cpu"})
    with pytest.raises(UserError, match="yuvalkirstain/PickScore_v1: no local folder") as error:
        made.score(nasty_pictures(), PROMPTS)
    assert "\n" not in str(error.value)
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (bare / name).unlink()
    write_hub(tmp_path / "hub", "yuvalkirstain/PickScore_v1", bare)
    write_hub(tmp_path / "hub", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", write_words(tmp_path / "words"))
    local = scorer(bare)  # its tokenizer is the published one, too
    for one in (build("scorer", {"name": "pickscore", "device": "cpu"}), local):
        np.testing.assert_allclose(one.score(nasty_pictures(), PROMPTS), expected(), atol=3e-5)


def test_the_version_follows_weights_tokenizer_and_dtype(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    version = scorer(folder).info.version
    assert scorer(copy).info.version == version != scorer(copy, dtype="bfloat16").info.version
    apart = scorer(copy, processor=str(write_words(tmp_path / "words"))).info.version
    (tmp_path / "words" / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 31}}')
    assert scorer(copy, processor=str(tmp_path / "words")).info.version != apart
    state = load_file(copy / "model.safetensors")
    state["logit_scale"] += 1
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    info = scorer(copy).info
    assert info.version != version and info.name == "pickscore" and info.unit.startswith("logit")


def gaps(image: Image.Image) -> torch.Tensor:
    """Levels of 255 between the two roads, at the 224 pixels of the real towers."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": 224, "width": 224}
    preprocess = Preprocess(CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=size))
    exact, smooth = preprocess.pictures([image]), preprocess.tensor(pixels_of([image])[0], "antialiased")
    return (exact - smooth).abs() * STD * 255


@pytest.mark.parametrize("size", [(512, 512), (768, 512), (100, 300), (224, 200), (224, 224)])
@pytest.mark.parametrize("kind", ["gradient", "checker", "noise"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_differentiable_road_is_within_a_level(size: tuple[int, int], kind: str, mode: str) -> None:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    if kind == "gradient":
        array = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    elif kind == "checker":
        array = np.repeat((((x // 16 + y // 16) % 2) * 255)[..., None], 3, -1)
    else:
        rough = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        array = np.asarray(Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC))
    levels = gaps(Image.fromarray(array.astype(np.uint8)).convert(mode))
    assert levels.max() <= 1.01 and levels.mean() <= 0.06


def test_score_tensor_follows_score_and_has_a_gradient(folder: Path) -> None:
    made = scorer(folder)
    images = nasty_pictures()
    for index in (0, 1, 4, 5):  # the white noise of the others is no picture
        given = pixels_of([images[index]])[0].requires_grad_()
        tensor_score = made.score_tensor(given, [PROMPTS[index]])
        exact = made.score([images[index]], [PROMPTS[index]])
        assert abs(float(tensor_score.detach()[0]) - float(exact[0])) < (1e-4 if index == 0 else 0.05)
        tensor_score.sum().backward()
        assert given.grad is not None and given.grad.norm() > 0


def test_scores_depend_neither_on_batch_nor_on_order(folder: Path) -> None:
    images, prompts = nasty_pictures() * 2, PROMPTS * 2
    together = same_in_any_batch(partial(scorer, folder), images, prompts, 3e-5)
    np.testing.assert_allclose(together[:7], together[7:], atol=3e-5)
    assert abs(together[0] - together[4]) > 0  # the same prompt, another picture


def test_a_picture_too_narrow_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="20000 x 100 pixels is too narrow"):
        scorer(folder).score([Image.new("RGB", (20_000, 100))], ["x"])
    assert np.isfinite(scorer(folder).score([Image.new("RGB", (2000, 20))], ["x"])).all()


def test_wrong_weights_are_listed(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state | {"head.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(visual_projection.weight\); 1 unexpected \(head.weight\)"):
        scorer(tmp_path / "other.safetensors", processor=str(folder)).score(nasty_pictures(), PROMPTS)
    with pytest.raises(UserError, match="no such weights file"):
        scorer(tmp_path / "none.safetensors")


def test_a_callers_autocast_changes_nothing(folder: Path) -> None:
    same_under_autocast(partial(scorer, folder), nasty_pictures()[:1], PROMPTS[:1])
