"""Prompt lists: a text file, JSONL, or the sprites grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from diffalign.types import UserError


def read_prompts(spec: str | None, key: str) -> list[str]:
    """The prompts that a config key names, in order.

    Args:
        spec: a text file with a prompt per line, a JSONL file whose lines hold `prompt` (or `caption`), or
            `sprites:<train|heldout>:<number>[:<kind>]`.
        key: the config key, for messages.

    Raises:
        UserError: no such file, no prompts, or a line without a prompt.
    """
    if not spec:
        raise UserError(f"{key} is missing: a text file with a prompt per line, a JSONL file, or sprites:heldout:100")
    if spec.startswith("sprites:"):
        return _sprites(spec, key)
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"{key}: no such file: {spec}")
    try:
        prompts = list(_jsonl(path) if path.suffix == ".jsonl" else _lines(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {spec} is not UTF-8 text") from error
    if not prompts:
        raise UserError(f"{key}: {spec} holds no prompts")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (line.strip() for line in lines if line.strip())


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield str(row["prompt"] if "prompt" in row else row["caption"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: line {number} is no JSON object with `prompt`") from error


def _sprites(spec: str, key: str) -> list[str]:
    from diffalign.sprites.scene import KINDS, prompts

    _, split, number, *kind = [*spec.split(":"), "", ""][:5]
    wanted = kind[0] or None
    if split not in ("train", "heldout") or not number.isdigit() or (wanted and wanted not in KINDS):
        raise UserError(f"{key}={spec}: write sprites:<train|heldout>:<number>[:<{'|'.join(KINDS)}>]")
    return prompts(int(number), seed=0, split=split, **({"kind": wanted} if wanted else {}))
