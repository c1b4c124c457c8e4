"""The files of data sets: finding them below folders, what they are recognised by, and where their links lead."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

DEPTH = 6  # folders below a root
MAX_ENTRIES = 20_000  # looked at
FIRST_LINE = 1 << 16  # bytes of a JSONL file that are looked at
SHARD = re.compile(r"-\d+(-of-\d+)?\.parquet$")  # one of several that make a data set
KEYS = ({"chosen", "rejected"}, {"images", "utility"})


def check_links(path: Path, below: Callable[[Path], Path]) -> None:
    """Asks `below` about a data set and, of mirrored folders, about every link in them."""
    below(path)
    for side in (path / "w", path / "l"):
        if side.is_dir():
            below(side)
            for entry in os.scandir(side):
                if entry.is_symlink():
                    below(Path(entry.path))


def fingerprint(layout: Any) -> str:
    """32 hex digits that change with the data: of its files by names, sizes and times of change, cheap for many."""
    files = getattr(layout.rows, "files", None)
    digest = hashlib.blake2b(layout.name.encode(), digest_size=16)
    if files is None:
        lines: Iterator[str] = iter(layout.rows.stamps())
    else:
        lines = (f"{os.path.basename(file)}|{(s := os.stat(file)).st_size}|{s.st_mtime_ns}" for file in files)
    for line in lines:
        digest.update(f"\n{line}".encode())
    return digest.hexdigest()


def find_data_sets(roots: Iterable[Path]) -> list[Path]:
    """What looks like preference data below the roots: Parquet (the folder, where it is in shards), JSONL, w/ and l/,
    votes.

    Neither links nor hidden and unfinished folders are followed; a very large tree is looked at in part.
    """
    found: dict[Path, None] = {}
    rest = [(root, 0) for root in roots]
    num = 0
    while rest and num < MAX_ENTRIES:
        folder, depth = rest.pop(0)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue  # not ours to read
        num += len(entries)
        folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        files = [Path(entry.path) for entry in entries if entry.is_file(follow_symlinks=False)]
        if {"w", "l"} <= folders:
            found[folder] = None
        if any(SHARD.search(file.name) for file in files):
            found[folder] = None
        found |= {file: None for file in files if _is_data(file)}
        if depth < DEPTH:
            shown = (name for name in sorted(folders) if not name.startswith(".") and not name.endswith(".partial"))
            rest += [(folder / name, depth + 1) for name in shown if name not in ("w", "l")]
    return sorted(found)


def _is_data(file: Path) -> bool:
    if file.suffix != ".jsonl":
        return file.name == "votes.db" or (file.suffix == ".parquet" and not SHARD.search(file.name))
    try:
        with open(file, "rb") as lines:
            first = json.loads(lines.readline(FIRST_LINE))
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and any(keys <= set(first) for keys in KEYS)
