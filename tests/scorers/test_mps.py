"""MPS: against plain einsums under the released names, batch mates that must not matter, padding, threshold, files."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.registry import build
from diffalign.scorers.mps import OVERALL
from diffalign.types import UserError

from .conftest import PROMPTS, pictures, same_in_any_batch, same_under_autocast, tensor

HEADS, LAYERS = 3, 2
CONDITION = "a small red circle and a large blue square"  # of words that the tiny tokenizer has
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cross_weights(dim: int) -> dict[str, Tensor]:
    """The layers between, random, under the released names; the rotary frequencies are half precision's."""
    generator, made = torch.Generator().manual_seed(3), {}
    inner, ff = HEADS * 64, 4 * dim
    shapes = {
        "0.fn.to_q": (inner, dim),
        "0.fn.to_kv": (128, dim),
        "0.fn.to_out": (dim, inner),
        "0.fn.ff.0": (2 * ff, dim),
        "0.fn.ff.2": (dim, ff),
        "1.fn.fused_attn_ff_proj": (inner + 128 + 2 * ff, dim),
        "1.fn.attn_out": (dim, inner),
        "1.fn.ff_out.1": (dim, ff),
    }
    for layer in range(LAYERS):
        at = f"cross_model.layers.{layer}."
        for name, shape in shapes.items():
            made[f"{at}{name}.weight"] = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        for block in "01":
            made[f"{at}{block}.fn.norm.weight"] = 1 + 0.2 * torch.randn(dim, generator=generator)
            made[f"{at}{block}.fn.norm.bias"] = torch.zeros(dim)
        made[f"{at}1.fn.rotary_emb.inv_freq"] = (10000.0 ** -(torch.arange(0, 64, 2) / 64)).half().float()
    return made


@pytest.fixture(scope="module")
def folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mps")
    shutil.copytree(clip_folder, made, dirs_exist_ok=True)
    clip = {f"model.{key}": value for key, value in load_file(clip_folder / "model.safetensors").items()}
    for part in ("text", "visual"):  # far from the condition, or every token would be read
        clip[f"model.{part}_projection.weight"] = clip[f"model.{part}_projection.weight"] * 3
    save_file(clip | cross_weights(clip["model.text_projection.weight"].shape[0]), made / "model.safetensors")
    return made


def scorer(folder: Path, **fields: object) -> object:
    return build("scorer", {"name": "mps", "path": str(folder), "device": "cpu", "condition": CONDITION, **fields})


def clip_of(folder: Path) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    clip = CLIPModel(CLIPConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    clip.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return clip.eval()


def ids_of(folder: Path, prompts: list[str], pad: int | None = None) -> Tensor:
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder)
    length = clip_of(folder).config.text_config.max_position_embeddings
    rows = [words(prompt, truncation=True, max_length=length).input_ids for prompt in prompts]
    fill = words.eos_token_id if pad is None else pad
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


