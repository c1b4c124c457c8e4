"""Content hashes of a model's parts: cache keys that change when, and only when, what was computed would change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.models._load import weight_files
from diffalign.types import UserError

CHUNK = 1 << 22  # bytes read at a time
# Keys that diffusers and transformers write about where a config came from; no output depends on them.
PROVENANCE = ("_name_or_path", "_diffusers_version", "transformers_version")
SMALL_FILES = (".json", ".txt", ".model")  # configs, vocabularies, merges, sentencepiece


def component_files(folder: Path, prefixes: tuple[str, ...], variant: str | None) -> list[Path]:
    """Config, tokenizer and loaded weight files of the components whose folder name starts with a prefix."""
    files: list[Path] = []
    for component in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith(prefixes)):
        files += sorted(path for path in component.iterdir() if path.suffix in SMALL_FILES)
        files += weight_files(component, variant)
    return files


def _config(file: Path) -> bytes:
    """A component's config.json without its provenance."""
    values = json.loads(file.read_text())
    return json.dumps({k: v for k, v in values.items() if k not in PROVENANCE}, sort_keys=True).encode()


def fingerprint(folder: Path, prefixes: tuple[str, ...], variant: str | None, settings: Mapping[str, Any]) -> str:
    """blake2b over names and bytes of the files, streamed, and over the settings that change their output.

    Raises:
        UserError: the folder has gone since the model was loaded.
    """
    digest = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=16)
    try:
        for file in component_files(folder, prefixes, variant):
            if file.name == "config.json":
                digest.update(_config(file))
                continue
            digest.update(f"\0{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
    except FileNotFoundError as error:
        raise UserError(f"model.path={folder}: {error.filename} has gone since the model was loaded") from error
    return digest.hexdigest()
