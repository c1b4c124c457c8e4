"""The step-aware tower: identity at its initial values, the published numbers, closed forms, and its folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign.registry import build
from diffalign.scorers import _clip_files as files
from diffalign.scorers._clip import ClipScorer
from diffalign.scorers._step_clip import Modulation, pooled, timestep_embedding
from diffalign.types import UserError

from .conftest import PROMPTS, pictures, randomised, tensor, write_step


def scorer(name: str, folder: Path, **fields: object) -> ClipScorer:
    return build("scorer", {"name": name, "path": str(folder), "device": "cpu", **fields})


def test_timestep_embedding_has_the_released_values() -> None:
    (row,) = timestep_embedding(torch.tensor([251.0]))
    places = [0, 1, 127, 128, 129, 255]
    expected = [0.946877705, 0.457401069, 0.999636260, -0.321593860, 0.889260514, 0.026969386]
    np.testing.assert_allclose(row[places].numpy(), expected, atol=1e-7)


def test_equals_the_base_scorer_at_every_timestep_before_training(clip_folder: Path, tmp_path: Path) -> None:
    folder = write_step(clip_folder, tmp_path / "step")
    pixels = tensor(pictures())
    expected = scorer("clip_preference", clip_folder).score_tensor(pixels, PROMPTS)
    made = scorer("step_aware", folder)
    for start in range(0, 1000, 37):
        times = torch.arange(start, start + 5).clamp(max=999).float()
        torch.testing.assert_close(made.score_tensor(pixels, PROMPTS, times), expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(made.score(pictures(), PROMPTS), expected.numpy(), atol=1e-6)


def test_parameters_of_the_published_size() -> None:
    with torch.device("meta"):
        num = sum(parameter.numel() for parameter in Modulation(1280, 32).parameters())
    assert num == pytest.approx(320.1e6, rel=2e-4)


def test_initial_values() -> None:
    torch.manual_seed(0)
    made = Modulation(96, 2)
    for block in made.blocks:
        weight, bias = dict(block.named_parameters()).values()
        assert weight.abs().sum() == 0
        assert torch.equal(bias.reshape(6, 96)[:, 0], torch.tensor([0.0, 0, 1, 0, 0, 1]))
    assert sum(p.abs().sum() for p in made.final.parameters()) == 0
    stds = [p.std().item() for n, p in made.embedder.named_parameters() if n.endswith("weight")]
    assert stds == pytest.approx([0.02, 0.02], rel=0.05)


def test_closed_gates_leave_the_embedded_patches(clip_folder: Path) -> None:
    """With gates 0 the blocks add nothing; the pooled output is scaled and shifted after the last norm."""
    clip = files.load_clip(str(clip_folder))
    vision, made = clip.vision_model, files.new_modulation(clip)
    width = clip.config.vision_config.hidden_size
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith("blocks") and name.endswith("bias"):
                parameter.zero_()
        made.final[1].bias[:width], made.final[1].bias[width:] = 0.3, 0.5
        pixels = torch.randn(2, 3, 64, 64)
        found = pooled(vision, made, pixels, torch.tensor([3.0, 700.0]))
        plain = vision.post_layernorm(vision.pre_layrnorm(vision.embeddings(pixels))[:, 0])
    torch.testing.assert_close(found, 1.5 * plain + 0.3)


def test_one_block_is_modulated_as_written(clip_folder: Path) -> None:
    """h + g1 Attn(LN(h)(1 + c1) + s1), then h + g2 MLP(LN(h)(1 + c2) + s2), from a random modulation."""
    clip = files.load_clip(str(clip_folder))
    vision = clip.vision_model
    made = randomised(Modulation(128, len(vision.encoder.layers)))
    pixels, time = torch.randn(2, 3, 64, 64), torch.tensor([0.0, 951.0])
    with torch.no_grad():
        shared = made.embedder(timestep_embedding(time))
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer, block in zip(vision.encoder.layers, made.blocks, strict=True):
            s1, c1, g1, s2, c2, g2 = (part[:, None] for part in block(shared).split(128, dim=1))
            hidden = hidden + g1 * layer.self_attn(layer.layer_norm1(hidden) * (1 + c1) + s1)[0]
            hidden = hidden + g2 * layer.mlp(layer.layer_norm2(hidden) * (1 + c2) + s2)
        shift, scale = made.final(shared).split(128, dim=1)
        expected = vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
        torch.testing.assert_close(pooled(vision, made, pixels, time), expected)


def test_a_row_has_its_own_timestep_whatever_its_mates(step_folder: Path) -> None:
    made, pixels = scorer("step_aware", step_folder), tensor(pictures())
    times = torch.tensor([0.0, 251.0, 501.0, 701.0, 951.0])
    together = made.score_tensor(pixels, PROMPTS, times)
    for row in range(5):
        alone = made.score_tensor(pixels[row : row + 1], PROMPTS[row : row + 1], times[row : row + 1])
        assert float(alone) == pytest.approx(float(together[row]), abs=1e-5)
    same = made.score_tensor(pixels, PROMPTS, torch.tensor(251.0))
    assert float(same[1]) == pytest.approx(float(together[1]), abs=1e-5)
    assert (same - together)[[0, 2, 3, 4]].abs().min() > 1e-4
    small = scorer("step_aware", step_folder, batch_size=2).score_tensor(pixels, PROMPTS, times)
    torch.testing.assert_close(small, together, atol=1e-5, rtol=0)


def test_finished_pictures_are_timestep_0(clip_folder: Path, step_folder: Path) -> None:
    assert "timestep" in scorer("step_aware", step_folder).info.inputs
    assert "timestep" not in scorer("clip_preference", clip_folder).info.inputs
    made, pixels = scorer("step_aware", step_folder), tensor(pictures())
    at_zero = made.score_tensor(pixels, PROMPTS, torch.zeros(5))
    torch.testing.assert_close(made.score_tensor(pixels, PROMPTS), at_zero)
    np.testing.assert_allclose(made.score(pictures(), PROMPTS), at_zero.numpy(), atol=1e-5)


def test_the_gradient_reaches_pixels_and_every_parameter(step_folder: Path) -> None:
    made = scorer("step_aware", step_folder)
    pixels = tensor(pictures()).requires_grad_()
    made._towers.requires_grad_(True)
    made.score_tensor(pixels, PROMPTS, torch.full((5,), 300.0)).sum().backward()
    assert pixels.grad is not None and pixels.grad.flatten(1).norm(dim=1).min() > 0
    assert made._towers.modulation is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made._towers.modulation.parameters())


def test_saved_and_opened_again_is_the_same(step_folder: Path, tmp_path: Path) -> None:
    first = scorer("step_aware", step_folder)
    towers, words = first._towers, str(step_folder)
    copy = tmp_path / "copy"
    files.save_folder(
        copy, towers.clip, towers.modulation, files.load_tokenizer(words), files.load_processor(words, 64)
    )
    second, pixels = scorer("step_aware", copy), tensor(pictures())
    times = torch.arange(5) * 200.0
    assert torch.equal(first.score_tensor(pixels, PROMPTS, times), second.score_tensor(pixels, PROMPTS, times))


def test_confidence_scales_the_score_of_its_timestep_and_a_released_file_has_none(
    step_folder: Path, tmp_path: Path
) -> None:
    made, pixels = scorer("step_aware", step_folder), tensor(pictures())
    times = torch.tensor([0.0, 251.0, 251.0, 701.0, 951.0])
    modulation = made._towers.modulation
    assert modulation is not None
    scale = modulation.confidence(times)
    assert scale[1] == scale[2] and len(set(scale.tolist())) == 4
    released = shutil.copytree(step_folder, tmp_path / "released")
    weights = {n: w for n, w in load_file(released / files.STEP_FILE).items() if not n.startswith("log_confidence")}
    save_file(weights, released / files.STEP_FILE)
    plain = scorer("step_aware", released).score_tensor(pixels, PROMPTS, times)
    torch.testing.assert_close(made.score_tensor(pixels, PROMPTS, times), scale.detach() * plain)


def test_a_folder_without_modulation_says_what_it_is(clip_folder: Path, step_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no step_aware.safetensors.*use clip_preference") as error:
        scorer("step_aware", clip_folder)
    assert "\n" not in str(error.value)
    folder = Path(shutil.copytree(step_folder, tmp_path / "odd"))
    from safetensors.torch import save_file

    save_file(Modulation(64, 2).state_dict(), folder / files.STEP_FILE)
    with pytest.raises(UserError, match="of another tower") as error:
        scorer("step_aware", folder).score(pictures(), PROMPTS)
    assert "\n" not in str(error.value)
    plain = scorer("clip_preference", step_folder).score(pictures(), PROMPTS)  # a step-aware folder is a CLIP folder
    assert np.isfinite(plain).all()
