"""What the file of votes holds and gives out: tasks, places and pictures, ballots, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffalign.errors import UserError

OVERALL = "overall"  # the aspect that every vote has
LONGEST_NAME = 80  # characters of a rater's name, or an aspect's


@dataclass(frozen=True)
class Picture:
    """One candidate of a place: bytes, or a file below the task's folder that is read when it is first drawn."""

    slot: str  # what is compared: who made it, or which of one maker's it is
    contestant: str  # who made it
    data: bytes | None = None
    file: str | None = None
    number: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Place:
    """Pictures that may be compared with each other: of one prompt, and of one noise where several made them."""

    name: str  # unique in its task
    prompt: str
    pictures: tuple[Picture, ...]
    turn: int = 0  # of places voted on and shown equally often, the lowest comes first


@dataclass(frozen=True)
class Task:
    """What is voted on."""

    id: int
    key: str
    kind: str  # pictures, queue or live
    title: str
    folder: str  # where its files lie; empty where all pictures are in the book
    size: int  # pictures on a ballot, at most


@dataclass(frozen=True)
class Ballot:
    """What a rater sees: pictures in this order, and nothing of who made them."""

    id: str
    task: int
    rater: str
    prompt: str
    pictures: tuple[str, ...]  # ids for `VoteBook.picture`


@dataclass(frozen=True)
class Receipt:
    """What is on record for a ballot."""

    ballot: str
    task: int
    verdicts: Mapping[str, Verdict]
    is_new: bool  # False: it had been cast before, and this is what was said then
    is_undone: bool


@dataclass(frozen=True)
class Progress:
    """Of one rater in one task."""

    mine: int  # votes of this rater that count
    total: int  # ballots that one rater could get
    everybody: int  # votes of all raters that count


@dataclass(frozen=True)
class Verdict:
    """What a rater says of the pictures, in the order in which they are shown.

    `ranks` has a rank per picture from 0, the best; equal ranks are a tie. `is_bad` says of a tie that none is good.
    """

    ranks: tuple[int, ...]
    is_bad: bool = False

    def __post_init__(self) -> None:
        is_whole = all(type(rank) is int for rank in self.ranks)
        if len(self.ranks) < 2 or not is_whole or set(self.ranks) != set(range(len(set(self.ranks)))):
            raise UserError(f"a vote has a rank from 0 for each of the pictures (got {list(self.ranks)!r:.80})")
        if self.is_bad and any(self.ranks):
            raise UserError("a vote that calls all pictures bad ranks none of them above another")

    @property
    def utility(self) -> tuple[float, ...]:
        """Per picture the share of its comparisons that it wins, ties half: (1, 0), (0.5, 0.5); all 0 where bad."""
        if self.is_bad:
            return (0.0,) * len(self.ranks)
        rivals = len(self.ranks) - 1
        return tuple(
            sum((mine < rank) + 0.5 * (mine == rank) for rank in self.ranks) / rivals - 0.5 / rivals
            for mine in self.ranks
        )


@dataclass(frozen=True)
class Vote:
    """One verdict that counts, and what it is about; the pictures and their facts in the order shown."""

    event: int  # its number: later votes have higher ones
    at: float  # seconds since 1970
    ballot: str
    task: int
    place: str
    prompt: str
    rater: str
    aspect: str
    verdict: Verdict
    slots: tuple[str, ...]
    contestants: tuple[str, ...]  # who made the pictures
    pictures: tuple[str, ...]  # their ids


def clean_name(rater: str) -> str:
    """A rater's name, spaces normalised.

    Raises:
        UserError: none, or one too long, or with control characters.
    """
    name = " ".join(rater.split())
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise UserError(f"a rater has a name of 1 to {LONGEST_NAME} printable characters")
    return name


def verdicts_of(said: object) -> dict[str, Verdict]:
    """aspect -> verdict, of plain JSON as pages and scripts send it: {"overall": {"ranks": [0, 1], "is_bad": false}}.

    Raises:
        UserError: anything else.
    """
    if not isinstance(said, Mapping) or not all(isinstance(value, Mapping) for value in said.values()):
        raise UserError('a vote is {"overall": {"ranks": [0, 1]}}, and more aspects where there are any')
    found = {}
    for aspect, value in said.items():
        ranks, is_bad = value.get("ranks"), value.get("is_bad", False)
        if not isinstance(ranks, list) or not isinstance(is_bad, bool) or set(value) - {"ranks", "is_bad"}:
            raise UserError(f"a verdict is ranks (a list) and is_bad (true or false), not {str(value)[:80]}")
        found[str(aspect)] = Verdict(tuple(ranks), is_bad)
    return found


def check(verdicts: Mapping[str, Verdict], size: int) -> None:
    """Raises UserError where a vote does not fit a ballot of `size` pictures."""
    if OVERALL not in verdicts:
        raise UserError(f"a vote has a verdict of aspect {OVERALL!r}")
    for aspect, verdict in verdicts.items():
        if not aspect or len(aspect) > LONGEST_NAME:
            raise UserError(f"an aspect has a name of 1 to {LONGEST_NAME} characters")
        if len(verdict.ranks) != size:
            raise UserError(f"the vote ranks {len(verdict.ranks)} pictures, and the ballot has {size}")
