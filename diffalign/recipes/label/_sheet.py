"""The contact sheet of a labelling: the least and the most certain records with pictures and scores, one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign._atomic import write_atomic
from diffalign._json import finite
from diffalign._page import render
from diffalign._pictures import embed
from diffalign.recipes.label._records import record_of
from diffalign.recipes.label._scores import Scored
from diffalign.recipes.label._survey import Entry
from diffalign.sections import Label

BUDGET = 3_000_000  # characters of embedded images in each half


def write_sheet(
    path: Path,
    facts: dict[str, Any],
    least: Sequence[Entry],
    most: Sequence[Entry],
    queued: set[tuple[int, tuple[int, ...]]],
    scored: Scored,
    settings: Label,
) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UserError: an image that cannot be read.
    """
    parts = [
        {"title": title, "rows": _rows(entries, queued, scored, settings), "num": len(entries)}
        for title, entries in (("Least certain", least), ("Most certain", most))
    ]
    page = render(
        "label.html.j2",
        title=f"Labels: {facts['label']}",
        numbers="label.json",
        warnings=[],
        facts=finite(facts),
        parts=parts,
    )
    write_atomic(path, page)


def _rows(
    entries: Sequence[Entry], queued: set[tuple[int, tuple[int, ...]]], scored: Scored, settings: Label
) -> list[dict[str, Any]]:
    """For the template; only as many as fit."""
    plain = replace(scored, captions=None)  # captions are not shown
    records = [record_of(plain, settings, entry.rows, entry.choice) for entry in entries]
    rows = []
    embedded = embed([record.images for record in records], BUDGET)
    for entry, record, images in zip(entries, records, embedded, strict=False):
        cells = [
            {
                "uri": uri,
                "pixel": is_pixel_art,
                "utility": record.utility[place],
                "outcome": _outcome(entry, place, len(images)),
                "scores": {name: values[place] for name, values in record.scores.items()},
            }
            for place, (uri, is_pixel_art) in enumerate(images)
        ]
        state = "to people" if entry.key in queued else "" if entry.choice.is_decided else "no label"
        rows.append({"prompt": record.prompt, "cells": cells, "probability": entry.choice.probability, "state": state})
    return rows


def _outcome(entry: Entry, place: int, num: int) -> str:
    """What a cell's frame says: the better and the worse of a clear pair."""
    if num != 2 or not entry.choice.is_decided:
        return ""
    return "won" if place == 0 else "lost"