@torch.no_grad()
def reference(folder: Path, pixels: Tensor, ids: Tensor, threshold: float) -> Tensor:
    """One picture and prompt at a time, as the released evaluation scripts do it."""
    clip, w = clip_of(folder), load_file(folder / "model.safetensors")
    condition = clip.text_projection(clip.text_model(ids_of(folder, [CONDITION])).last_hidden_state)
    scores = []
    for picture, row in zip(pixels, ids, strict=True):
        out = clip.text_model(row[None])
        text, pooled = clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)
        similarity = torch.einsum("bid,bjd->bji", text, condition).max(dim=1, keepdim=True)[0]
        mask = torch.where(similarity / similarity.max() > threshold, 0.0, float("-inf"))
        x = clip.visual_projection(clip.vision_model(picture[None]).last_hidden_state)
        for layer in range(LAYERS):
            for block in "01":
                at = f"cross_model.layers.{layer}.{block}.fn."
                h = F.layer_norm(x, x.shape[-1:], w[f"{at}norm.weight"])
                if block == "0":
                    q = h @ w[f"{at}to_q.weight"].T
                    k, v = (text @ w[f"{at}to_kv.weight"].T).chunk(2, -1)
                    inner, down, out_name = h @ w[f"{at}ff.0.weight"].T, f"{at}ff.2.weight", f"{at}to_out.weight"
                else:
                    sizes = (HEADS * 64, 64, 64, 8 * x.shape[-1])
                    q, k, v, inner = (h @ w[f"{at}fused_attn_ff_proj.weight"].T).split(sizes, -1)
                    down, out_name = f"{at}ff_out.1.weight", f"{at}attn_out.weight"
                q = q.unflatten(-1, (HEADS, 64)).movedim(-2, 1)
                if block == "1":
                    angle = torch.outer(torch.arange(x.shape[1]).float(), w[f"{at}rotary_emb.inv_freq"])
                    turn = torch.polar(torch.ones_like(angle), angle)  # a complex number per pair (d, d + 32)
                    q, k = (torch.complex(*z.chunk(2, -1)) * turn for z in (q, k))
                    q, k = (torch.cat([z.real, z.imag], -1) for z in (q, k))
                logits = torch.einsum("bhid,bjd->bhij", q, k) / 8 + (mask[:, None] if block == "0" else 0)
                read = torch.einsum("bhij,bjd->bihd", logits.softmax(-1), v).flatten(2)
                value, gate = inner.chunk(2, -1)
                x = x + read @ w[out_name].T + (value * F.silu(gate)) @ w[down].T
        scores.append(clip.logit_scale.exp() * F.cosine_similarity(pooled, x[:, 0]))
    return torch.cat(scores)


def normalised() -> Tensor:
    return (tensor(pictures()) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.7])
def test_score_is_the_released_formula(threshold: float, folder: Path) -> None:
    expected = reference(folder, normalised(), ids_of(folder, PROMPTS), threshold)
    made = scorer(folder, threshold=threshold)
    assert expected.std() > 0.1
    np.testing.assert_allclose(made.score(pictures(), PROMPTS), expected.numpy(), rtol=1e-5, atol=2e-5)


def test_the_threshold_and_the_condition_matter(folder: Path) -> None:
    low, high = (scorer(folder, threshold=value).score(pictures(), PROMPTS) for value in (0.01, 0.9))
    assert np.abs(low - high).max() > 1e-3
    kept = [scorer(folder, threshold=value)._text(PROMPTS)[2] for value in (0.01, 0.9)]
    assert all(each.any(dim=1).all() for each in kept) and kept[1].sum() < kept[0].sum()
    other = scorer(folder, threshold=0.9, condition="a green cross").score(pictures(), PROMPTS)
    assert np.abs(other - high).max() > 1e-3
    assert len(OVERALL.split(", ")) == 22 and OVERALL.startswith("light,") and OVERALL.endswith("things.")


def test_scores_depend_neither_on_batch_mates_nor_on_their_order(folder: Path) -> None:
    prompts = ["a small red circle", "two", "", "a large green square left of a small blue cross", "red " * 50]
    together = same_in_any_batch(partial(scorer, folder, threshold=0.9), pictures(side=0), prompts, 1e-5)
    assert np.isfinite(together).all() and len(scorer(folder).score([], [])) == 0
    with pytest.raises(ValueError, match="5 images for 1 prompts"):
        scorer(folder).score(pictures(), ["a"])


def test_a_batch_mate_close_to_the_condition_takes_no_token_away(folder: Path) -> None:
    made = scorer(folder)
    words, _ = made._network.texts(made.tokens(["a small red circle"]))
    loud = torch.cat([words, 100 * made._condition])
    kept = made._network.kept(loud, made._condition, 0.3)[0]
    assert kept.any() and torch.equal(kept, made._network.kept(words, made._condition, 0.3)[0])


