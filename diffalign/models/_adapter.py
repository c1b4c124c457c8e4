"""LoRA and DoRA adapters on a denoiser through peft: add, switch off, measure, export, load.

An exported folder is an ordinary diffusers LoRA (`pipeline.load_lora_weights(folder)`): rank, alpha and targets travel
in the safetensors metadata. The webui ("kohya") key names carry alpha as a tensor per layer.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.models._config import Lora
from diffalign.models._family import Family
from diffalign.models._load import first_line
from diffalign.types import UserError

ADAPTER = "default"  # the trained adapter's name inside peft
FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder


def tuner_layers(network: nn.Module) -> list[Any]:
    """Every layer that peft wraps."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def lora_layers(network: nn.Module, adapter: str = ADAPTER) -> dict[str, Any]:
    """Name -> wrapped layer that holds `adapter`."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer) and adapter in m.lora_A}


@contextlib.contextmanager
def switched_off(layers: list[Any]) -> Iterator[None]:
    """The base network for the duration. peft's own switch also walks every parameter's requires_grad: too slow."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _targets(network: nn.Module, lora: Lora, family: Family) -> list[str]:
    targets = list(family.lora_targets) if lora.targets == "default" else list(lora.targets)
    wrappable = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(_matches(name, target) for name in wrappable):
            raise UserError(
                f"model.lora.targets: no linear or convolution layer ends with {target!r};"
                f" the default is {list(family.lora_targets)}"
            )
    if not targets:
        raise UserError("model.lora.targets is empty: name layers, or write default")
    return targets


def add(pipeline: Any, lora: Lora, family: Family) -> None:
    """Puts a trainable float32 adapter on the denoiser; its output is zero unless it comes from a file.

    Raises:
        UserError: a target that no layer has, or an adapter file that does not fit.
    """
    network = getattr(pipeline, family.denoiser)
    if lora.init == "gaussian":
        from peft import LoraConfig

        alpha: Any = lora.rank if lora.alpha is None else lora.alpha  # peft says int, and takes floats
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=alpha,
            lora_dropout=lora.dropout,
            use_dora=lora.dora,
            init_lora_weights="gaussian",
            target_modules=_targets(network, lora, family),
        )
        network.add_adapter(config, adapter_name=ADAPTER)
    else:
        load(pipeline, family, lora.init, ADAPTER, "model.lora.init")
    for name, parameter in network.named_parameters():
        is_adapter = f".{ADAPTER}" in name and ".lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()  # peft starts it in the base weights' dtype


def load(pipeline: Any, family: Family, path: str | Path, adapter: str, key: str) -> None:
    """Loads an exported adapter (diffusers or webui keys) next to those already there, in float32.

    Raises:
        UserError: no such file, a broken one, or one of another model.
    """
    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{key}={path}: no adapter here; give a .safetensors file or a folder with {FILE}")
    if file.suffix != ".safetensors":
        raise UserError(f"{key}={file}: only safetensors files are read")
    network = getattr(pipeline, family.denoiser)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
            _text_encoders_need_none()
            pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=adapter)
        _reload_float32(pipeline, family, file, adapter)
    except Exception as error:  # diffusers and peft raise many kinds for a file that does not fit
        raise UserError(
            f"{key}={file}: does not load into this {family.pipeline_class} ({first_line(error)})"
        ) from error
    if not lora_layers(network, adapter):
        raise UserError(f"{key}={file}: holds no LoRA weights of the {family.denoiser}")


def _text_encoders_need_none() -> None:
    """diffusers warns of every text encoder that an adapter leaves alone; ours leave all of them alone, on purpose."""
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No LoRA keys associated to CLIP")


def _reload_float32(pipeline: Any, family: Family, file: Path, adapter: str) -> None:
    """diffusers rounds an adapter to the base weights' dtype as it loads it; this gives back the file's precision."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import set_peft_model_state_dict

    network = getattr(pipeline, family.denoiser)
    loaded = [p for name, p in network.named_parameters() if f".{adapter}" in name and ".lora_" in name]
    if all(parameter.dtype == torch.float32 for parameter in loaded):
        return
    for parameter in loaded:
        parameter.data = parameter.data.float()
    keys = {"unet_config": network.config} if family.denoiser == "unet" else {}
    state = pipeline.lora_state_dict(file.parent, weight_name=file.name, **keys)
    state = state[0] if isinstance(state, tuple) else state
    prefix = f"{family.denoiser}."
    weights = {name.removeprefix(prefix): w.float() for name, w in state.items() if name.startswith(prefix)}
    if not any("lora_A" in name for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    set_peft_model_state_dict(network, weights, adapter)


def _update_norm(layer: Any, adapter: str) -> float:
    """Frobenius norm of scaling * B A without forming the product."""
    a = layer.lora_A[adapter].weight.detach().float().flatten(1)
    b = layer.lora_B[adapter].weight.detach().float().flatten(1)
    square = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)
    return layer.scaling[adapter] * square.sqrt().item()


def stats(network: nn.Module) -> dict[str, float]:
    """`num_targets` layers hold the adapter, `num_targets_covered` of them changed; `norm` of all updates together."""
    layers = lora_layers(network)
    norms = [_update_norm(layer, ADAPTER) for layer in layers.values()]
    return {
        "num_tensors": sum(f".{ADAPTER}" in name and ".lora_" in name for name, _ in network.named_parameters()),
        "num_targets": len(layers),
        "num_targets_covered": sum(norm > 0 for norm in norms),
        "norm": float(torch.tensor(norms, dtype=torch.float64).square().sum().sqrt()),
    }


def export(pipeline: Any, family: Family, folder: Path) -> None:
    """Writes a folder that plain diffusers loads, rank, alpha and targets included."""
    from peft import get_peft_model_state_dict

    network = getattr(pipeline, family.denoiser)
    weights = {name: w.detach().cpu().contiguous() for name, w in get_peft_model_state_dict(network).items()}
    metadata = network.peft_config[ADAPTER].to_dict()
    type(pipeline).save_lora_weights(
        folder,
        weight_name=FILE,
        **{f"{family.denoiser}_lora_layers": weights, f"{family.denoiser}_lora_adapter_metadata": metadata},
    )


def export_kohya(pipeline: Any, family: Family, folder: Path) -> None:
    """Writes webui key names: lora_unet_<module path with underscores>.{lora_down.weight, lora_up.weight, alpha}.

    diffusers' own converter writes the rank as every layer's alpha, which loses a scale other than 1.

    Raises:
        UserError: a family or adapter the format cannot hold.
    """
    from safetensors.torch import save_file

    if not family.has_kohya_keys:
        raise UserError("export.format=kohya is for U-Nets; for this model ComfyUI reads format=diffusers directly")
    network = getattr(pipeline, family.denoiser)
    if network.peft_config[ADAPTER].use_dora:
        raise UserError("export.format=kohya holds no DoRA magnitudes that diffusers reads back; use format=diffusers")
    tensors: dict[str, Tensor] = {}
    for name, layer in lora_layers(network).items():
        key = "lora_unet_" + name.replace(".", "_")
        rank = layer.r[ADAPTER]
        tensors[f"{key}.lora_down.weight"] = layer.lora_A[ADAPTER].weight.detach().cpu().contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.lora_B[ADAPTER].weight.detach().cpu().contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(layer.scaling[ADAPTER] * rank))
    config = network.peft_config[ADAPTER]
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(config.lora_alpha),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE, metadata=metadata)
