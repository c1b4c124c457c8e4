"""Vote: blind comparisons, by key or by mouse. Every vote is on the disk before the next pictures come."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffalign import api
from gradio_app import _vote_page as show
from gradio_app._context import Context
from gradio_app._parts import told

LABEL = "Vote"
SIZES = (2, 3, 4, 5, 6)  # pictures on a ballot
LIVE = "live:"  # how the name of a task begins whose pictures are painted while people vote
ATTACH = "daVote.attach(element, trigger, watch);"
NAME = "name => [daVote.name(name)]"
READY = "() => daVote.ready()"
IDLE = "() => daVote.idle()"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}


class Booth:
    """What the page and the HTTP interface share."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.voting = api.voting(context.folder / "votes.db", aspects=context.settings.aspects)

    def choices(self) -> list[tuple[str, str]]:
        """(what people read, what is sent) of all that can be voted on, what was painted last first."""
        live = [(task.title, f"{LIVE}{task.id}") for task in self.voting.book.tasks() if task.kind == "live"]
        return live[::-1] + [(self.title(path), str(path)) for path in self.voting.found(self.context.roots)]

    def title(self, path: Any) -> str:
        """A folder's name below the app's folders."""
        root = next((root for root in self.context.roots if path.is_relative_to(root)), path.parent)
        return str(path.relative_to(root)) if path != root else path.name

    def task(self, name: str, size: int) -> int:
        """The number of the task that a visitor named.

        Raises:
            UserError: a folder outside the app's, or one with nothing to vote on.
        """
        if name.startswith(LIVE) and name.removeprefix(LIVE).isdecimal():
            return int(name.removeprefix(LIVE))
        if size not in SIZES:
            raise api.UserError(f"pictures at a time: {SIZES[0]} to {SIZES[-1]}")
        path = self.context.below(name)
        return self.voting.open_folder(path, self.title(path), size).id

    def rater(self, name: str | None, request: gr.Request | None) -> str:
        """Who votes: the name of the login, else the one that was typed."""
        return self.context.rater(request) or name or ""

    def act(self, event: gr.EventData) -> None:
        """What the page says was done: a vote, an undo, or nothing but a look."""
        kind, ballot = getattr(event, "kind", None), str(getattr(event, "ballot", ""))
        if kind == "cast":
            self.voting.cast(ballot, getattr(event, "said", None))
        elif kind == "undo":
            self.voting.undo(ballot)

    def page(self, task: str | None, size: int, rater: str) -> str:
        """The next ballot of a rater as the page shows it."""
        if not task:
            return show.nothing()
        number = self.task(task, int(size))
        turn = self.voting.turn(number, rater)
        pictures = [show.shown(self.voting.book.picture(one)) for one in turn.ballot.pictures] if turn.ballot else []
        return show.page(turn, pictures, self.voting.aspects, self.voting.book.last_vote(number, rater))


def build(context: Context, blocks: gr.Blocks) -> None:
    """The ballot, and what is voted on."""
    booth = Booth(context)
    with gr.Column(elem_classes="da-vote-layout"):
        with gr.Row(elem_classes="da-vote-settings"):
            task = gr.Dropdown(
                [], label="Vote on", allow_custom_value=True, elem_id="da-vote-task", scale=3, min_width=200
            )
            size = gr.Dropdown(
                list(SIZES), value=2, label="Pictures at a time", elem_id="da-vote-size", scale=1, min_width=110
            )
            name = gr.Textbox(label="Your name", max_length=80, elem_id="da-vote-name", scale=1, min_width=140)
            look = gr.Button("Look again", size="sm", elem_id="da-vote-look", scale=0, min_width=100)
        page = gr.HTML(show.START, elem_id="da-vote-page", js_on_load=ATTACH)
        begun = _live(booth, task, size)
    asked = [task, size, name]

    def acted(task: str | None, size: int, name: str, event: gr.EventData, request: gr.Request) -> str:
        with told():
            booth.act(event)
            return booth.page(task, size, booth.rater(name, request))

    def turned(task: str | None, size: int, name: str, request: gr.Request) -> str:
        with told():
            return booth.page(task, size, booth.rater(name, request))

    def listed(task: str | None) -> Any:
        choices = booth.choices()
        values = [value for _, value in choices]
        return gr.Dropdown(choices=choices, value=task if task in values else next(iter(values), None))

    def named(name: str, request: gr.Request) -> Any:
        login = context.rater(request)
        return gr.Textbox(value=login or name, interactive=login is None)

    page.click(acted, asked, page, **PRIVATE).then(None, js=IDLE)
    task.input(turned, asked, page, **PRIVATE)
    size.input(turned, asked, page, **PRIVATE)
    name.submit(None, js="() => document.activeElement.blur()")  # and keys vote again
    name.blur(turned, asked, page, js="(task, size, name) => [task, size, daVote.name(name)]", **PRIVATE)
    begun.success(turned, asked, page, **PRIVATE)
    look.click(listed, task, task, **PRIVATE).then(turned, asked, page, **PRIVATE)
    blocks.load(named, name, name, js=NAME, **PRIVATE).then(listed, task, task, **PRIVATE).then(None, js=READY)
    _serve(booth)


