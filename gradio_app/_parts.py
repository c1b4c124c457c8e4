"""Presentation that several tabs share."""

from __future__ import annotations

import base64
import html
import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr
from PIL import Image

from diffalign import api


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong inside is a message in the page: the user's mistakes as they are, failures with their kind.

    Raises:
        gr.Error: in place of both.
    """
    try:
        yield
    except api.UserError as error:
        raise gr.Error(escape(str(error)), title="Please check", print_exception=False) from None
    except (OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        traceback.print_exc(file=sys.stderr)
        raise gr.Error(escape(f"{type(error).__name__}: {error}"), title="Failed", print_exception=False) from None


def escape(text: object) -> str:
    """Any text, safe inside an element or a quoted attribute."""
    return html.escape(str(text), quote=True)


def data_uri(image: Image.Image, width: int | None = None) -> str:
    """A picture inside the page, no wider than `width`; small ones without loss, larger ones as JPEG."""
    if width is not None and image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    kind = "png" if image.width * image.height <= 128 * 128 else "jpeg"
    out = io.BytesIO()
    image.convert("RGB").save(out, format=kind, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def empty(title: str, text: str) -> str:
    """What a tab shows where there is nothing yet: what is missing, and how to get it. `text` may hold HTML."""
    return f'<div class="da-empty"><div class="da-empty-title">{escape(title)}</div><div>{text}</div></div>'
