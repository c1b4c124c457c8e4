"""Mirrored folders: `w/` holds winners, `l/` losers of the same file name, captions in `.txt` beside the winners."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.data._files import stamp_image
from diffalign.data._parse import Draft
from diffalign.data._reader import Layout, Reader
from diffalign.types import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def _images_in(folder: Path) -> dict[str, str]:
    """Stem -> suffix of the images, in order; the first suffix wins where one stem has two."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(Path(name).stem, Path(name).suffix)
    return found


class _FolderRows:
    """One row per file name that occurs in either folder. Holds the names in memory, not the files."""

    def __init__(self, root: Path) -> None:
        for side in ("w", "l"):
            if not (root / side).is_dir():
                raise UserError(f"{root}: no folder {side}/ in it (winners go to w/, losers to l/ under the same name)")
        self.root = root
        self._winners, self._losers = _images_in(root / "w"), _images_in(root / "l")
        self._stems = sorted(self._winners.keys() | self._losers.keys())
        if not self._stems:
            raise UserError(f"{root}: no images in w/ and l/; known are {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return len(self._stems)

    def where(self, index: int) -> tuple[str, str]:
        return str(self.root / "w"), self._stems[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        stem = self._stems[index]
        text = self.root / "w" / f"{stem}.txt"
        return {
            "winner": self.root / "w" / f"{stem}{self._winners[stem]}" if stem in self._winners else None,
            "loser": self.root / "l" / f"{stem}{self._losers[stem]}" if stem in self._losers else None,
            "caption": text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else None,
        }

    def light(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def stamps(self) -> Iterator[str]:
        """Of the captions; the images are stamped one by one by the reader."""
        return (f"{stem}|{stamp_image(self.root / 'w' / f'{stem}.txt')}" for stem in self._stems)


def _parse(row: Mapping[str, Any], base: Path) -> Draft:
    return Draft(prompt=row["caption"], images=(row["winner"], row["loser"]), utility=(1.0, 0.0))


@dataclass
class Folders(Reader):
    """A folder with `w/` and `l/`. A name that only one of them has is a bad row. Fields: see `Reader`."""

    def layout(self) -> Layout:
        """Pairs of files."""
        return Layout("folders", _FolderRows(Path(self.path)), _parse, True)
