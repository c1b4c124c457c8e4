"""Leaderboard: who is preferred by the votes so far, how sure that is, and how far the raters agree."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import gradio as gr

from diffalign import api
from gradio_app import _leaderboard_parts as show
from gradio_app._context import Context
from gradio_app._parts import empty, told

LABEL = "Leaderboard"
EVERY_S = 5.0  # between looks at the number of votes
NUM_KEPT = 8  # standings, for all visitors together
OVERALL = "overall"
ALL = ""  # every rater
NO_VOTES = empty(
    "No votes to rank by yet",
    "Open the <b>Vote</b> tab and compare pictures of two or more models: their standings appear here by themselves.",
)


class Board:
    """The votes of the app, and standings that are computed once for all visitors."""

    def __init__(self, context: Context) -> None:
        self.path, self.reveal = context.folder / "votes.db", context.settings.reveal
        self._lock = threading.Lock()
        self._book: Any = None
        self._kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()

    def book(self) -> Any:
        """The votes; None where nobody voted in this folder yet."""
        with self._lock:
            if self._book is None and self.path.is_file():
                self._book = api.vote_book(self.path)
            return self._book

    def version(self) -> int:
        """Grows with every vote and undo."""
        book = self.book()
        return book.last_event() if book is not None else 0

    def choices(self) -> tuple[list[tuple[str, str]], list[str], list[str]]:
        """What was voted on between models, the newest first; aspects; raters."""
        book = self.book()
        if book is None:
            return [], [], []
        last: dict[int, int] = {}
        aspects, raters = {OVERALL: None}, dict[str, None]()
        for vote in book.votes(aspect=None):
            aspects[vote.aspect] = raters[vote.rater] = None
            if len(set(vote.contestants)) > 1:
                last[vote.task] = vote.event
        titles = {task.id: task.title for task in book.tasks()}
        tasks = sorted(last, key=lambda task: -last[task])
        return [(titles[task], str(task)) for task in tasks], list(aspects), sorted(raters)

    def standings(self, task: str, aspect: str, rater: str) -> Any:
        """Standings of one task; None where it has no votes between models."""
        key = (self.version(), task, aspect, rater)
        with self._lock:
            if key not in self._kept and task.isdecimal() and self._book is not None:
                votes = self._book.votes(task=int(task), aspect=aspect, rater=rater or None)
                rows = [vote for vote in votes if len(set(vote.contestants)) > 1]
                self._kept[key] = api.standings(rows) if rows else None
                while len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            return self._kept.get(key)

    def page(self, task: str | None, aspect: str | None, rater: str | None, with_points: bool) -> str:
        """The standings as the page shows them."""
        found = self.standings(task or "", aspect or OVERALL, rater or ALL)
        if found is None:
            return NO_VOTES
        hidden = {name: f"Model {number}" for number, name in enumerate(sorted(found.names), start=1)}
        return show.board(found, {name: name for name in found.names} if self.reveal else hidden, with_points)


def build(context: Context, blocks: gr.Blocks) -> None:
    """The choice above, the standings below; they follow the votes by themselves."""
    board = Board(context)
    with gr.Row(elem_classes="da-board-top"):
        task = gr.Dropdown([], label="What was voted on", elem_id="da-board-task", scale=4, min_width=220)
        aspect = gr.Dropdown(
            [OVERALL], value=OVERALL, label="Aspect", elem_id="da-board-aspect", scale=2, min_width=130
        )
        rater = gr.Dropdown(
            [("everybody", ALL)], value=ALL, label="Rater", elem_id="da-board-rater", scale=2, min_width=130
        )
        points = gr.Checkbox(
            False, label="Elo points", elem_id="da-board-points", container=False, scale=0, min_width=120
        )
        again = gr.Button("Refresh", elem_id="da-board-refresh", scale=1, min_width=100)
    page = gr.HTML(NO_VOTES, elem_id="da-board")
    seen = gr.State(-1)
    given, choice = [task, aspect, rater, points], [task, aspect, rater]

    def find(task: str | None, aspect: str | None, rater: str | None, points: bool) -> list[Any]:
        with told():
            version = board.version()
            tasks, aspects, raters = board.choices()
            task = task if task in [value for _, value in tasks] else next((value for _, value in tasks), None)
            aspect = aspect if aspect in aspects else OVERALL
            rater = rater if rater in raters else ALL
            return [
                gr.Dropdown(tasks, value=task),
                gr.Dropdown(aspects or [OVERALL], value=aspect),
                gr.Dropdown([("everybody", ALL), *((name, name) for name in raters)], value=rater),
                board.page(task, aspect, rater, points),
                version,
            ]

    def look(seen: int, *values: Any) -> list[Any]:
        """The page anew where a vote came or was taken back."""
        with told():
            return [gr.skip()] * 5 if board.version() == seen else find(*values)

    def draw(*values: Any) -> str:
        with told():
            return board.page(*values)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    gr.on([blocks.load, again.click], find, given, [*choice, page, seen], **quiet)
    gr.on([one.input for one in (task, aspect, rater, points)], draw, given, page, trigger_mode="always_last", **quiet)
    gr.Timer(EVERY_S).tick(look, [seen, *given], [*choice, page, seen], **quiet)
