"""Prompts one at a time: a file of any length is never held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Protocol

from diffalign.data import prompt_rows, read_prompts
from diffalign.types import UserError


class PromptSequence(Sized, Protocol):
    """Prompts in order, as often as they are asked for: a list is one."""

    def __iter__(self) -> Iterator[str]: ...


class FilePrompts:
    """The prompts of a text or JSONL file, read anew on every pass.

    Args:
        path: a prompt per line, or (`.jsonl`) an object with `prompt` or `caption` per line; blank lines are none.
        key: the config key, for messages.

    Raises:
        UserError: no prompts, no UTF-8, or a line without a prompt.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._num = sum(1 for _ in self)
        if not self._num:
            raise UserError(f"{key}: {path} holds no prompts")

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[str]:
        return (text for text, _ in prompt_rows(self.path, self.key))


def open_prompts(spec: Any, key: str) -> PromptSequence:
    """What `read_prompts` reads, without holding a file's prompts in memory.

    Raises:
        UserError: as `read_prompts`.
    """
    if isinstance(spec, str) and Path(spec).is_file():
        return FilePrompts(Path(spec), key)
    return read_prompts(spec, key)


def digest(prompts: PromptSequence) -> str:
    """A hash of the prompts in their order: the same pictures need the same."""
    found = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        found.update(prompt.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()
