"""Votes of people: every line counts or is named, whoever wrote it and in whatever editor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import WaitsForVotes
from diffalign.sources._votes import BALLOT, VOTES, ballot_id, counted, read_votes, write_ballot
from diffalign.types import UserError

SIZES = {"00000-000": 2, "00000-001": 3, "00001-000": 2}
FIRST, THREE, LAST = SIZES


def write(folder: Path, *rows: Any) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / VOTES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, list[float]]:
    return {name: utility.tolist() for name, utility in read_votes(folder, SIZES).items()}


def test_the_ballot_is_written_once(tmp_path):
    rows = [(ballot_id(0, 0), 'a "red" thing\nof two', ["images/00000-000.png", "images/00000-001.png"])]
    write_ballot(tmp_path, rows)
    found = [json.loads(line) for line in (tmp_path / BALLOT).read_text().splitlines()]
    assert found == [{"id": FIRST, "prompt": rows[0][1], "images": rows[0][2]}]
    (tmp_path / BALLOT).write_text("notes of whoever votes")
    write_ballot(tmp_path, [("other", "prompt", [])])
    assert (tmp_path / BALLOT).read_text() == "notes of whoever votes"


def test_ids_are_as_many_as_prompts():
    assert len({ballot_id(part, prompt) for part in range(12) for prompt in range(12)}) == 144
    assert ballot_id(3, 12) == "00003-012"


def test_winners_ties_and_utilities(tmp_path):
    write(tmp_path, {"id": FIRST, "winner": 1}, {"id": LAST, "winner": None}, {"id": THREE, "utility": [3, -0.5, 1]})
    assert read(tmp_path) == {FIRST: [0, 1], LAST: [0.5, 0.5], THREE: [3, -0.5, 1]}


def test_a_winner_of_three_and_a_tie_of_three(tmp_path):
    write(tmp_path, {"id": THREE, "winner": 2}, {"done": True})
    assert read(tmp_path) == {THREE: [0, 0, 1]}
    write(tmp_path, {"id": THREE, "winner": None}, {"done": True})
    assert read(tmp_path) == {THREE: [0.5, 0.5, 0.5]}


def test_raters_are_averaged(tmp_path):
    votes = [{"id": FIRST, "winner": winner, "rater": name} for winner, name in ((0, "a"), (0, "b"), (1, "c"))]
    write(tmp_path, *votes, {"id": FIRST, "winner": None, "rater": "d"}, {"done": True})
    assert read(tmp_path)[FIRST] == [pytest.approx(2.5 / 4), pytest.approx(1.5 / 4)]


def test_waits_until_every_prompt_has_a_vote(tmp_path):
    with pytest.raises(WaitsForVotes, match="3 of 3 prompts wait") as error:
        read(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path / VOTES) in str(error.value)
    write(tmp_path, {"id": FIRST, "winner": 0}, {"id": FIRST, "winner": 0})
    with pytest.raises(WaitsForVotes, match="2 of 3 prompts wait"):
        read(tmp_path)


@pytest.mark.parametrize("done", [{"done": True}, {"done": True, "id": LAST, "winner": 0}])
def test_done_leaves_the_rest_out(done, tmp_path):
    write(tmp_path, {"id": FIRST, "winner": 0}, done)
    assert read(tmp_path) == {FIRST: [1, 0]} | ({LAST: [1, 0]} if "id" in done else {})
    write(tmp_path, {"done": True})
    assert read(tmp_path) == {}
    write(tmp_path, {"id": FIRST, "winner": 0}, {"done": False})
    with pytest.raises(WaitsForVotes, match="2 of 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    "line,match",
    [
        ({"id": "00007-000", "winner": 0}, "'00007-000' is unknown or missing"),
        ({"winner": 0}, "'id' is unknown or missing"),
        ({"Id": FIRST, "winner": 0}, "'id' is unknown or missing"),
        ({"id": FIRST}, "'winner' is unknown or missing"),
        ({"id": FIRST, "winner": 2}, "wanted is"),
        ({"id": FIRST, "winner": -1}, "wanted is"),
        ({"id": FIRST, "winner": "left"}, "wanted is"),
        ({"id": FIRST, "winner": 0.5}, "wanted is"),
        ({"id": FIRST, "winner": [1]}, "wanted is"),
        ({"id": FIRST, "winner": True}, "wanted is"),  # of two yes-no votes, not a place
        ({"id": FIRST, "utility": [1, 0, 0]}, "wanted is"),
        ({"id": THREE, "utility": [1, 0]}, "wanted is"),
        ({"id": FIRST, "utility": []}, "wanted is"),
        ({"id": FIRST, "utility": 1}, "wanted is"),
        ({"id": FIRST, "utility": [1, None]}, "wanted is"),
        ('{"id": "00000-000", "utility": [1, NaN]}', "wanted is"),
        ('{"id": "00000-000", "winner": 1', "wanted is"),
        ("winner 1", "wanted is"),
        ([FIRST, 1], "wanted is"),
        ("7", "wanted is"),
        ({"id": [FIRST], "winner": 1}, "wanted is"),
    ],
)
def test_a_wrong_line_is_named(line, match, tmp_path):
    """Blank lines count: an editor numbers them too. No `done` before it hides it."""
    write(tmp_path, {"id": FIRST, "winner": 1}, "", {"done": True}, line)
    with pytest.raises(UserError, match=match) as error:
        read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / VOTES}: line 4: ") and "\n" not in str(error.value)


def test_files_of_other_editors(tmp_path):
    """A byte order mark, CRLF, no last newline, a line separator inside a comment."""
    rows = [{"id": name, "winner": 0, "comment": "one\u2028two\x85"} for name in SIZES]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / VOTES).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path) == {name: [1.0] + [0.0] * (size - 1) for name, size in SIZES.items()}
    (tmp_path / VOTES).write_bytes(text.encode() + b'\n{"id": "\xff"}')
    with pytest.raises(UserError, match="line 4: wanted is"):
        read(tmp_path)


def test_votes_are_counted_once_and_by_one_process(tmp_path):
    """All processes draw from one tally, whatever is written to the file of votes meanwhile."""
    sizes = {"00000-000": 2}
    calls: list[str] = []

    def go(is_main: bool):
        return counted(tmp_path, sizes, is_main, lambda: calls.append("met"))

    for is_main in (True, False):
        with pytest.raises(WaitsForVotes, match="wait"):
            go(is_main)
    (tmp_path / "votes.jsonl").write_text('{"id": "nobody", "winner": 0}\n')
    with pytest.raises(UserError, match="line 1"):
        go(True)
    assert len(calls) == 3  # nobody is left waiting for the process that failed
    (tmp_path / "votes.jsonl").write_text('{"id": "00000-000", "winner": 1}\n')
    assert go(True)["00000-000"].tolist() == [0.0, 1.0]
    (tmp_path / "votes.jsonl").write_text('{"id": "00000-000", "winner": 0}\n')
    assert go(False)["00000-000"].tolist() == go(True)["00000-000"].tolist() == [0.0, 1.0]
