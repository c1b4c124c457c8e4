"""Adapters: exact at the start, off bit for bit, and what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.types import UserError

from .conftest import Twins, inputs, make_nonzero


def image(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(
        pipeline("a red circle", num_inference_steps=2, generator=generator, output_type="np", height=32, width=32)[0]
    )


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_policy_is_exactly_the_reference_at_the_start(twins: Twins, family: str, dora: bool) -> None:
    model = twins.load(family, lora={"dora": dora, "dropout": 0.5})
    base = twins.load(family, trainable="full")
    xt, t, cond = inputs(model)
    policy = model(xt, t, cond)
    with model.adapter_off():
        reference = model(xt, t, cond)
    assert torch.equal(policy, reference)
    assert torch.equal(reference, base(xt, t, cond))


@torch.no_grad()
def test_adapter_off_is_the_base_and_comes_back(twins: Twins, family: str) -> None:
    model = twins.load(family)
    call = inputs(model)
    base = model(*call)
    make_nonzero(model)
    trained = model(*call)
    assert (trained - base).abs().max() > 1e-3
    with pytest.raises(ZeroDivisionError), model.adapter_off():
        with model.adapter_off():
            assert torch.equal(model(*call), base)
        assert torch.equal(model(*call), base)
        raise ZeroDivisionError
    assert torch.equal(model(*call), trained)
    assert all(p.requires_grad for p in model.trainable_parameters().values()) and model.trainable_parameters()


def test_full_weights_have_no_adapter(twins: Twins) -> None:
    model = twins.load("sdxl", trainable="full")
    with pytest.raises(UserError, match="reference.name=frozen"), model.adapter_off():
        pass
    with pytest.raises(UserError, match="trainable=lora"):
        model.adapter_stats()


def test_dropout_is_on_only_with_gradients(twins: Twins) -> None:
    model = twins.load("sdxl", lora={"dropout": 0.5})
    make_nonzero(model)
    call = inputs(model)
    assert not torch.equal(model(*call), model(*call))
    with torch.no_grad():
        assert torch.equal(model(*call), model(*call))


def test_stats_count_what_changed(twins: Twins, family: str) -> None:
    model = twins.load(family, lora={"rank": 4, "alpha": 8})
    stats = model.adapter_stats()
    assert stats["num_targets_covered"] == 0 and stats["norm"] == 0
    assert stats["num_tensors"] == len(model.trainable_parameters()) == 2 * stats["num_targets"] > 0
    layer = model._layers[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    want = 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).norm().item()
    stats = model.adapter_stats()
    assert stats["num_targets_covered"] == 1 and stats["norm"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 10}, {"rank": 4, "dora": True}])
def test_export_loads_in_plain_diffusers(twins: Twins, family: str, tmp_path: Path, lora: dict[str, Any]) -> None:
    model, pipeline = twins.load(family, lora=lora), twins.pipeline(family)
    make_nonzero(model)
    folder = model.export(tmp_path / "lora")
    assert [file.name for file in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]
    before = image(pipeline)
    pipeline.load_lora_weights(folder)
    assert (image(pipeline) - before).abs().max() > 1e-3
    call = inputs(model)
    with torch.no_grad():
        plain = twins.load(family, trainable="full")
        plain.denoiser = getattr(pipeline, model.family.denoiser)
        assert torch.allclose(plain(*call), model(*call), atol=1e-5)
    assert torch.allclose(image(pipeline), image(model.pipeline), atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_kohya_keys_carry_alpha_and_load(twins: Twins, family: str, tmp_path: Path) -> None:
    model, pipeline = twins.load(family, lora={"rank": 4, "alpha": 10}), twins.pipeline(family)
    make_nonzero(model)
    file = model.export(tmp_path, format="kohya") / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    assert all(key.startswith("lora_unet_") for key in tensors)
    ends = {key.split(".", 1)[1] for key in tensors}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {value.item() for key, value in tensors.items() if key.endswith("alpha")} == {10.0}
    with safe_open(str(file), framework="pt") as opened:
        assert opened.metadata()["ss_network_dim"] == "4" and opened.metadata()["ss_network_alpha"] == "10.0"
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(image(pipeline), image(model.pipeline), atol=1e-5)


def test_kohya_refusals(twins: Twins, tmp_path: Path) -> None:
    for twin, keys, match in (
        ("sd3", {}, "for U-Nets"),
        ("sdxl", {"lora": {"dora": True}}, "DoRA"),
        ("sdxl", {"trainable": "full"}, "for LoRA"),
    ):
        with pytest.raises(UserError, match=match):
            twins.load(twin, **keys).export(tmp_path / "x", format="kohya")
    with pytest.raises(UserError, match="legal are"):
        twins.load("sdxl").export(tmp_path / "x", format="pickle")
    assert not (tmp_path / "x").exists()


@torch.no_grad()
def test_full_export_round_trip(twins: Twins, family: str, tmp_path: Path) -> None:
    model = twins.load(family, trainable="full")
    call = inputs(model)
    before = model(*call)
    make_nonzero(model, std=0.02)
    folder = model.export(tmp_path / "full")
    again = type(model.config)(path=str(folder)).load()
    assert torch.equal(again(*call), model(*call)) and not torch.equal(again(*call), before)
    assert again.fingerprint("denoiser") != model.fingerprint("denoiser")
    assert again.fingerprint("vae") == model.fingerprint("vae")


@torch.no_grad()
def test_loaded_adapter_equals_the_trained_one_and_scales(twins: Twins, family: str, tmp_path: Path) -> None:
    trained = twins.load(family, lora={"rank": 4, "alpha": 6})
    make_nonzero(trained)
    trained.export(tmp_path)
    model = twins.load(family)
    names = set(model.trainable_parameters())
    call = inputs(model)
    base = model(*call)
    model.load_adapter(tmp_path)
    assert torch.allclose(model(*call), trained(*call), atol=1e-5)
    assert set(model.trainable_parameters()) == names
    with model.adapter_off():
        assert torch.equal(model(*call), base)
    zero = twins.load(family, trainable="full")
    zero.load_adapter(tmp_path, scale=0.0)
    assert torch.allclose(zero(*call), base, atol=1e-6)
    with pytest.raises(UserError, match="before load_adapter"):
        zero.export(tmp_path / "full")
    half, twice = twins.load(family), twins.load(family)
    half.load_adapter(tmp_path, scale=0.5)
    twice.load_adapter(tmp_path, scale=0.25)
    twice.load_adapter(tmp_path, scale=0.25)
    assert torch.allclose(half(*call), twice(*call), atol=1e-5)
    assert not torch.allclose(half(*call), trained(*call), atol=1e-3)


def test_training_goes_on_from_an_adapter(twins: Twins, family: str, tmp_path: Path) -> None:
    first = twins.load(family, lora={"rank": 4, "alpha": 6})
    make_nonzero(first)
    first.export(tmp_path / "a")
    second = twins.load(family, lora={"init": str(tmp_path / "a")}, dtype="bfloat16")
    assert second.adapter_stats() == pytest.approx(first.adapter_stats())
    assert set(second.trainable_parameters()) == set(first.trainable_parameters())
    assert {p.dtype for p in second.trainable_parameters().values()} == {torch.float32}
    again = twins.load(family, lora={"init": str(second.export(tmp_path / "b"))})
    call = inputs(first)
    with torch.no_grad():
        assert torch.allclose(again(*call), first(*call), atol=1e-5)


def test_bad_targets_and_files(twins: Twins, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.lora.targets: .*'to_nowhere'"):
        twins.load("sdxl", lora={"targets": ["to_q", "to_nowhere"]})
    with pytest.raises(UserError, match="empty"):
        twins.load("sdxl", lora={"targets": []})
    with pytest.raises(UserError, match=r"model.lora.init=.*no adapter here"):
        twins.load("sdxl", lora={"init": str(tmp_path)})
    model = twins.load("sd3")
    unet = twins.load("sdxl")
    make_nonzero(unet)
    unet.export(tmp_path / "sdxl")
    with pytest.raises(UserError, match="adapter="):
        model.load_adapter(tmp_path / "sdxl")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="broken.safetensors"):
        model.load_adapter(tmp_path / "broken.safetensors")
    save_file({"odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd.safetensors"):
        model.load_adapter(tmp_path / "odd.safetensors")
    (tmp_path / "old.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only safetensors"):
        model.load_adapter(tmp_path / "old.bin")


def test_chosen_targets(twins: Twins) -> None:
    model = twins.load("sdxl", lora={"targets": ["to_v", "conv1"], "rank": 2})
    ends = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in model.trainable_parameters()}
    assert ends == {"to_v", "conv1"}
    make_nonzero(model)
    stats = model.adapter_stats()
    assert stats["num_targets_covered"] == stats["num_targets"]
