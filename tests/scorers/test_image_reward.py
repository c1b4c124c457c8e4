"""ImageReward: against a plain-torch ViT and BERT, the released file's names, the 35-wordpiece cut, wrong files."""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.registry import build
from diffalign.scorers._clip_pixels import Preprocess, clip_processor
from diffalign.types import UserError

from .conftest import PROMPTS, pictures, same_in_any_batch, same_under_autocast, tensor

WIDTH, HIDDEN, HEADS, SIDE, PATCH, VISION_LAYERS, TEXT_LAYERS = 128, 64, 2, 32, 8, 2, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "word", "red", "circle", "small", ",", *LETTERS[1:]]
VOCABULARY = [*WORDS, *(f"##{letter}" for letter in LETTERS)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def released() -> dict[str, Tensor]:
    """A tiny checkpoint under the released file's names; every tensor is random, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 0.2, centre: float = 0.0) -> None:
        made[name] = centre + scale * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, of: int) -> None:
        add(f"{name}.weight", out, of, scale=1.5 / of**0.5)
        add(f"{name}.bias", out)

    def norm(name: str, size: int) -> None:
        add(f"{name}.weight", size, centre=1.0)
        add(f"{name}.bias", size)

    see, read = "blip.visual_encoder.", "blip.text_encoder."
    add(f"{see}cls_token", 1, 1, WIDTH)
    add(f"{see}pos_embed", 1, (SIDE // PATCH) ** 2 + 1, WIDTH)
    add(f"{see}patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH)
    add(f"{see}patch_embed.proj.bias", WIDTH)
    for layer in range(VISION_LAYERS):
        at = f"{see}blocks.{layer}."
        norm(f"{at}norm1", WIDTH)
        norm(f"{at}norm2", WIDTH)
        linear(f"{at}attn.qkv", 3 * WIDTH, WIDTH)
        linear(f"{at}attn.proj", WIDTH, WIDTH)
        linear(f"{at}mlp.fc1", 2 * WIDTH, WIDTH)
        linear(f"{at}mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{see}norm", WIDTH)
    add(f"{read}embeddings.word_embeddings.weight", len(VOCABULARY) + 2, HIDDEN, scale=1.0)
    add(f"{read}embeddings.position_embeddings.weight", 64, HIDDEN)
    norm(f"{read}embeddings.LayerNorm", HIDDEN)
    made[f"{read}embeddings.position_ids"] = torch.arange(64)[None]
    for layer in range(TEXT_LAYERS):
        at = f"{read}encoder.layer.{layer}."
        for what, of in (("attention", HIDDEN), ("crossattention", WIDTH)):
            linear(f"{at}{what}.self.query", HIDDEN, HIDDEN)
            linear(f"{at}{what}.self.key", HIDDEN, of)
            linear(f"{at}{what}.self.value", HIDDEN, of)
            linear(f"{at}{what}.output.dense", HIDDEN, HIDDEN)
            norm(f"{at}{what}.output.LayerNorm", HIDDEN)
        linear(f"{at}intermediate.dense", 2 * HIDDEN, HIDDEN)
        linear(f"{at}output.dense", HIDDEN, 2 * HIDDEN)
        norm(f"{at}output.LayerNorm", HIDDEN)
    linear("blip.vision_proj", 16, WIDTH)
    linear("blip.text_proj", 16, HIDDEN)
    sizes = (HIDDEN, 1024, 128, 64, 16, 1)
    for index, (of, out) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:], strict=False), strict=True):
        linear(f"mlp.layers.{index}", out, of)
    return made


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return released()


@pytest.fixture(scope="module")
def folder(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, made / "ImageReward.pt")
    (made / "med_config.json").write_text(json.dumps({"num_attention_heads": HEADS, "layer_norm_eps": 1e-12}))
    (made / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return made


def scorer(folder: Path, **fields: object) -> object:
    return build("scorer", {"name": "image-reward", "path": str(folder), "device": "cpu", **fields})


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mask = None if mask is None else mask.bool()[:, None, None]
    out = F.scaled_dot_product_attention(split(query), split(key), split(value), attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def reference(w: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """The reward from torch's functions and the released names alone."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    see, read = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels, w[f"{see}patch_embed.proj.weight"], w[f"{see}patch_embed.proj.bias"], PATCH)
    x = torch.cat([w[f"{see}cls_token"].expand(len(x), 1, -1), x.flatten(2).mT], 1) + w[f"{see}pos_embed"]
    for layer in range(VISION_LAYERS):
        at = f"{see}blocks.{layer}."
        q, k, v = linear(norm(x, f"{at}norm1", eps), f"{at}attn.qkv").chunk(3, -1)
        x = x + linear(attend(q, k, v, WIDTH // 64), f"{at}attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{at}norm2", eps), f"{at}mlp.fc1")), f"{at}mlp.fc2")
    patches = norm(x, f"{see}norm", eps)
    t = F.embedding(ids, w[f"{read}embeddings.word_embeddings.weight"])
    t = norm(
        t + w[f"{read}embeddings.position_embeddings.weight"][: ids.shape[1]], f"{read}embeddings.LayerNorm", 1e-12
    )
    for layer in range(TEXT_LAYERS):
        at = f"{read}encoder.layer.{layer}."
        for what, context, seen in (("attention", None, mask), ("crossattention", patches, None)):
            name, of = f"{at}{what}.", t if context is None else context
            parts = (linear(t, f"{name}self.query"), linear(of, f"{name}self.key"), linear(of, f"{name}self.value"))
            out = linear(attend(*parts, HEADS, seen), f"{name}output.dense")
            t = norm(t + out, f"{name}output.LayerNorm", 1e-12)
        out = linear(F.gelu(linear(t, f"{at}intermediate.dense")), f"{at}output.dense")
        t = norm(t + out, f"{at}output.LayerNorm", 1e-12)
    score = t[:, 0]
    for index in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{index}")
    return (score[:, 0] - 0.16717362830052426) / 1.0333394966054072


def ids_by_hand(prompt: str, words: int = 35) -> tuple[list[int], list[int]]:
    """WordPiece of our vocabulary: whole words it has, letters else; [CLS] ... [SEP], cut and padded."""
    pieces = []
    for word in prompt.split():
        pieces += [word] if word in VOCABULARY else [word[0], *(f"##{letter}" for letter in word[1:])]
    found = [VOCABULARY.index(piece) for piece in ["[CLS]", *pieces[: words - 2], "[SEP]"]]
    return found + [0] * (words - len(found)), [1] * len(found) + [0] * (words - len(found))


def normalised(images: list[Image.Image]) -> Tensor:
    """CLIP's preprocessing from Pillow, as torchvision rounds an odd margin."""
    rows = []
    for image in images:
        short = min(image.size)
        width, height = (int(SIDE * length / short) for length in image.size)
        left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
        cut = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        rows.append(tensor([cut.crop((left, top, left + SIDE, top + SIDE))])[0])
    return (torch.stack(rows) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_score_is_the_released_formula(folder: Path, weights: dict[str, Tensor]) -> None:
    images, made = pictures(side=0), scorer(folder)
    ids, masks = zip(*(ids_by_hand(prompt) for prompt in PROMPTS), strict=True)
    args = normalised(images), torch.tensor(ids), torch.tensor(masks)
    expected = reference(weights, *args)
    assert expected.std() > 0.1  # or the comparison would see nothing
    np.testing.assert_allclose(made.score(images, PROMPTS), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert (reference(weights, *args, eps=1e-5) - expected).abs().max() > 1e-6
    assert made._network.visual.config.layer_norm_eps == 1e-6


def test_a_prompt_is_cut_and_padded_to_35_wordpieces_with_cls_first(folder: Path) -> None:
    made = scorer(folder)
    ids, mask = made.tokens([*PROMPTS, "", "red" * 5000])
    assert ids.shape == (len(PROMPTS) + 2, 35) and (ids[:, 0] == VOCABULARY.index("[CLS]")).all()
    for prompt, row, seen in zip(PROMPTS, ids.tolist(), mask.tolist(), strict=False):
        assert (row, seen) == ids_by_hand(prompt)
    assert ids[4, -1] == VOCABULARY.index("[SEP]") and mask[4].all()  # the 40 words
    assert ids[5, :3].tolist() == [VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]"), 0]
    assert made._tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [len(VOCABULARY), len(VOCABULARY) + 1]


def test_scores_depend_neither_on_batch_mates_nor_on_their_order(folder: Path) -> None:
    images = pictures(side=0)
    same_in_any_batch(partial(scorer, folder), images, PROMPTS, 1e-5)
    assert len(scorer(folder).score([], [])) == 0
    with pytest.raises(ValueError, match="5 images for 1 prompts"):
        scorer(folder).score(images, ["a"])


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_other_modes_are_judged_as_rgb(mode: str, folder: Path) -> None:
    images = [image.convert(mode) for image in pictures(2)]
    rgb = scorer(folder).score([image.convert("RGB") for image in images], PROMPTS[:2])
    np.testing.assert_array_equal(scorer(folder).score(images, PROMPTS[:2]), rgb)


def test_the_differentiable_road_follows_and_its_gradient_points_upwards(folder: Path) -> None:
    made = scorer(folder, batch_size=2)
    exact = made.score(pictures(3, side=SIDE), PROMPTS[:3])
    same = made.score_tensor(tensor(pictures(3, side=SIDE)), PROMPTS[:3])
    np.testing.assert_allclose(same.numpy(), exact, atol=1e-5)
    odd = [image.resize((57, 79), Image.Resampling.BICUBIC) for image in pictures(3, side=SIDE)]
    inputs = made._preprocess.tensor(tensor(odd), "antialiased") - made._preprocess.pictures(odd)
    assert inputs.abs().max() < 3 / 255 / min(STD)
    pixels = tensor(pictures(3, side=64)).requires_grad_()
    before = made.score_tensor(pixels, PROMPTS[:3])
    before.sum().backward()
    assert pixels.grad is not None and pixels.grad.flatten(1).norm(dim=1).min() > 0
    step = 0.02 * pixels.grad.sign()
    assert made.score_tensor((pixels + step).clamp(0, 1), PROMPTS[:3]).sum() > before.sum()


def test_an_odd_margin_is_cut_as_torchvision_does() -> None:
    from torchvision.transforms import CenterCrop

    made = Preprocess(clip_processor(SIDE), "torchvision")
    for width in range(SIDE, SIDE + 9):
        ramp = torch.arange(float(width)).expand(1, 3, SIDE, width)
        torch.testing.assert_close(made._cut(ramp), CenterCrop(SIDE)(ramp))


def test_wrapped_prefixed_half_and_safetensors_files_give_the_same_network(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    expected = scorer(folder).score(pictures(2), PROMPTS[:2])
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "wrapped.pt")
    save_file({f"model.{key}": value.contiguous() for key, value in weights.items()}, tmp_path / "mirror.safetensors")
    save_file({key: value.half() for key, value in weights.items()}, tmp_path / "half.safetensors")
    fields = {"tokenizer": str(folder), "config": str(folder / "med_config.json")}
    for name, atol in (("wrapped.pt", 0), ("mirror.safetensors", 0), ("half.safetensors", 0.02)):
        made = scorer(tmp_path / name, **fields)
        np.testing.assert_allclose(made.score(pictures(2), PROMPTS[:2]), expected, atol=atol)
        assert made._network.head[0].weight.dtype == torch.float32


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code of the file was run",)


def test_wrong_files_are_one_line(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    def said(**changed: object) -> str:
        with pytest.raises(UserError) as error:
            scorer(tmp_path / "w.pt", **{"tokenizer": str(folder), **changed}).score(pictures(1), PROMPTS[:1])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such weights file" in said()
    torch.save({"logit_scale": torch.ones(())}, tmp_path / "w.pt")
    assert "1 unexpected (logit_scale)" in said()
    torch.save({**weights, "mlp.layers.7.bias": torch.zeros(3)}, tmp_path / "w.pt")
    assert "wrong shape (head.7.bias)" in said()
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Evil()))
    assert "refused" in said() or "cannot be read" in said()
    torch.save(weights, tmp_path / "w.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY[:20]) + "\n")
    assert "wordpieces" in said(tokenizer=str(tmp_path))
    (tmp_path / "other").mkdir()
    assert "no BERT tokenizer" in said(tokenizer=str(tmp_path / "other"))


def test_a_callers_autocast_changes_nothing(folder: Path) -> None:
    same_under_autocast(partial(scorer, folder), pictures(2), PROMPTS[:2])


def test_the_version_tells_weights_and_settings_apart(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    info = scorer(folder).info
    assert info == scorer(folder, batch_size=1).info and info.differentiable and info.name == "image_reward"
    assert scorer(folder, dtype="bfloat16").info.version != info.version
    torch.save({**weights, "mlp.layers.7.bias": weights["mlp.layers.7.bias"] + 1}, tmp_path / "ImageReward.pt")
    assert scorer(tmp_path, tokenizer=str(folder)).info.version != info.version


def test_published_files_are_the_defaults_and_nothing_is_read_for_them_until_the_first_score() -> None:
    for name, path in (("imagereward", "zai-org/ImageReward"), ("image-reward", "zai-org/ImageReward")):
        assert build("scorer", {"name": name}).path == path
    assert build("scorer", {"name": "mps"}).path == "RE-N-Y/mpsv1"
