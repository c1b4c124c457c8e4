"""Lambda-Harmonic: the closed form, ALIGN, CLIP and DINO as encoders, the references, the identifier."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.registry import build
from diffalign.scorers.lambda_harmonic import harmonic, without
from diffalign.types import UserError

from .conftest import randomised, same_in_any_batch
from .towers import (
    PROMPTS,
    clip_pixels,
    clip_tokenizer,
    nasty_pictures,
    pixels_of,
    reference_image,
    reference_text,
    write_folder,
)

SIDE = 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "photo", "of", "cat", "red", "[V]", "v", "[", "]"]


def write_align(folder: Path) -> Path:
    """A tiny ALIGN with random weights, and its processor at 40 pixels."""
    from transformers import AlignConfig, AlignModel, BertTokenizer
    from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

    text = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 48, "max_position_embeddings": 64}
    vision = {"image_size": SIDE, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 24}
    vision |= {"kernel_sizes": [3, 3], "in_channels": [16, 16], "out_channels": [16, 80], "strides": [1, 2]}
    vision |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 2]}
    torch.manual_seed(0)
    model = AlignModel(AlignConfig(text_config=text, vision_config=vision, projection_dim=24))
    randomised(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics become those of these pictures, or features would hardly differ
    with torch.no_grad():
        model.train().vision_model(pixel_values=2 * torch.rand(8, 3, SIDE, SIDE) - 1)
    folder.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    EfficientNetImageProcessorPil(
        size=size, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False, resample=2
    ).save_pretrained(folder)
    return folder


def write_dino(folder: Path) -> Path:
    """A tiny vision transformer as DINO's, and its processor."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False)
    randomised(model, 1).eval().save_pretrained(folder)  # type: ignore[operator]
    ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3).save_pretrained(folder)
    return folder


def references() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    made = [Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((50, 44)) for _ in range(3)]
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harmonic")
    write_align(folder / "align")
    write_folder(folder / "clip")
    write_dino(folder / "dino")
    (folder / "refs").mkdir()
    for number, image in enumerate(references()):
        image.save(folder / "refs" / f"{2 - number}.png")  # the order of names is not that of writing
    (folder / "refs" / "notes.txt").write_text("no picture")
    return folder


def scorer(folders: Path, encoder: str = "align", **fields: object) -> Any:
    spec = {"name": "lambda_harmonic", "path": str(folders / encoder), "device": "cpu"}
    return build("scorer", spec | {"references": str(folders / "refs")} | fields)


def align_features(folders: Path, images: list[Image.Image], prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of pictures and texts, by transformers' AlignModel and Pillow."""
    from transformers import AlignModel, AutoTokenizer

    model = AlignModel.from_pretrained(folders / "align").eval()
    resized = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in resized]).permute(0, 3, 1, 2) / 127.5 - 1
    words = AutoTokenizer.from_pretrained(folders / "align")
    tokens = words(prompts, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        made = model(pixel_values=pixels, **tokens)
    return made.image_embeds, made.text_embeds


def by_hand(seen: torch.Tensor, told: torch.Tensor, own: torch.Tensor, weight: float) -> np.ndarray:
    """Of features of unit length: I of every reference, T, and their weighted harmonic mean."""
    image_term = ((own @ seen.T).mean(1) + 1) / 2
    text_term = ((own * told).sum(1) + 1) / 2
    return (1 / (weight / (image_term + 1e-8) + (1 - weight) / (text_term + 1e-8))).numpy()


def test_the_closed_form() -> None:
    expected = {
        0.0: (0.55, 0.70),
        0.3: (0.615131589275, 0.684210536328),
        0.5: (0.667857153316, 0.674074084088),
        0.7: (0.730468760461, 0.664233586654),
        1.0: (0.85, 0.65),
    }
    seen, told = torch.tensor([0.85, 0.65], dtype=torch.float64), torch.tensor([0.55, 0.70], dtype=torch.float64)
    for weight, values in expected.items():
        np.testing.assert_allclose(harmonic(seen, told, weight).numpy(), values, atol=1e-12)
    assert harmonic(seen, told, 1.0) is seen and harmonic(seen, told, 0.0) is told


def test_monotone_symmetric_and_at_most_the_arithmetic_mean() -> None:
    seen, told = torch.rand(2, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    for weight in (0.1, 0.5, 0.8):
        made = harmonic(seen, told, weight)
        assert (harmonic(seen + 0.01, told, weight) > made).all() and (harmonic(seen, told + 0.01, weight) > made).all()
        torch.testing.assert_close(made, harmonic(told, seen, 1 - weight))
        assert (made <= weight * seen + (1 - weight) * told + 1e-7).all()
        assert (made >= torch.minimum(seen, told) - 1e-7).all() and (made <= torch.maximum(seen, told) + 1e-7).all()


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("a photo of [V] dog", "a photo of dog"),
        ("[V] dog,  [V]!", "dog, !"),
        ("no   name  here", "no   name  here"),
        ("a[V]b", "a[V]b"),
        ("", ""),
    ],
)
def test_the_identifier_is_taken_out(prompt: str, left: str) -> None:
    assert without("[V]", prompt) == left
    assert without("", prompt) == prompt
    assert without("sks", "a sks dog and sksy") == "a dog and sksy"


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.7, 1.0])
def test_align_is_compared_as_published(weight: float, folders: Path) -> None:
    prompts = ["a photo of [V] dog", "a red cat", "", "dog " * 500, "a dog", "\N{GRINNING FACE}", "red"]
    own, told = align_features(folders, nasty_pictures(), [without("[V]", prompt) for prompt in prompts])
    seen, _ = align_features(folders, references(), ["a"])
    scores = scorer(folders, image_weight=weight).score(nasty_pictures(), prompts)
    np.testing.assert_allclose(scores, by_hand(seen, told, own, weight), atol=1e-5)
    assert scores.std() > 1e-4 and (0 <= scores).all() and (scores <= 1).all()


