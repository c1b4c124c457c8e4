"""The leaderboard in a real browser: empty, filled while somebody looks, filtered, and hostile names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pytest

from diffalign.votes import OVERALL, Place, Verdict, VoteBook
from diffalign.votes import Picture as Candidate
from gradio_app._context import open_context
from gradio_app.leaderboard import Board

NAMES = ("base", "diffusion-dpo, 2000 steps at beta 5000", "<img src=x onerror=alert(1)>")
STRENGTH = dict(zip(NAMES, (0.0, 1.2, -0.8), strict=True))
PROMPT = "a <b>small</b> red circle left of a large blue square on a dark background, "


def vote(book: VoteBook, title: str, num: int, rater: str, seed: int = 0, names: tuple[str, ...] = NAMES) -> int:
    """Votes of one rater, most of whom prefer the stronger; every second one also on colour."""
    task = book.add_task(title, "pictures", title)
    pictures = {name: makers.picture(k, 60 * k + 40) for k, name in enumerate(names)}
    book.add_places(
        task.id,
        (
            Place(f"{k}", f"{PROMPT}{k}", tuple(Candidate(name, name, data) for name, data in pictures.items()))
            for k in range(30)
        ),
    )
    rng = np.random.default_rng(seed)
    for _ in range(num):
        [ballot] = book.draw(task.id, rater)
        first, second = (_maker(book, ballot, place) for place in (0, 1))
        won = rng.random() < 1 / (1 + np.exp(STRENGTH.get(second, 0) - STRENGTH.get(first, 0)))
        verdict = Verdict((0, 0)) if rng.random() < 0.1 else Verdict((0, 1) if won else (1, 0))
        book.cast(ballot.id, {OVERALL: verdict, **({"colour": Verdict((1, 0))} if rng.random() < 0.5 else {})})
    return task.id


def _maker(book: VoteBook, ballot: Any, place: int) -> str:
    sql = "SELECT i.contestant FROM ballots b JOIN json_each(b.items) j JOIN items i ON i.id = j.value WHERE b.id = ?"
    return str(book._rows(f"{sql} ORDER BY j.key", ballot.id)[place][0])


def test_names_are_hidden_where_the_settings_say_so(tmp_path: Path) -> None:
    words = [f"app.folder={tmp_path}", "sprites-sdxl"]
    with VoteBook(tmp_path / "votes.db") as book:
        task = vote(book, "three", 20, "ann")
    for reveal in (True, False):
        page = Board(open_context([*words, f"app.reveal={str(reveal).lower()}"])).page(str(task), None, None, False)
        assert ("diffusion-dpo" in page) == reveal and ("Model 1" in page) == (not reveal)
        assert "<img" not in page


def test_a_file_that_holds_no_votes_is_told(tmp_path: Path) -> None:
    (tmp_path / "votes.db").write_text("nothing of the kind" * 100)
    board = Board(open_context([f"app.folder={tmp_path}", "sprites-sdxl"]))
    with pytest.raises(ValueError, match="not a file of votes"):
        board.version()


@pytest.fixture(scope="module")
def server(serve: Any) -> Any:
    return serve("sprites-sdxl", "app.tabs=[leaderboard]")


@pytest.mark.browser
@pytest.mark.slow
def test_standings_follow_the_votes(server: Any, browser: Any, shoot: Any) -> None:
    page = browser(server.url)
    page.get_by_text("No votes to rank by yet").wait_for()
    shoot(page, "leaderboard-empty")
    with VoteBook(server.folder / "votes.db") as book:
        for number, rater in enumerate(("ann", "bob", "Carla-Maria von und zu Hohenstein")):
            vote(book, "three models", 60, rater, seed=number)
        table = page.locator("#da-ranking .da-rank-row:not(.da-rank-head)")  # comes by itself
        page.get_by_text("180 votes").wait_for()
        assert table.locator(".da-name").all_inner_texts() == [NAMES[1], NAMES[0], NAMES[2]]
        assert page.locator("#da-matrix tbody tr").count() == 3 and page.locator("#da-power li").count() == 2
        assert "alpha" in page.locator("#da-alpha").inner_text()
        shoot(page, "leaderboard")

        vote(book, "others", 4, "ann", names=("x", "y"))
        page.get_by_label("Elo points").check()
        page.locator("#da-ranking .da-points").first.wait_for()
        _choose(page, "da-board-task", "others")
        page.get_by_text("4 votes", exact=False).first.wait_for()
        assert table.count() == 2
        _choose(page, "da-board-task", "three models")
        _choose(page, "da-board-rater", "bob")
        page.get_by_text("60 votes").wait_for()
        _choose(page, "da-board-aspect", "colour")
        page.get_by_text("60 votes").wait_for(state="hidden")
        assert table.count() == 3


def _choose(page: Any, elem: str, text: str) -> None:
    page.locator(f"#{elem} input").click()
    page.get_by_role("option", name=text).click()


@pytest.mark.browser
@pytest.mark.slow
def test_an_undone_vote_leaves_the_standings(serve: Any, browser: Any) -> None:
    server = serve("sprites-sdxl", "app.tabs=[leaderboard]")
    with VoteBook(server.folder / "votes.db") as book:
        task = vote(book, "two", 5, "ann", names=("x", "y"))
        page = browser(server.url)
        page.get_by_text("5 votes").first.wait_for()
        last = book.last_vote(task, "ann")
        assert last is not None
        book.undo(last)
        page.get_by_text("4 votes").first.wait_for()
    config = json.dumps(page.evaluate("window.gradio_config.dependencies.map(d => d.api_visibility)"))
    assert "public" not in config
