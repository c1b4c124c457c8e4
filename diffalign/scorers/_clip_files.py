"""CLIP folders on disk: what must be in them, how they are read and written. Safetensors only; nothing is unpickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffalign.scorers._step_clip import Modulation
from diffalign.types import UserError

STEP_FILE = "step_aware.safetensors"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
PROCESSOR = "preprocessor_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OLD_BUFFERS = "position_ids"  # older versions of transformers saved these constants
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message that must be one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def local_folder(path: str) -> Path | None:
    """The folder that `path` names; None where it can only be a hub id.

    Raises:
        UserError: neither a folder nor of the form of a hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not path or folder.is_absolute() or path[0] in ".~" or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder; give a CLIP folder as save_pretrained writes it, or a hub id")
    return None


def check_folder(path: str, processor: str | None = None, is_step_aware: bool = False) -> None:
    """Refuses, before anything is read, a local folder that is no CLIP folder; a hub id is not looked at.

    Raises:
        UserError: what is missing, and what to do.
    """
    folder = local_folder(path)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; give a CLIP folder as save_pretrained writes it")
        kind = _model_type(folder / "config.json")
        if kind != "clip":
            raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}, not 'clip'; give a CLIPModel's folder")
        if not any((folder / name).is_file() for name in WEIGHTS):
            pickled = " (its pytorch_model.bin is a pickle)" if (folder / "pytorch_model.bin").is_file() else ""
            raise UserError(f"{folder}: no model.safetensors{pickled}; save it with safe_serialization=True")
        if is_step_aware and not (folder / STEP_FILE).is_file():
            raise UserError(
                f"{folder}: no {STEP_FILE}, so no step-aware scorer; use clip_preference, or train one with"
                " `diffalign train-scorer train_scorer.step_aware=true`"
            )
    words = local_folder(processor) if processor else folder
    if words is not None and not any((words / name).is_file() for name in TOKENIZERS):
        raise UserError(
            f"{words}: no tokenizer (tokenizer.json or vocab.json); copy its files there or name their folder as"
            " `processor`"
        )


def _model_type(path: Path) -> Any:
    try:
        return json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object; copy the folder again") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import transformers.utils.logging as switch

    level, was_on = switch.get_verbosity(), switch.is_progress_bar_enabled()
    try:
        switch.set_verbosity_error()
        switch.disable_progress_bar()
        yield
    finally:
        switch.set_verbosity(level)
        if was_on:
            switch.enable_progress_bar()


def load_clip(path: str, dtype: str = "float32") -> Any:
    """The CLIPModel of a folder or hub id, in eval mode.

    Raises:
        UserError: not to be found, broken, or with other keys than the config's network has.
    """
    from transformers import CLIPModel

    folder = local_folder(path)
    where = str(folder) if folder is not None else path
    try:
        with _quiet():
            loader: Any = CLIPModel
            model, facts = loader.from_pretrained(
                where,
                use_safetensors=True,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with their names
                local_files_only=folder is not None,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{where}: holds no CLIP model that can be read ({first_line(error)})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = (key if isinstance(key, str) else key[0] for key in facts.get(what, ()))
        odd = sorted(name for name in names if OLD_BUFFERS not in name)
        if odd:
            raise UserError(
                f"{where}: its weights do not fit its config: {len(odd)} {what.replace('_', ' ')}, first {odd[0]};"
                " copy config.json and model.safetensors of the same model"
            )
    return model.eval()


def load_modulation(path: str, clip: Any) -> Modulation:
    """The modulation beside a CLIP model, in that model's dtype.

    Raises:
        UserError: no such file, or of another tower.
    """
    made = new_modulation(clip)
    folder = local_folder(path)
    try:
        file = folder / STEP_FILE if folder is not None else _from_hub(path)
        made.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its {STEP_FILE} is missing or of another tower ({first_line(error)})") from error
    return made.to(next(clip.parameters()).dtype)


def _from_hub(path: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(path, STEP_FILE)
    except ValueError as error:  # a repository id that the hub refuses
        raise OSError(str(error)) from error


def new_modulation(clip: Any) -> Modulation:
    """A modulation for a CLIP model's vision tower, at its initial values."""
    vision = clip.config.vision_config
    return Modulation(vision.hidden_size, vision.num_hidden_layers)


def load_tokenizer(path: str) -> Any:
    """The CLIP tokenizer of a folder or hub id.

    Raises:
        UserError: there is none.
    """
    from transformers import CLIPTokenizer

    folder = local_folder(path)
    try:
        with _quiet():
            return CLIPTokenizer.from_pretrained(
                str(folder) if folder is not None else path, local_files_only=folder is not None
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: holds no CLIP tokenizer ({first_line(error)})") from error


def load_processor(path: str, side: int) -> Any:
    """CLIPImageProcessorPil as the folder's preprocessor_config.json says; CLIP's own at `side` where it has none.

    Named explicitly, because the default class rounds differently: by up to a level of 255 a pixel.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    default: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    folder = local_folder(path)
    if folder is not None and not (folder / PROCESSOR).is_file():
        return CLIPImageProcessorPil(**default)
    try:
        with _quiet():
            return CLIPImageProcessorPil.from_pretrained(
                str(folder) if folder is not None else path, local_files_only=folder is not None
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        if folder is None:
            return CLIPImageProcessorPil(**default)
        raise UserError(f"{folder / PROCESSOR}: cannot be read ({first_line(error)})") from error


def save_folder(folder: Path, clip: Any, modulation: Modulation | None, tokenizer: Any, processor: Any) -> None:
    """A folder that the scorers open: CLIP's files, and `step_aware.safetensors` where there is a modulation."""
    folder.mkdir(parents=True, exist_ok=True)
    with _quiet():
        clip.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
    if modulation is not None:
        state = {name: value.detach().cpu().contiguous() for name, value in modulation.state_dict().items()}
        save_file(state, folder / STEP_FILE)


def fingerprint(path: str, *settings: str) -> str:
    """16 hex digits of the folder's files and of what else changes a score; of a hub id's name only."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    folder = local_folder(path)
    if folder is None:
        digest.update(path.encode())
        return digest.hexdigest()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".safetensors", ".json", ".txt") and file.name != "training.json":
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()