def test_any_clip_will_do(folders: Path) -> None:
    tokens = clip_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids

    def unit(images: list[Image.Image]) -> torch.Tensor:
        return F.normalize(reference_image(torch.stack([clip_pixels(image) for image in images])), dim=-1)

    told = F.normalize(reference_text(tokens), dim=-1)
    expected = by_hand(unit(references()), told, unit(nasty_pictures()), 0.3)
    np.testing.assert_allclose(scorer(folders, "clip").score(nasty_pictures(), PROMPTS), expected, atol=1e-5)


def test_dino_may_look_at_the_pictures(folders: Path) -> None:
    from transformers import ViTModel

    model = ViTModel.from_pretrained(folders / "dino", add_pooling_layer=False).eval()

    def dino(images: list[Image.Image]) -> torch.Tensor:
        resized = [image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in resized]).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            return F.normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)

    own, told = align_features(folders, nasty_pictures(), ["a dog"] * 7)
    image_term = ((dino(nasty_pictures()) @ dino(references()).T).mean(1) + 1) / 2
    text_term = ((own * told).sum(1) + 1) / 2
    made = scorer(folders, image_tower=str(folders / "dino"), image_weight=0.5)
    expected = harmonic(image_term, text_term, 0.5).numpy()
    np.testing.assert_allclose(made.score(nasty_pictures(), ["a dog"] * 7), expected, atol=1e-5)
    assert made.info.version != scorer(folders, image_weight=0.5).info.version


def test_a_reference_is_not_compared_with_itself(folders: Path) -> None:
    images = references()
    features, told = align_features(folders, images, ["a dog"] * 3)
    made = scorer(folders, image_weight=0.5)
    scores = made.score(images, ["a dog"] * 3)
    tensors = torch.cat([made.score_tensor(pixels, ["a dog"]) for pixels in pixels_of(images)]).numpy()
    for index in range(3):
        others = [other for other in range(3) if other != index]
        expected = by_hand(features[others], told[index : index + 1], features[index : index + 1], 0.5)[0]
        assert abs(scores[index] - expected) < 1e-5 and abs(tensors[index] - expected) < 5e-3
        with_itself = by_hand(features, told[index : index + 1], features[index : index + 1], 0.5)[0]
        assert abs(with_itself - expected) > 1e-3, "the random features must tell the two apart"


def test_the_only_reference_cannot_be_judged(folders: Path, tmp_path: Path) -> None:
    references()[0].save(tmp_path / "only.png")
    made = scorer(folders, references=str(tmp_path))
    assert made.score(references()[1:2], ["a dog"]).shape == (1,)
    with pytest.raises(ValueError, match="is the only reference itself"):
        made.score(references()[:1], ["a dog"])


def test_score_tensor_follows_score_and_has_a_gradient(folders: Path) -> None:
    for fields in ({}, {"image_tower": str(folders / "dino")}):
        made = scorer(folders, **fields)
        for index in (1, 4, 5):
            given = pixels_of(nasty_pictures())[index].requires_grad_()
            value = made.score_tensor(given, ["a red dog"])
            exact = made.score([nasty_pictures()[index]], ["a red dog"])
            assert abs(float(value.detach()[0]) - exact[0]) < 2e-3
            value.sum().backward()
            assert given.grad is not None and given.grad.norm() > 0


def test_scores_depend_neither_on_batch_nor_on_order(folders: Path) -> None:
    images, prompts = (
        [*nasty_pictures(), references()[0]],
        ["a dog", "", "a red cat", "a dog", "of", "x", "cat", "a dog"],
    )
    same_in_any_batch(partial(scorer, folders), images, prompts, 1e-5)


def test_the_version_follows_references_and_settings(folders: Path, tmp_path: Path) -> None:
    info = scorer(folders).info
    assert info == scorer(folders).info and info.inputs == ("image", "prompt", "references")
    copy = Path(shutil.copytree(folders / "refs", tmp_path / "refs"))
    assert scorer(folders, references=str(copy)).info.version == info.version
    Image.new("RGB", (9, 9)).save(copy / "more.png")
    versions = {scorer(folders, references=str(copy)).info.version, scorer(folders, "clip").info.version}
    versions |= {scorer(folders, image_weight=0.5).info.version, scorer(folders, identifier="").info.version}
    assert len(versions | {info.version}) == 5


def test_each_bad_setting_is_one_line(folders: Path, tmp_path: Path) -> None:
    def refused(match: str, **fields: object) -> None:
        with pytest.raises(UserError, match=match) as error:
            scorer(folders, **fields).score(nasty_pictures()[:1], ["a dog"])
        assert "\n" not in str(error.value)

    refused("references=\\(not given\\): no folder with pictures", references="")
    refused("no folder with pictures", references=str(tmp_path))
    refused("image_weight must lie in", image_weight=1.5)
    refused("no such folder", path="nowhere")
    refused("model_type is 'vit'", path=str(folders / "dino"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    refused("broken.png: no readable picture", references=str(tmp_path))
    made = scorer(folders, references="", image_weight=0)  # the text term needs none
    assert made.score(nasty_pictures()[:1], ["a dog"]).shape == (1,)
