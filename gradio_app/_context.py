"""What all tabs share: the settings, the folders that may be read, and who is asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffalign import api

DEFAULT_MODEL = "sprites-sdxl"  # needs neither weights nor a GPU


@dataclass(frozen=True)
class Context:
    """One app. Nothing of a visitor is kept here: drafts live in the page's state."""

    config: api.Config
    tokens: tuple[str, ...]  # the configs and keys that the app was started with
    folder: Path  # absolute; what the app writes is below it
    roots: tuple[Path, ...]  # absolute, links resolved; what the app reads is below one of them

    @property
    def settings(self) -> Any:
        """Section `app`."""
        return self.config.app

    def below(self, text: str | Path) -> Path:
        """The path behind a visitor's words, links resolved.

        Raises:
            UserError: it lies outside the folders that the app was given, or there is nothing.
        """
        said = str(text).strip()
        try:
            path = Path(said).resolve() if said else None
            is_there = path is not None and path.exists()
        except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a circle of links
            path, is_there = None, False
        if path is None or not any(path.is_relative_to(root) for root in self.roots):
            shown = ", ".join(map(str, self.roots))
            raise api.UserError(f"{said[:200]!r} is not below the folders of this app ({shown}): see app.roots")
        if not is_there:
            raise api.UserError(f"{said[:200]}: no such file or folder")
        return path

    def rater(self, request: gr.Request | None) -> str | None:
        """The name that a visitor logged in with; None where the app has no password."""
        return None if request is None else request.username


def open_context(tokens: Sequence[str]) -> Context:
    """The context of an app that is started with these configs and keys; its folder is made.

    Raises:
        UserError: a config or key that does not fit, or a folder that cannot be written.
    """
    tokens = tuple(tokens)
    config = api.configure(configs=tokens)
    if config.model is None:
        tokens = (DEFAULT_MODEL, *tokens)
        config = api.configure(configs=tokens)
    folder = Path(config.app.folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise api.UserError(f"app.folder={config.app.folder}: {error.strerror}") from error
    roots = dict.fromkeys([folder, *(Path(root).resolve() for root in config.app.roots)])
    return Context(config, tokens, folder, tuple(roots))
