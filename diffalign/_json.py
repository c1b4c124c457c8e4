"""Strict JSON for every file the toolkit writes: NaN and infinity become null, tensors become numbers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from diffalign._atomic import write_atomic


def finite(value: Any) -> Any:
    """`value` as plain JSON types: non-finite floats become None, arrays lists, dataclasses mappings, paths text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return finite(asdict(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return finite(value.tolist())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def to_json(value: Any, indent: int | None = None) -> str:
    """One line (or indented) of standard JSON: no NaN, no Infinity, no lone surrogates."""
    return json.dumps(finite(value), allow_nan=False, indent=indent, ensure_ascii=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` indented, whole or not at all: readers never meet half a file."""
    write_atomic(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file's value, {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}
