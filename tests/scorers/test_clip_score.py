"""CLIPScore's variants: each one's formula, prefix, tokenizer and activation."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.registry import build
from diffalign.scorers import clip_score
from diffalign.types import UserError

from .conftest import same_in_any_batch
from .towers import (
    PROMPTS,
    clip_pixels,
    clip_tokenizer,
    nasty_pictures,
    odd_margins,
    pixels_of,
    reference_cosine,
    torchvision_pixels,
    write_architecture,
    write_folder,
    write_release,
    write_words,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip"))


def scorer(path: Path | str, variant: str = "l14", **fields: object) -> Any:
    spec = {"name": "clip_score", "path": str(path), "variant": variant, "device": "cpu"}
    return build("scorer", spec | fields)


def cosine(prompts: list[str], has_openai_words: bool = False, quick_gelu: bool = False) -> np.ndarray:
    import open_clip

    road = torchvision_pixels if has_openai_words else clip_pixels
    pixels = torch.stack([road(image) for image in nasty_pictures()])
    if has_openai_words:
        tokens = open_clip.tokenize(prompts)
    else:
        tokens = clip_tokenizer()(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").input_ids
    return reference_cosine(pixels, tokens, quick_gelu=quick_gelu).numpy()


@pytest.mark.parametrize("variant", ["l14", "b16", "h14-laion", "torchmetrics"])
def test_most_variants_are_a_hundred_cosines(variant: str, folder: Path) -> None:
    made = scorer(folder, variant)
    np.testing.assert_allclose(made.score(nasty_pictures(), PROMPTS), 100 * cosine(PROMPTS), atol=1e-4)
    assert made.info.unit == "cosine x 100" and made.info.name == "clip_score"


def test_hessels_has_a_prefix_openais_words_and_no_negative_scores(folder: Path) -> None:
    prompts = [*PROMPTS[:-1], "\N{LATIN SMALL LIGATURE FI}sh &amp;amp; chips"]  # the tokenizers differ
    expected = 2.5 * cosine(["A photo depicts " + prompt for prompt in prompts], has_openai_words=True)
    assert (expected < 0).any() and (expected > 0).any(), "the random network must give both"
    made = scorer(folder, "hessel")
    np.testing.assert_allclose(made.score(nasty_pictures(), prompts), expected.clip(0), atol=1e-5)
    assert "2.5" in made.info.unit


def test_hessels_crops_as_torchvision_and_the_others_as_transformers(folder: Path) -> None:
    for image in odd_margins():
        for variant in clip_score.VARIANTS:
            pixels = scorer(folder, variant)._preprocess.pictures([image])[0]
            wanted = torchvision_pixels(image) if variant == "hessel" else clip_pixels(image)
            np.testing.assert_allclose(pixels, wanted, atol=1e-6)


def test_each_variant_has_a_version_of_its_own(folder: Path) -> None:
    versions = {scorer(folder, variant).info.version for variant in clip_score.VARIANTS}
    assert len(versions) == len(clip_score.VARIANTS)
    assert scorer(folder).info == scorer(folder).info


def test_a_lone_file_gets_the_variants_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's weights need QuickGELU, and load without complaint into a network that has another."""
    file = write_release(tmp_path / "ViT-L-14.pt")
    words = str(write_words(tmp_path / "words"))
    for quick in (True, False):
        tiny = clip_score.L14._replace(architecture=write_architecture(tmp_path, quick))
        monkeypatch.setitem(clip_score.VARIANTS, "l14", tiny)
        scores = scorer(file, processor=words).score(nasty_pictures(), PROMPTS)
        np.testing.assert_allclose(scores, 100 * cosine(PROMPTS, quick_gelu=quick), atol=1e-4)
        assert np.abs(scores - 100 * cosine(PROMPTS, quick_gelu=not quick)).max() > 0.1
    assert all(
        variant.architecture.endswith("quickgelu") == variant.hub.startswith("openai/")
        for name, variant in clip_score.VARIANTS.items()
        if name != "l14"
    )


def test_only_the_first_77_tokens_count(folder: Path) -> None:
    made, image = scorer(folder), nasty_pictures()[:1]
    long = "one two three four five " * 15  # 75 tokens fit between start and end
    assert made.score(image, [long])[0] == made.score(image, [long + "and much more that nobody reads"])[0]
    assert made.score(image, [long])[0] != made.score(image, [long[:-6]])[0]


def test_score_tensor_follows_score_and_has_a_gradient(folder: Path) -> None:
    for variant in ("l14", "hessel"):
        made = scorer(folder, variant)
        images, prompts = nasty_pictures(), PROMPTS
        exact = made.score(images, prompts)
        for index in range(7):
            given = pixels_of(images)[index].requires_grad_()
            value = made.score_tensor(given, [prompts[index]])
            assert abs(float(value.detach()[0]) - exact[index]) < 0.1 * (1 if variant == "l14" else 0.03)
            value.sum().backward()
            assert given.grad is not None and (given.grad.norm() > 0) == bool(exact[index] != 0)


def test_scores_depend_neither_on_batch_nor_on_order(folder: Path) -> None:
    same_in_any_batch(partial(scorer, folder), nasty_pictures(), PROMPTS, 1e-4)
    assert scorer(folder).score([], []).shape == (0,)


def test_its_short_name_and_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for variant, hub in (("l14", "openai/clip-vit-large-patch14"), ("hessel", "openai/clip-vit-base-patch32")):
        made = build("scorer", {"name": "clip", "variant": variant})
        with pytest.raises(UserError, match=f"{hub}: no local folder"):
            made.score(nasty_pictures()[:1], ["x"])
    with pytest.raises(UserError, match="variant"):
        build("scorer", {"name": "clip", "variant": "l15"})


@pytest.mark.slow
@pytest.mark.skipif("DIFFALIGN_WEIGHTS" not in os.environ, reason="needs the weights folder DIFFALIGN_WEIGHTS")
def test_the_published_values_of_hessels() -> None:
    """The release's two example pictures: mean 0.8584 with the good captions, 0.7153 with the bad ones."""
    folder = Path(os.environ["DIFFALIGN_WEIGHTS"]) / "clipscore"
    if not (folder / "clip-vit-base-patch32").is_dir() or not (folder / "good_captions.json").is_file():
        pytest.skip("DIFFALIGN_WEIGHTS/clipscore holds no clip-vit-base-patch32 or none of the release's examples")
    import json

    made = scorer(folder / "clip-vit-base-patch32", "hessel")
    for name, mean in (("good", 0.8584), ("bad", 0.7153)):
        captions = json.loads((folder / f"{name}_captions.json").read_text())
        images = []
        for key in captions:
            with Image.open(folder / f"{key}.jpg") as image:
                images.append(image.convert("RGB"))
        assert abs(float(made.score(images, list(captions.values())).mean()) - mean) < 2e-3
