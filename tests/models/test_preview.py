"""Cheaper decoders: pictures of the model's size, and one line where a folder holds no tiny decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.models._preview import decoder
from diffalign.types import UserError


def save_tiny(path: Path, channels: int = 4, blocks: int = 2, scaling_factor: float = 1.0) -> Any:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = (8,) * blocks
    tiny: Any = AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
        scaling_factor=scaling_factor,
    )
    tiny.save_pretrained(path)
    return tiny.eval()


@pytest.fixture(scope="module")
def model(twins):
    return twins.load("sdxl")


def latents(height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))


def test_full_is_the_models_own(model):
    assert torch.equal(decoder(model, "full")(latents()), model.decode(latents()))


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (14, 18), (15, 17)])
def test_half_has_the_models_size(model, size):
    seen = []
    whole = model.decode(latents(*size))

    class Spy:
        vae_factor = model.vae_factor

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return model.decode(x)

    pixels = decoder(Spy(), "half")(latents(*size))
    assert pixels.shape == whole.shape and pixels.dtype == torch.float32
    assert 0 <= pixels.min() and pixels.max() <= 1
    assert seen == [(2, 4, size[0] // 2, size[1] // 2)]


def test_half_shows_the_same_picture():
    """With a decoder that only enlarges: every place keeps its mean, nothing is moved or mirrored."""

    class Enlarges:
        vae_factor = 2

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.interpolate(x[:, :3], scale_factor=2, mode="nearest")

    ramp = torch.linspace(0, 1, 16)[:, None].expand(16, 16)
    x = torch.stack([ramp, ramp.T, torch.full((16, 16), 0.3), ramp])[None]
    whole, half = (decoder(Enlarges(), preview)(x) for preview in ("full", "half"))
    torch.testing.assert_close(half[:, :, 2:-2, 2:-2], whole[:, :, 2:-2, 2:-2], atol=0.05, rtol=0)
    assert torch.allclose(half[:, 2], torch.tensor(0.3))


@pytest.mark.parametrize("scaling_factor", [1.0, 2.0])
def test_a_tiny_decoder(model, scaling_factor, tmp_path):
    tiny = save_tiny(tmp_path / "tiny", scaling_factor=scaling_factor)
    pixels = decoder(model, str(tmp_path / "tiny"))(latents())
    with torch.no_grad():
        wanted = (tiny.decode(latents() / scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(pixels, wanted) and pixels.shape == model.decode(latents()).shape
    assert not pixels.requires_grad and pixels.device.type == "cpu" and pixels.std() > 0


@pytest.mark.parametrize(
    "preview,match",
    [
        ("nowhere", "full, half, or the folder of an AutoencoderTiny"),
        ("Full", "full, half, or the folder"),
        ("empty", "no AutoencoderTiny there"),
        ("vae", "no AutoencoderTiny there .*is of AutoencoderKL"),
        ("pipeline", "no AutoencoderTiny there"),
        ("broken", "no AutoencoderTiny there"),
        ("no-config", "no AutoencoderTiny there"),
        ("pickled", "no AutoencoderTiny there"),
        ("sixteen", "decodes 16 latent channels, the model has 4"),
        ("eightfold", "enlarges latents 8 times, the model's 2"),
    ],
)
def test_what_is_no_tiny_decoder_is_one_line(preview, match, model, twins, tmp_path):
    folders = {"vae": twins.folder("sdxl") / "vae", "pipeline": twins.folder("sdxl")}
    path = folders.get(preview, tmp_path / preview)
    weights = path / "diffusion_pytorch_model.safetensors"
    if preview == "empty":
        path.mkdir()
    elif preview == "sixteen":
        save_tiny(path, channels=16)
    elif preview == "eightfold":
        save_tiny(path, blocks=4)
    elif preview in ("broken", "no-config", "pickled"):
        save_tiny(path)
        if preview == "broken":
            weights.write_bytes(b"no weights")
        elif preview == "pickled":
            torch.save({}, path / "diffusion_pytorch_model.bin")
            weights.unlink()
        else:
            (path / "config.json").write_text("{")
    name = preview if preview in ("nowhere", "Full") else str(path)
    with pytest.raises(UserError, match=match) as error:
        decoder(model, name)
    assert str(error.value).startswith(f"source.preview={name}") and "\n" not in str(error.value)


def test_other_shapes_of_weights_are_one_line(model, tmp_path):
    save_tiny(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config |= {"decoder_block_out_channels": [16, 16], "encoder_block_out_channels": [16, 16]}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no AutoencoderTiny there") as error:
        decoder(model, str(tmp_path / "tiny"))
    assert "\n" not in str(error.value)
