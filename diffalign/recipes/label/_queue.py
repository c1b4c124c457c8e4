"""Pairs that go to people instead: a ballot as rollouts write it, and the records of its votes.

`queue/` below the records' folder holds images/, ballot.jsonl ({id, prompt, images}, what a voting page shows),
queue.jsonl (the same ids with files, scores and probability, for whoever wants to know) and, once somebody wrote it,
votes.jsonl in the format of `source.votes`. The images of a pair are in an order that says nothing about its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from diffalign import randomness
from diffalign._atomic import sweep, write_atomic
from diffalign._json import to_json
from diffalign.data import RecordWriter
from diffalign.recipes.label._records import has_captions, images_of, record_of
from diffalign.recipes.label._scores import Scored
from diffalign.recipes.label._survey import Entry
from diffalign.sections import Label
from diffalign.sources import _votes

IMAGES = "images"


def _shown(entry: Entry, settings: Label) -> Entry:
    """The pair in the order in which people see it."""
    if randomness.address("ballot", settings.seed, *(row["file"] for row in entry.rows)) % 2:
        return entry
    choice, chance = entry.choice, entry.choice.probability
    turned = replace(choice, places=choice.places[::-1], probability=None if chance is None else 1 - chance)
    return replace(entry, rows=entry.rows[::-1], choice=turned)


def ballot(entries: Sequence[Entry], settings: Label) -> dict[str, Entry]:
    """id -> pair as shown, the least certain first."""
    return {_votes.ballot_id(*divmod(n, 1000)): _shown(entry, settings) for n, entry in enumerate(entries)}


def write_queue(folder: Path, pairs: dict[str, Entry], scored: Scored, settings: Label) -> None:
    """Images, queue.jsonl and the ballot, in this order: where there is a ballot, all is there.

    Raises:
        UserError: an image that cannot be read.
    """
    for place in (folder, folder / IMAGES):
        sweep(place)
    names: dict[str, list[str]] = {}
    for name, entry in pairs.items():
        images = images_of(scored, settings, entry.rows)
        suffixes = [Path(row["file"]).suffix for row in entry.rows]
        names[name] = [f"{IMAGES}/{name}-{place}{suffix}" for place, suffix in enumerate(suffixes)]
        for file, data in zip(names[name], images, strict=True):
            if not (folder / file).is_file():
                write_atomic(folder / file, data)
    lines = (
        to_json(
            {
                "id": name,
                "prompt": entry.rows[0]["prompt"],
                "files": [row["file"] for row in entry.rows],
                "scores": [row.get("scores", {}) for row in entry.rows],
                "probability": entry.choice.probability,
                "is_decided": entry.choice.is_decided,
            }
        )
        for name, entry in pairs.items()
    )
    write_atomic(folder / "queue.jsonl", "".join(line + "\n" for line in lines))
    _votes.write_ballot(folder, ((name, entry.rows[0]["prompt"], names[name]) for name, entry in pairs.items()))


def write_voted(folder: Path, out: Path, pairs: dict[str, Entry], scored: Scored, settings: Label) -> int | None:
    """Records of the votes, once there is a votes.jsonl; how many, None before. Votes that come later do not count.

    Raises:
        WaitsForVotes: pairs without a vote, and no line {"done": true}.
        UserError: a vote that cannot be read.
    """
    if not (folder / _votes.VOTES).is_file():
        return None
    tally = _votes.counted(folder, dict.fromkeys(pairs, 2), True, lambda: None)
    with RecordWriter(out, resume=True) as writer:
        done = int((writer.state or {}).get("place", -1))
        for place, (name, entry) in enumerate(pairs.items()):
            if place <= done or name not in tally or not has_captions(scored, entry.rows):
                continue
            first, second = (float(value) for value in tally[name])
            rows = entry.rows if first >= second else entry.rows[::-1]
            choice = replace(entry.choice, utility=(max(first, second), min(first, second)), probability=None)
            record = record_of(scored, replace(settings, labels="hard"), rows, choice, "votes")
            writer.write(record, state={"place": place})
        return writer.num_written