def test_padding_is_the_end_token_and_would_be_noticed_if_it_were_not(folder: Path, tmp_path: Path) -> None:
    made = scorer(folder, threshold=0.01)
    torch.testing.assert_close(made.tokens(PROMPTS), ids_of(folder, PROMPTS))
    wrong = reference(folder, normalised(), ids_of(folder, PROMPTS, pad=0), 0.01)
    assert np.abs(made.score(pictures(), PROMPTS) - wrong.numpy()).max() > 1e-3
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "!"}))
    np.testing.assert_array_equal(
        scorer(tmp_path, threshold=0.01).score(pictures(), PROMPTS), made.score(pictures(), PROMPTS)
    )


def test_the_differentiable_road_follows_and_its_gradient_points_upwards(folder: Path) -> None:
    made = scorer(folder, batch_size=2)
    np.testing.assert_allclose(
        made.score_tensor(tensor(pictures()), PROMPTS).numpy(), made.score(pictures(), PROMPTS), atol=2e-5
    )
    pixels = tensor(pictures(side=96)).requires_grad_()
    before = made.score_tensor(pixels, PROMPTS)
    before.sum().backward()
    assert pixels.grad is not None and pixels.grad.flatten(1).norm(dim=1).min() > 0
    assert made.score_tensor((pixels + 0.02 * pixels.grad.sign()).clamp(0, 1), PROMPTS).sum() > before.sum()
    assert not any(parameter.requires_grad for parameter in made._network.parameters())


def test_each_prompt_is_embedded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, embedded = scorer(folder, batch_size=2), []
    texts = made._network.texts
    made._condition  # noqa: B018
    monkeypatch.setattr(made._network, "texts", lambda tokens: embedded.append(len(tokens)) or texts(tokens))
    made.score(pictures(), PROMPTS)
    made.score(pictures(), PROMPTS)
    assert sum(embedded) == len(set(PROMPTS))


def test_the_mirrors_prefix_and_files_without_constants_give_the_same_network(folder: Path, tmp_path: Path) -> None:
    expected = scorer(folder).score(pictures(), PROMPTS)
    weights = load_file(folder / "model.safetensors")
    save_file({f"mps.{key}": value for key, value in weights.items()}, tmp_path / "mirror.safetensors")
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "wrapped.pt")
    for name in ("mirror.safetensors", "wrapped.pt"):
        made = scorer(tmp_path / name, processor=str(folder))
        np.testing.assert_array_equal(made.score(pictures(), PROMPTS), expected)
    constants = {key for key in weights if "cross" in key and key.endswith(("norm.bias", "inv_freq"))}
    bare = {key: value for key, value in weights.items() if key not in constants}
    assert len(bare) == len(weights) - 3 * LAYERS
    save_file(bare, tmp_path / "bare.safetensors")
    made = scorer(tmp_path / "bare.safetensors", processor=str(folder))
    np.testing.assert_allclose(made.score(pictures(), PROMPTS), expected, atol=0.05)  # exact, not half, frequencies


def test_wrong_files_are_one_line(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    def said(path: Path, **fields: object) -> str:
        with pytest.raises(UserError) as error:
            scorer(path, **fields).score(pictures(1), PROMPTS[:1])
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save(nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")  # a whole module, as MPS was released
    assert "pickled objects" in said(tmp_path / "MPS_overall_checkpoint.pth", processor=str(folder))
    assert "missing (read.0.norm.weight" in said(clip_folder)
    assert "no such weights file" in said(tmp_path / "none.safetensors")
    (tmp_path / "words").mkdir()
    assert "config.json" in said(folder / "model.safetensors", processor=str(tmp_path / "words"))
    assert "threshold" in said(folder, threshold=1.5)


def test_a_callers_autocast_changes_nothing(folder: Path) -> None:
    same_under_autocast(partial(scorer, folder), pictures(2), PROMPTS[:2])


def test_the_version_tells_settings_apart(folder: Path) -> None:
    info = scorer(folder).info
    assert info == scorer(folder, batch_size=1).info and info.differentiable and info.name == "mps"
    others = [scorer(folder, **{key: value}) for key, value in (("threshold", 0.01), ("condition", "red"))]
    assert len({info.version, *(other.info.version for other in others)}) == 3
