"""JSONL with image paths relative to the file: `prompt, chosen, rejected`, or `prompt, images, utility`."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.data._files import list_files
from diffalign.data._jsonl import JsonlRows
from diffalign.data._parse import parse_record
from diffalign.data._reader import Layout, Reader
from diffalign.data._report import BadRow
from diffalign.types import UserError


@dataclass
class Jsonl(Reader):
    """A JSONL file (or a folder of them): {"prompt": ..., "chosen": path, "rejected": path} a line.

    The general form {"prompt", "images": [paths], "utility": [numbers]} may add captions, user, split, scores and meta.
    Fields: see `Reader`.
    """

    def layout(self) -> Layout:
        """Lines of the files; images lie beside them."""
        rows = JsonlRows(list_files(self.path, ".jsonl"))
        first = next(rows.light())
        if not isinstance(first, BadRow) and not (
            {"chosen", "rejected"} <= set(first) or {"images", "utility"} <= set(first)
        ):
            file, line = rows.where(0)
            keys = ", ".join(key for key in first if key != "split")
            raise UserError(f"{file} line {line}: neither chosen and rejected nor images and utility; its keys: {keys}")
        return Layout("jsonl", rows, parse_record, True)