def _live(booth: Booth, task: gr.Dropdown, size: gr.Dropdown) -> Any:
    """Models that paint while people vote; returns the event after which there is a task."""
    context = booth.context
    with gr.Accordion("Paint while you vote", open=False, elem_id="da-vote-live") as box:
        models = gr.Dropdown(
            [], multiselect=True, allow_custom_value=True, label="Models and adapters", elem_id="da-vote-models"
        )
        prompts = gr.Textbox(label="Prompts", info="one a line", lines=3, max_lines=8, elem_id="da-vote-prompts")
        with gr.Row():
            begin = gr.Button("Paint and vote", variant="primary", elem_id="da-vote-begin", min_width=120)
            stop = gr.Button("Stop painting", elem_id="da-vote-stop", min_width=120)

    def opened() -> list[Any]:
        with told():
            studio = _studio(context)
            view = studio.first_view()
            return [gr.Dropdown(choices=studio.refresh(), value=list(view.contestants)), "\n".join(view.prompts)]

    def begun(models: list[str], prompts: str, size: int) -> Any:
        with told():
            lines = [line for line in (prompts or "").splitlines() if line.strip()]
            made = booth.voting.open_live(_studio(context), models, lines, int(size))
            return gr.Dropdown(choices=booth.choices(), value=f"{LIVE}{made.id}")

    def stopped(task: str | None) -> None:
        with told():
            if not (task or "").startswith(LIVE):
                raise api.UserError("nothing is painted for this: choose a task that is painted live")
            booth.voting.stop_live(booth.task(str(task), 2))
        gr.Info("No more pictures are painted; those that are there can be voted on")

    box.expand(opened, None, [models, prompts], **PRIVATE)
    stop.click(stopped, task, None, **PRIVATE)
    return begin.click(begun, [models, prompts, size], task, **PRIVATE)


def _studio(context: Context) -> Any:
    return api.studio(config=context.config, folder=context.folder, roots=context.roots, below=context.below)


def _serve(booth: Booth) -> None:
    """The same over HTTP, for scripts: POST to /gradio_api/run/vote_next, vote_cast and vote_undo."""

    def vote_next(task: str, rater: str, request: gr.Request) -> dict:
        with told():
            number = booth.task(task, 2)
            turn = booth.voting.turn(number, booth.rater(rater, request))
            found = vars(turn) | {"progress": vars(turn.progress), "ballot": None}
            if turn.ballot is not None:
                pictures = [show.shown(booth.voting.book.picture(one))["uri"] for one in turn.ballot.pictures]
                found |= {"ballot": turn.ballot.id, "prompt": turn.ballot.prompt, "pictures": pictures}
            return found

    def vote_cast(ballot: str, said: dict) -> dict:
        with told():
            receipt = booth.voting.cast(ballot, said)
            verdicts = {aspect: {"ranks": one.ranks, "is_bad": one.is_bad} for aspect, one in receipt.verdicts.items()}
            return {"ballot": ballot, "said": verdicts, "is_new": receipt.is_new, "is_undone": receipt.is_undone}

    def vote_undo(ballot: str) -> dict:
        with told():
            return {"ballot": booth.voting.undo(ballot).id}

    for function in (vote_next, vote_cast, vote_undo):
        gr.api(function, api_name=function.__name__, queue=False)
