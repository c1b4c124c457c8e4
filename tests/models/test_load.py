"""Each way a pipeline folder can be wrong is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import registry
from diffalign.types import UserError

from .conftest import Twins


def load(path: Any, name: str = "sdxl", **keys: Any) -> Any:
    return registry.build("model", {"name": name, "path": str(path), **keys}).load()


def refused(path: Any, match: str, name: str = "sdxl", **keys: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(path, name, **keys)
    assert "\n" not in str(error.value)


@pytest.fixture
def copy(twins: Twins, tmp_path: Path) -> Path:
    return Path(shutil.copytree(twins.folder("sdxl"), tmp_path / "copy"))


def test_no_such_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    refused("nowhere", "no such folder")
    refused("package:no_such_package/x", "no package 'no_such_package'")
    refused("package:diffalign.models/x", "no folder 'x'")
    refused(tmp_path, "no model_index.json")
    (tmp_path / "model_index.json").write_text("{")
    refused(tmp_path, "not valid JSON")


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    def offline(*args: Any, **keys: Any) -> str:
        raise OSError("cannot reach the hub\nsecond line")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", offline)
    refused("some-one/some-model", r"some-one/some-model: neither a local folder nor .*cannot reach the hub")


def test_hub_id_is_downloaded_by_diffusers(monkeypatch: pytest.MonkeyPatch, twins: Twins) -> None:
    import diffusers

    asked = {}
    folder = str(twins.folder("sdxl"))
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "download", lambda path, **keys: asked.update(keys, path=path) or folder
    )
    assert load("some-one/some-model", revision="abc").resolution == (32, 32)
    assert asked == {"path": "some-one/some-model", "revision": "abc", "variant": None, "use_safetensors": True}


def test_package_path(monkeypatch: pytest.MonkeyPatch, twins: Twins, tmp_path: Path) -> None:
    package = tmp_path / "some_weights"
    shutil.copytree(twins.folder("sd3-no-t5"), package / "weights" / "sd3")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load("package:some_weights/weights/sd3", "sd3", max_sequence_length=8)
    assert model.encode_prompts(["a"])["prompt_embeds"].shape[1] == 85


def test_another_familys_pipeline(twins: Twins, copy: Path) -> None:
    refused(twins.folder("sd3"), "holds a StableDiffusion3Pipeline: use the model 'sd3'")
    refused(twins.folder("sdxl"), "use the model 'sdxl'", name="sd15")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    refused(copy, "holds a KandinskyPipeline, not a StableDiffusionXLPipeline")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2", "tokenizer", "scheduler"])
def test_missing_component(copy: Path, component: str) -> None:
    shutil.rmtree(copy / component)
    refused(copy, f"'{component}' is missing")


def test_component_that_the_index_leaves_out(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    refused(copy, "names no 'vae'")


@pytest.mark.parametrize("component", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_broken_weights(copy: Path, component: str) -> None:
    file = copy / f"{component}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(copy, r"safetensors: a broken safetensors file")
    file.unlink()
    (file.with_suffix(".bin")).write_bytes(b"")
    refused(copy, "no safetensors file")


def test_weights_that_do_not_fit(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != "conv_out.bias"}, file)
    refused(copy, "1 weights are missing from the files, the first is 'conv_out.bias'")
    save_file(tensors | {"conv_out.bias": torch.zeros(3)}, file)
    refused(copy, "cannot load it")


def test_variant(copy: Path, twins: Twins) -> None:
    refused(copy, "cannot load it", variant="fp16")
    plain = load(copy)
    for file in copy.glob("*/*.safetensors"):
        file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    half = load(copy, variant="fp16")
    assert torch.equal(next(half.network.parameters()), next(plain.network.parameters()))
    assert len(half.fingerprint("vae")) == 32


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"dtype": "float8"}, "model.dtype"),
        ({"trainable": "some"}, "model.trainable"),
        ({"attention": "fast"}, "model.attention"),
        ({"lora": {"rank": 0}}, "model.lora.rank"),
        ({"lora": {"targets": "all"}}, "model.lora.targets"),
        ({"resolution": -1}, "model.resolution"),
        ({"compile": True}, "model.compile"),
        ({"max_sequence_length": 8}, "unknown key model.max_sequence_length"),
    ],
)
def test_bad_keys(keys: dict[str, Any], match: str) -> None:
    refused("tiny", match, **keys)


def test_unknown_lora_key() -> None:
    refused("tiny", "model.lora", lora={"ranks": 4})


def test_missing_path() -> None:
    with pytest.raises(UserError, match="model.path"):
        registry.build("model", {"name": "sdxl"})


def test_model_configs_build(subtests: Any = None) -> None:
    import yaml

    folder = Path(__file__).parents[2] / "configs" / "models"
    files = sorted(folder.glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        spec = yaml.safe_load(file.read_text())
        assert list(spec) == ["model"], file
        registry.build("model", spec["model"])
