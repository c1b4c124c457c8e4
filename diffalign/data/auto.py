"""Finds out how a data set is laid out and reads it: what `source.data.path` alone asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import registry
from diffalign.data._files import is_remote, list_files, open_binary
from diffalign.data._reader import Layout, Reader
from diffalign.types import UserError

LEGAL = "a Pick-a-Pic or record Parquet, a JSONL file, a folder of either, a folder with w/ and l/, or votes.db"


def _parquet_name(file: str) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_binary(file) as handle:
        if handle.seek(0, 2) == 0:
            raise UserError(f"{file}: the file is empty")
        handle.seek(0)
        try:
            columns = pq.ParquetFile(handle).schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a Parquet file ({str(error).splitlines()[0][:120]})") from error
    if "jpg_0" in columns or "label_0" in columns:
        return "pickapic"
    if "images" in columns or "utility" in columns:
        return "records"
    raise UserError(
        f"{file}: neither Pick-a-Pic columns (jpg_0, jpg_1, label_0, caption) nor record columns (prompt, images, "
        f"utility); it has {', '.join(columns)}"
    )


def _detect(path: str | Path) -> str:
    """The name of the reader that fits `path`."""
    text = str(path)
    if text.endswith(".jsonl"):
        return "jsonl"
    if text.endswith((".db", ".sqlite")):
        return "votes"
    if is_remote(text) or text.endswith(".parquet"):
        return _parquet_name(list_files(path, ".parquet")[0])
    folder = Path(path)
    if not folder.exists():
        raise UserError(f"{folder}: no such file or folder; set source.data.path")
    if not folder.is_dir():
        raise UserError(f"{folder}: the layout is not recognised; known are {LEGAL}")
    if (folder / "w").is_dir() or (folder / "l").is_dir():
        return "folders"
    for suffix in (".parquet", ".jsonl"):
        if any(folder.rglob(f"*{suffix}")):
            return _detect(list_files(folder, suffix)[0])
    raise UserError(f"{folder}: the layout is not recognised; known are {LEGAL}")


@dataclass
class Auto(Reader):
    """Any layout the other readers know, found out from `path`: their records and fingerprint. Fields: see `Reader`."""

    def layout(self) -> Layout:
        """The layout of the reader that fits."""
        kind: Any = registry.find("data", _detect(self.path))
        return kind.layout(self)  # a layout needs the path only
