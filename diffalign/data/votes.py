"""Votes of people, as `diffalign app` collects them: a preference record per vote.

The utilities of a vote are the shares of its comparisons that a picture wins: (1, 0) for a pair, (0.5, 0.5) for a tie,
(1, 0.5, 0) for a ranking of three, (0, 0) where both are bad. The rater is the record's user.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.data._parse import Draft
from diffalign.data._reader import Layout, Reader
from diffalign.types import UserError
from diffalign.votes import _store as store
from diffalign.votes._types import OVERALL, Vote


class _VoteRows:
    """The votes that counted at one moment: 8 bytes per vote in memory, whatever is voted or taken back afterwards."""

    def __init__(self, path: Path, aspect: str, until: int | None) -> None:
        self.path, self._aspect = path, aspect
        events, content = array("q"), hashlib.blake2b(digest_size=16)
        with store.reading(path) as connection:
            newest = store.last_event(connection)
            if until is not None and until > newest:
                raise UserError(f"{path}: until={until}: the newest event is {newest}")
            self._until = newest if until is None else until
            for vote in store.select_votes(connection, aspect=aspect, until=self._until):
                events.append(vote.event)
                content.update(repr((vote.event, vote.rater, vote.prompt, vote.pictures, vote.verdict)).encode())
            aspects = [row[0] for row in connection.execute("SELECT DISTINCT aspect FROM verdicts ORDER BY aspect")]
        if not events:
            kinds = f" (its aspects are {', '.join(aspects)})" if aspects else ""
            raise UserError(f"{path}: no vote of aspect {aspect!r} counts{kinds}: vote in `diffalign app`")
        self._events, self._stamp = np.frombuffer(events, np.int64), f"{len(events)}|{content.hexdigest()}"

    def __len__(self) -> int:
        return len(self._events)

    def where(self, index: int) -> tuple[str, str]:
        """The file, and the number of the vote in it."""
        return str(self.path), f"vote {self._events[index]}"

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        event = int(self._events[index])
        with store.reading(self.path) as connection:
            rows = store.select_votes(connection, aspect=self._aspect, after=event - 1, last=event, until=self._until)
            vote = next(rows)
            data = [
                connection.execute("SELECT data FROM pictures WHERE id = ?", (picture,)).fetchone()[0]
                for picture in vote.pictures
            ]
        return {"vote": vote, "data": data}

    def light(self) -> Iterator[Mapping[str, Any]]:
        """All votes in order, without their pictures."""
        with store.reading(self.path) as connection:
            for vote in store.select_votes(connection, aspect=self._aspect, until=self._until):
                yield {"vote": vote}

    def stamps(self) -> Iterator[str]:
        """What the votes are recognised by: their content, so that a copy of the file is the same data set."""
        yield self._stamp


def _parse(row: Mapping[str, Any], base: Path) -> Draft:
    vote: Vote = row["vote"]
    # In the order of the slots, not the one shown: then all votes on the same pictures are records of one id.
    order = sorted(range(len(vote.slots)), key=lambda index: vote.slots[index])
    utility = vote.verdict.utility
    return Draft(
        prompt=vote.prompt,
        images=tuple(row["data"][index] for index in order) if "data" in row else (),
        utility=tuple(utility[index] for index in order),
        user=vote.rater,
        meta={
            "vote": vote.event,
            "aspect": vote.aspect,
            "contestants": [vote.contestants[index] for index in order],
            "both_bad": vote.verdict.is_bad,
        },
    )


@dataclass
class Votes(Reader):
    """A file of votes (votes.db of the app); votes that were taken back are left out.

    All records are of the moment of opening, whatever is voted meanwhile. A run that is to be resumed while people go
    on voting names that moment with `until`: without it the data has changed, and the run is refused.

    aspect: of the votes; `overall`, or one of `app.aspects`.
    until: number of the last event (vote or undo) that is looked at; null for all there are.

    Other fields: see `Reader`.
    """

    aspect: str = OVERALL
    until: int | None = None

    def layout(self) -> Layout:
        """The votes that count."""
        aspect, until = getattr(self, "aspect", OVERALL), getattr(self, "until", None)  # `auto` has the path only
        return Layout("votes", _VoteRows(Path(self.path), aspect, until), _parse, False)
