"""A round judged by people: a ballot to look at, a file of votes to fill, and the votes as scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from diffalign._atomic import write_atomic
from diffalign._json import read_json, write_json
from diffalign.errors import UserError, WaitsForVotes

BALLOT, VOTES, TALLY = "ballot.jsonl", "votes.jsonl", "tally.json"


def ballot_id(part: int, prompt: int) -> str:
    """What a prompt of a round is called in both files."""
    return f"{part:05d}-{prompt:03d}"


def write_ballot(folder: Path, rows: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """(id, prompt, image files below `folder`) of every prompt, once."""
    path = folder / BALLOT
    if not path.is_file():
        lines = (json.dumps({"id": name, "prompt": prompt, "images": list(files)}) for name, prompt, files in rows)
        write_atomic(path, "".join(line + "\n" for line in lines).encode())


def read_votes(folder: Path, num_candidates: Mapping[str, int]) -> dict[str, Float[NDArray[np.float64], " K"]]:
    """id -> mean utility of each image, of all who voted on it.

    A line of votes.jsonl holds `id` and either `winner`, the place of the better image from 0 (null: a tie), or
    `utility`, a number per image; other keys are for their owner (`rater`). A line {"done": true} ends the vote early:
    prompts without a vote are then left out.

    Raises:
        WaitsForVotes: no such file yet, or not all prompts have a vote.
        UserError: a line that says something else; it is named.
    """
    path, found, is_done = folder / VOTES, dict[str, list[list[float]]](), False
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, data in enumerate(lines, start=1):
        if not data.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(data.decode("utf-8-sig"))
            is_done = is_done or bool(row.get("done"))
            if "done" in row and "id" not in row:
                continue
            utility = _utility(row, num_candidates[row["id"]])
        except KeyError as error:
            raise UserError(f"{where}: {error} is unknown or missing: see the ids in {folder / BALLOT}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f'{where}: wanted is {{"id": ..., "winner": 0}} (a place from 0, null for a tie) or a `utility` of one'
                " number per image"
            ) from error
        found.setdefault(row["id"], []).append(utility)
    missing = len(num_candidates) - len(found)
    if missing and not is_done:
        line = json.dumps({"id": "...", "winner": 0})
        raise WaitsForVotes(
            f"{missing} of {len(num_candidates)} prompts wait for votes: look at {folder / 'images'} with"
            f" {folder / BALLOT}, write a line {line} for each into {path}, and run the same command again"
        )
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def counted(
    folder: Path, num_candidates: Mapping[str, int], is_main: bool, barrier: Callable[[], None]
) -> dict[str, Float[NDArray[np.float64], " K"]]:
    """`read_votes`, once: what the main process counted is kept in tally.json, and every process, now or after a
    resume, draws from that. A vote that comes later, or is changed, no longer counts.

    Raises:
        WaitsForVotes, UserError: as `read_votes`, after all processes have met.
    """
    path, failed = folder / TALLY, None
    if is_main and not path.is_file():
        try:
            votes = read_votes(folder, num_candidates)
            write_json(path, {name: utility.tolist() for name, utility in votes.items()})
        except (WaitsForVotes, UserError) as error:
            failed = error
    barrier()
    if failed is not None:
        raise failed
    if not path.is_file():
        raise WaitsForVotes(f"{folder} waits for votes, as the main process says")
    return {name: np.array(utility) for name, utility in read_json(path).items()}


def _utility(row: Mapping[str, Any], size: int) -> list[float]:
    """Of one vote.

    Raises:
        KeyError: it has no verdict.
        ValueError, TypeError: one that does not fit the images.
    """
    if "utility" in row:
        utility = [float(value) for value in row["utility"]]
        if len(utility) != size or not np.isfinite(utility).all():
            raise ValueError(utility)
        return utility
    winner = row["winner"]
    if winner is None:
        return [0.5] * size
    if isinstance(winner, bool) or winner not in range(size):
        raise ValueError(winner)
    return [float(place == winner) for place in range(size)]
