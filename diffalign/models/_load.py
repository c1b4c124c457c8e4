"""Finds a diffusers pipeline on disk or on the hub and loads it, with one clear line for each way it can be wrong."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from diffalign import registry
from diffalign.models._config import ModelConfig
from diffalign.models._quiet import no_bars
from diffalign.types import UserError

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BAR_FROM = 1 << 28  # bytes of weights whose loading is worth a progress bar
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message that must be one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def find_folder(config: ModelConfig) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """The pipeline's folder, and for a tiny twin the temporary folder that must outlive the model.

    Raises:
        UserError: no such folder, package or hub model.
    """
    path = config.path
    if path == "tiny":
        temporary = tempfile.TemporaryDirectory(prefix="diffalign-tiny-")
        return type(config).family.build_tiny(temporary.name), temporary
    if path.startswith("package:"):
        return _package_folder(path), None
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.is_absolute() or path[0] in ".~" or not HUB_ID.fullmatch(path):
        raise UserError(f"model.path={path}: no such folder; give a diffusers folder, a hub id or 'tiny'")
    return _hub_folder(config), None


def _package_folder(path: str) -> Path:
    package, _, inner = path.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path={path}: no package {package!r}; write package:some.package/folder")
    folder = Path(spec.submodule_search_locations[0]) / inner
    if not folder.is_dir():
        raise UserError(f"model.path={path}: the package {package!r} has no folder {inner!r}")
    return folder


def _hub_folder(config: ModelConfig) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(
            DiffusionPipeline.download(
                config.path, revision=config.revision, variant=config.variant, use_safetensors=True
            )
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={config.path}: neither a local folder nor loadable from the hub ({first_line(error)})"
        ) from error


def _index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"model.path={folder}: no model_index.json; this is not a diffusers pipeline folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({first_line(error)})") from error


def _check_class(folder: Path, found: str, expected: str) -> None:
    if found == expected:
        return
    for name in registry.names("model"):
        config: Any = registry.find("model", name)
        if config.family.pipeline_class == found:
            raise UserError(f"model.path={folder} holds a {found}: use the model {name!r} for it")
    raise UserError(f"model.path={folder} holds a {found or 'pipeline without a class'}, not a {expected}")


def weight_files(component: Path, variant: str | None) -> list[Path]:
    """The safetensors files that diffusers loads from a component's folder: those of the variant, if it has them."""
    files = sorted(component.glob("*.safetensors"))
    # model.fp16.safetensors, model.fp16-00001-of-00002.safetensors; without a variant the stem has no dot
    chosen = [file for file in files if variant and re.search(rf"\.{re.escape(variant)}(-\d+-of-\d+)?$", file.stem)]
    return chosen or [file for file in files if "." not in file.stem]


def _names_class(index: dict[str, Any], component: str) -> bool:
    """Whether model_index.json says that the pipeline has the component; absent ones are null or left out."""
    value = index.get(component)
    return isinstance(value, list) and value[0] is not None


def _check_components(folder: Path, index: dict[str, Any], config: ModelConfig) -> None:
    """Missing folders and broken weight files by name, before anything is loaded."""
    for name in index:
        if not _names_class(index, name) or name in config.family.load_options:
            continue
        component = folder / name
        if not component.is_dir():
            raise UserError(f"model.path={folder}: the component folder {name!r} is missing")
        if name.startswith(("unet", "transformer", "vae", "text_encoder")) and not any(component.glob("*.safetensors")):
            raise UserError(f"{component}: no safetensors file; other weight formats are not read")
    for required in (config.family.denoiser, "vae", "text_encoder", "tokenizer", "scheduler"):
        if not _names_class(index, required):
            raise UserError(f"model.path={folder}: model_index.json names no {required!r}")


def _read_headers(folder: Path, config: ModelConfig) -> set[str]:
    """The names of the denoiser's weights on disk. Reads headers only, which also finds truncated files by name."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for component in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in weight_files(component, config.variant):
            try:
                with safe_open(str(file), framework="pt") as tensors:
                    if component.name == config.family.denoiser:
                        names.update(tensors.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: a broken safetensors file ({first_line(error)}); fetch it again") from error
    return names


def _check_complete(network: torch.nn.Module, names: set[str], where: Path) -> None:
    """diffusers gives weights that a file lacks random values with no more than a warning."""
    missing = [name for name, _ in network.named_parameters() if name not in names]
    if missing:
        raise UserError(f"{where}: {len(missing)} weights are missing from the files, the first is {missing[0]!r}")


def load_pipeline(folder: Path, config: ModelConfig) -> Any:
    """The diffusers pipeline, each component in its own dtype: a component is never rounded and then widened.

    Raises:
        UserError: not a pipeline of this family, a missing component or a broken file.
    """
    import diffusers
    from safetensors import SafetensorError

    family = config.family
    index = _index(folder)
    _check_class(folder, str(index.get("_class_name", "")), family.pipeline_class)
    _check_components(folder, index, config)
    names = _read_headers(folder, config)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    logger.info("loading %s (%.1f GB) from %s", family.pipeline_class, size / 1e9, folder)
    has_bar = size >= BAR_FROM and sys.stderr.isatty()
    frozen = DTYPES[config.dtype]
    try:
        with nullcontext() if has_bar else no_bars():
            pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
                folder,
                variant=config.variant,
                use_safetensors=True,
                dtype={
                    "default": frozen,
                    "vae": DTYPES[config.vae_dtype],
                    family.denoiser: torch.float32 if config.trainable == "full" else frozen,
                },
                **family.load_options,
                **{name: None for name in family.may_be_absent if not _names_class(index, name)},
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, SafetensorError) as error:
        raise UserError(f"model.path={folder}: diffusers cannot load it ({first_line(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    _check_complete(getattr(pipeline, family.denoiser), names, folder / family.denoiser)
    _check_vae(pipeline.vae, folder)
    return pipeline


def _check_vae(vae: Any, folder: Path) -> None:
    if getattr(vae.config, "latents_mean", None) is not None:
        raise UserError(f"{folder}/vae: per-channel latents_mean is not supported; use a VAE with a scaling_factor")
