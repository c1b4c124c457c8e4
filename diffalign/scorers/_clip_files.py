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

from diffalign.scorers import _open_clip
from diffalign.scorers._checkpoint import SUFFIXES, file_fingerprint, first_line
from diffalign.scorers._clip_pixels import clip_processor
from diffalign.scorers._step_clip import Modulation
from diffalign.types import UserError

STEP_FILE = "step_aware.safetensors"
HEAD_FILE = "preference_head.safetensors"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
PROCESSOR = "preprocessor_config.json"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
OLD_BUFFERS = "position_ids"  # older versions of transformers saved these constants
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OF_WORDS = ("*.json", "*.txt")  # of a hub's folder, what tokenizer and processor need
OF_WEIGHTS = (*OF_WORDS, "model.safetensors", "model-*.safetensors", STEP_FILE, HEAD_FILE)


def local_folder(path: str) -> Path | None:
    """The folder that `path` names; None where it can only be a hub id.

    Raises:
        UserError: neither a folder nor of the form of a hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not path or folder.is_absolute() or path[0] in ".~" or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such folder; give one as save_pretrained writes it, or a hub id")
    return None


def lone_file(path: str) -> Path | None:
    """The weights file that `path` names, with no folder's config taken for granted; None for folders and hub ids.

    Raises:
        UserError: a file's name, and no such file.
    """
    file = Path(path).expanduser()
    if file.suffix not in SUFFIXES or file.is_dir():
        return None
    if not file.is_file():
        raise UserError(f"{file}: no such weights file")
    return file


def has_words(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def folder_of(path: str, patterns: tuple[str, ...]) -> Path:
    """The local folder of a folder's path or a hub id, whose files of these patterns are downloaded if need be.

    Raises:
        UserError: neither, or the hub does not give it.
    """
    folder = local_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return Path(snapshot_download(path, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise UserError(
            f"{path}: no local folder, not in the local hub cache, and the hub does not give it ({first_line(error)});"
            " download it elsewhere and name its folder"
        ) from error


def check_folder(path: str, processor: str | None = None, is_step_aware: bool = False) -> None:
    """Refuses, before anything is read, a local folder that is no CLIP folder; a hub id is not looked at.

    Raises:
        UserError: what is missing, and what to do.
    """
    folder = local_folder(path)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; give a CLIP folder as save_pretrained writes it")
        kind = model_type(folder / "config.json")
        if kind != "clip":
            raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}, not 'clip'; give a CLIPModel's folder")
        if not any((folder / name).is_file() for name in WEIGHTS):
            pickled = " (its pytorch_model.bin is a pickle)" if (folder / "pytorch_model.bin").is_file() else ""
            raise UserError(
                f"{folder}: no model.safetensors{pickled}; save it with safe_serialization=True, or name the file"
                " itself"
            )
        if is_step_aware and not (folder / STEP_FILE).is_file():
            raise UserError(
                f"{folder}: no {STEP_FILE}, so no step-aware scorer; use clip_preference, or train one with"
                " `diffalign train-scorer train_scorer.step_aware=true`"
            )
    check_words(processor or path)


def check_words(path: str) -> None:
    """Refuses a local folder without a tokenizer; a hub id is not looked at.

    Raises:
        UserError: what is missing, and what to do.
    """
    words = local_folder(path)
    if words is not None and not has_words(words):
        raise UserError(
            f"{words}: no tokenizer (tokenizer.json or vocab.json); copy its files there or name their folder as"
            " `processor`"
        )


def model_type(path: Path) -> Any:
    """What a config.json says its network is.

    Raises:
        UserError: no JSON object.
    """
    try:
        return json.loads(path.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a JSON object; copy the folder again") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
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


def load_clip(path: str, dtype: str = "float32", architecture: str | None = None) -> Any:
    """The CLIPModel of a folder, hub id or weights file, in eval mode.

    Args:
        path: of a weights file, the sizes are those of a config.json beside it, else of `architecture`.
        dtype: of the weights.
        architecture: an open_clip model of these sizes.

    Raises:
        UserError: not to be found, broken, or with other keys than the config's network has.
    """
    from transformers import CLIPModel

    file = lone_file(path)
    if file is not None:
        return _open_clip.load_file(file, _open_clip.config_of(file, architecture), DTYPES[dtype])
    return load_model(CLIPModel, folder_of(path, OF_WEIGHTS), dtype)


def load_model(kind: Any, folder: Path, dtype: str, ignore: str = OLD_BUFFERS) -> Any:
    """A transformers network of a folder's config and safetensors, in eval mode; float16 files are computed in `dtype`.

    Args:
        kind: its class.
        folder: as save_pretrained writes it.
        dtype: of the weights.
        ignore: names with this in them may be missing, or too many.

    Raises:
        UserError: broken, or with other keys than the config's network has.
    """
    try:
        with quiet():
            model, facts = kind.from_pretrained(
                str(folder),
                use_safetensors=True,
                dtype=DTYPES[dtype],
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with their names
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        name = kind.__name__.removesuffix("Model").upper()
        raise UserError(f"{folder}: holds no {name} model that can be read ({first_line(error)})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = (key if isinstance(key, str) else key[0] for key in facts.get(what, ()))
        odd = sorted(name for name in names if ignore not in name)
        if odd:
            raise UserError(
                f"{folder}: its weights do not fit its config: {len(odd)} {what.replace('_', ' ')},"
                f" first {', '.join(odd[:5])}; copy config.json and model.safetensors of the same model"
            )
    return model.eval()


def load_modulation(path: str, clip: Any) -> Modulation:
    """The modulation beside a CLIP model, in that model's dtype.

    Raises:
        UserError: no such file, or of another tower.
    """
    made = new_modulation(clip)
    folder = folder_of(path, OF_WEIGHTS)
    try:
        # released models have no confidence: theirs is 1
        made.load_state_dict(made.log_confidence.state_dict(prefix="log_confidence.") | load_file(folder / STEP_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: its {STEP_FILE} is missing or of another tower ({first_line(error)})") from error
    return made.to(next(clip.parameters()).dtype)


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

    folder = folder_of(path, OF_WORDS)
    try:
        with quiet():
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: holds no CLIP tokenizer ({first_line(error)})") from error


def load_processor(path: str, side: int) -> Any:
    """CLIPImageProcessorPil as the folder's preprocessor_config.json says; CLIP's own at `side` where it has none.

    Named explicitly, because the default class rounds differently: by up to a level of 255 a pixel.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = folder_of(path, OF_WORDS)
    if not (folder / PROCESSOR).is_file():
        return clip_processor(side)
    try:
        with quiet():
            return CLIPImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / PROCESSOR}: cannot be read ({first_line(error)})") from error


def save_folder(folder: Path, clip: Any, modulation: Modulation | None, tokenizer: Any, processor: Any) -> None:
    """A folder that the scorers open: CLIP's files, and `step_aware.safetensors` where there is a modulation."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        clip.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
    if modulation is not None:
        state = {name: value.detach().cpu().contiguous() for name, value in modulation.state_dict().items()}
        save_file(state, folder / STEP_FILE)


def fingerprint(path: str, words: str, *settings: str) -> str:
    """16 hex digits of the weights at `path`, of the tokenizer and processor at `words`, and of the settings.

    A hub id is downloaded for it: a name alone does not say which weights gave a score.

    Raises:
        UserError: see `folder_of`.
    """
    file = lone_file(path)
    folder = file.parent if file is not None else folder_of(path, OF_WEIGHTS)
    found = [file, folder / "config.json"] if file is not None else _of_kinds(folder, ".safetensors", ".json", ".txt")
    apart = [] if words == path else _of_kinds(folder_of(words, OF_WORDS), ".json", ".txt")
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for each in [*found, *apart]:
        if each.is_file() and each.name != "training.json":
            digest.update(f"\0{each.name}\0{file_fingerprint(each)}\0".encode())
    return digest.hexdigest()


def _of_kinds(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes)
