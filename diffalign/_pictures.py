"""Pictures for people: sample grids during training, and images inside an HTML page under a size budget."""

from __future__ import annotations

import base64
import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.types import UserError

MAX_SIDES = ((320, 85), (256, 80), (192, 75), (128, 70), (96, 60))  # (pixels, JPEG quality), tried until all fit
_PIXEL_ART = 96  # images up to this side stay PNG and are drawn with hard pixels


def open_image(image: Any) -> Any:
    """A PIL image in RGB from a PIL image, a path, or encoded bytes.

    Raises:
        UserError: the file is missing or is no image.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        where = "an image given as bytes" if isinstance(image, bytes) else os.fspath(image)
        raise UserError(
            f"{where}: cannot be read as an image ({error.__class__.__name__}); remove or redo it"
        ) from error


def data_uri(image: Any, max_side: int, quality: int) -> tuple[str, bool]:
    """(data URI, whether it is pixel art) of an image shrunk to `max_side`; small ones stay exact as PNG."""
    picture = open_image(image)
    is_pixel_art = max(picture.size) <= _PIXEL_ART
    picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    if is_pixel_art:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
    kind = "png" if is_pixel_art else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", is_pixel_art


def embed(rows: Sequence[Sequence[Any]], budget: int) -> list[list[tuple[str, bool]]]:
    """Data URIs of rows of images, at the largest size at which all rows fit into `budget` characters.

    If even the smallest does not fit, the result holds only as many leading rows as do. One image is open at a time.
    """
    embedded: list[list[tuple[str, bool]]] = []
    for max_side, quality in MAX_SIDES:
        embedded, used = [], 0
        for row in rows:
            uris = [data_uri(image, max_side, quality) for image in row]
            used += sum(len(uri) for uri, _ in uris)
            if used > budget:
                break
            embedded.append(uris)
        if len(embedded) == len(rows):
            break
    return embedded


def image_grid(
    images: Sequence[Any], rows: int, cols: int, labels: Sequence[str] | None, path: str | Path, *, min_side: int = 128
) -> Path:
    """Writes images, row by row, as one PNG.

    Args:
        images: at most rows * cols PIL images, paths or encoded bytes; missing ones leave white cells.
        labels: a caption per row, usually its prompt, wrapped above the row; None for none.
        min_side: smaller images are enlarged by a whole factor, with hard pixels.

    Raises:
        UserError: an image cannot be read.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert rows > 0 and cols > 0 and 0 < len(images) <= rows * cols, (len(images), rows, cols)
    assert labels is None or len(labels) == rows, "one label per row"
    pictures = [open_image(image) for image in images]
    side = max(max(picture.size) for picture in pictures)
    factor = max(1, min_side // side)
    width = max(picture.width for picture in pictures) * factor
    height = max(picture.height for picture in pictures) * factor
    gap, font_size = 4, 14
    font = ImageFont.load_default(font_size)
    per_line = max(8, int((cols * (width + gap)) / (0.55 * font_size)))
    captions = [textwrap.wrap(" ".join(label.split()), per_line)[:3] for label in labels or [""] * rows]
    line = font_size + 4
    tops, y = [], gap
    for caption in captions:
        tops.append(y)
        y += len(caption) * line + height + gap
    canvas = Image.new("RGB", (cols * (width + gap) + gap, y), "white")
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        for number, text in enumerate(caption):
            draw.text((gap, tops[row] + number * line), text, fill="black", font=font)
    for index, picture in enumerate(pictures):
        row, col = divmod(index, cols)
        large = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        left = gap + col * (width + gap) + (width - large.width) // 2
        top = tops[row] + len(captions[row]) * line + (height - large.height) // 2
        canvas.paste(large, (left, top))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    canvas.save(part, "PNG")
    os.replace(part, path)
    return path
