"""Browse: a preference data set page by page; flips, drops and fixed captions, saved as a new version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffalign import api
from gradio_app import _browse_page as show
from gradio_app._context import Context
from gradio_app._parts import escape, told

LABEL = "Browse"
PER_PAGE = 24
MAX_TEXTS = 64  # of one record, at once
ATTACH = "daBrowse.attach(element, trigger);"
EDITOR = "() => [daBrowse.editor()]"
TOP = "() => daBrowse.top('da-browse-top')"
SORTS = {"order of the file": "file", "smallest margin first": "margin", "largest margin first": "-margin"}
SHOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all records", {}),
    "pairs": ("without ties", {"ties": "without"}),
    "ties": ("ties", {"ties": "only"}),
    "label": ("a scorer contradicts the label", {"disagreement": "label"}),
    "scorers": ("scorers contradict each other", {"disagreement": "scorers"}),
    "bad": ("no prompt or usable label", {"is_bad": True}),
    "mine": ("my edits", {"is_edited": True}),
}
EVERYBODY = ""
CLOSED: dict[str, Any] = {"path": "", "page": 0}


class Desk:
    """What one visitor sees of a data set, as a function of what they chose."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.library = api.data_library(folder=context.folder, below=context.below)

    def choices(self) -> list[tuple[str, str]]:
        """(name below its root, path) of what can be opened."""
        found = api.find_data_sets(self.context.roots)
        return [(self.title(path), str(path)) for path in found]

    def title(self, path: Path) -> str:
        """A data set's name below the app's folders."""
        root = next((root for root in self.context.roots if path.is_relative_to(root)), path.parent)
        return str(path.relative_to(root)) if path != root else path.name

    def editor(self, token: str, request: gr.Request) -> str:
        """Whose draft it is: the login's, else the browser's."""
        login = self.context.rater(request)
        return f"login {login}" if login else f"browser {token[:64]}"

    def query(self, sort: str, shown: str, text: str, user: str) -> Any:
        """What the filters above the cards ask for."""
        name, is_down = (sort.removeprefix("-"), sort.startswith("-"))
        _, fields = SHOWS.get(shown, SHOWS["all"])
        return api.browse_query(sort=name, descending=is_down, text=(text or "")[:1000], user=user or None, **fields)

    def page(self, at: dict[str, Any], editor: str, *filters: str) -> list[Any]:
        """[where one is, bar, cards] of a page; a number too large is the last page."""
        if not at["path"]:
            return [at, "", show.NOT_OPEN]
        browser = self.library.get(at["path"])
        rows = browser.rows(self.query(*filters), editor)
        num_pages = -(-len(rows) // PER_PAGE)
        page = max(0, min(int(at["page"]), num_pages - 1))
        found = browser.page(list(rows[page * PER_PAGE : (page + 1) * PER_PAGE]), editor)
        bar = show.bar(page, num_pages, len(rows), len(browser), browser.log(editor))
        return [{**at, "page": page}, bar, show.cards(found, page, num_pages)]

    def act(self, at: dict[str, Any], editor: str, event: gr.EventData) -> dict[str, Any]:
        """Does what a button asks for; where one is then.

        Raises:
            UserError: a caption that is none, or a data set that is not open.
        """
        kind, row, page = (getattr(event, name, None) for name in ("kind", "row", "page"))
        if kind == "go" and isinstance(page, int):
            return {**at, "page": page}
        browser = self.library.get(at["path"])
        log = browser.log(editor)
        if kind in ("undo", "redo"):
            done = log.undo() if kind == "undo" else log.redo()
            if done is not None:
                gr.Info(f"{'Taken back' if kind == 'undo' else 'Done again'}: record {done + 1:,}", duration=3)
        elif isinstance(row, int) and 0 <= row < len(browser):
            if kind in ("flip", "drop"):
                getattr(log, kind)(row)
            elif kind == "caption":
                for image, text in (getattr(event, "texts", None) or ())[:MAX_TEXTS]:
                    log.caption(row, str(text), image if isinstance(image, int) else None)
        return at

    def facets(self, path: str, sort: str, shown: str, user: str) -> list[Any]:
        """The filters with what the data set has; waits for its index."""
        found = self.library.get(path).facets()
        sorts = list(SORTS.items())
        for name in found.scorers:
            sorts += [(f"{name} contradicts the label first", name), (f"{name} agrees most first", f"-{name}")]
        counts = {
            "all": found.num, "pairs": found.num - found.num_ties - found.num_bad, "ties": found.num_ties,
            "label": found.num_against_label, "scorers": found.num_among_scorers, "bad": found.num_bad,
        }  # fmt: skip
        shows = [(f"{text} ({counts[key]:,})" if key in counts else text, key) for key, (text, _) in SHOWS.items()]
        users = [("everybody", EVERYBODY), *((f"{name} ({num:,})", name) for name, num in found.users)]
        return [
            gr.Dropdown(sorts, value=sort if sort in dict(sorts).values() else "file"),
            gr.Dropdown(shows, value=shown),
            gr.Dropdown(users, value=user, visible=len(users) > 1),
        ]

    def save(self, at: dict[str, Any], editor: str, name: str) -> Iterator[list[Any]]:
        """[progress, data sets] while the version is written."""
        if not at["path"]:
            raise api.UserError("open a data set first")
        browser = self.library.get(at["path"])
        if not browser.log(editor).rows():
            raise api.UserError("there are no edits to save: flip, drop or fix a caption first")
        target = browser.version_folder(name.strip() or None)
        for done, num in browser.save(editor, target.name):
            yield [f'<div class="da-browse-bar"><span>{done:,} of {num:,} records written</span></div>', gr.skip()]
        told = f"Saved as <code>{escape(self.title(target))}</code>. Train on it with"
        told += f" <code>source.data.path={escape(target)}</code>"
        yield [f'<div id="da-browse-saved">{told}</div>', gr.Dropdown(self.choices())]


def build(context: Context, blocks: gr.Blocks) -> None:
    """The choice of a data set and of records above, the cards below."""
    desk = Desk(context)
    with gr.Row(elem_id="da-browse-top", elem_classes="da-browse-top"):
        path = gr.Dropdown(
            [], value=None, label="Data set", allow_custom_value=True, elem_id="da-browse-path", scale=4, min_width=240
        )
        again = gr.Button("Look again", elem_id="da-browse-look", scale=0, min_width=140)
    with gr.Row():
        sort = gr.Dropdown(list(SORTS.items()), value="file", label="Order", elem_id="da-browse-sort", min_width=200)
        shown = gr.Dropdown(
            [(text, key) for key, (text, _) in SHOWS.items()],
            value="all",
            label="Show",
            elem_id="da-browse-show",
            min_width=200,
        )
        text = gr.Textbox(label="Words in a caption", elem_id="da-browse-text", max_length=1000, min_width=160)
        user = gr.Dropdown(
            [("everybody", EVERYBODY)],
            value=EVERYBODY,
            label="User",
            elem_id="da-browse-user",
            min_width=140,
            visible=False,
        )
    bar = gr.HTML("", elem_id="da-browse-bar", js_on_load=ATTACH)
    cards = gr.HTML(show.NOT_OPEN, elem_id="da-browse-cards", js_on_load=ATTACH)
    with gr.Accordion("Save your edits as a new version", open=False, elem_id="da-browse-versions"):
        with gr.Row(elem_classes="da-browse-top"):
            name = gr.Textbox(label="Name", placeholder="the next number", elem_id="da-browse-name", min_width=160)
            save = gr.Button("Save version", variant="primary", elem_id="da-browse-save", scale=0, min_width=150)
            cancel = gr.Button("Cancel", elem_id="da-browse-cancel", scale=0, min_width=90)
        saved = gr.HTML("", elem_id="da-browse-progress")
    at, editor = gr.State(CLOSED), gr.Textbox(visible="hidden", elem_id="da-browse-editor")
    filters, page = [sort, shown, text, user], [at, bar, cards]
    _events(desk, blocks, {"path": path, "again": again, "at": at, "editor": editor}, filters, page)

    def saving(at: dict[str, Any], token: str, name: str, request: gr.Request) -> Iterator[list[Any]]:
        with told():
            yield from desk.save(at, desk.editor(token, request), name)

    running = save.click(
        saving, [at, editor, name], [saved, path], concurrency_id="browse-save", concurrency_limit=2,
        api_visibility="private", show_progress="minimal", show_progress_on=saved,
    )  # fmt: skip
    stopped = '<div class="da-browse-bar"><span>Stopped. Saving under the same name goes on where it was.</span></div>'
    cancel.click(lambda: stopped, None, saved, cancels=[running], queue=False, api_visibility="private")


def _events(desk: Desk, blocks: gr.Blocks, of: dict[str, Any], filters: list[Any], page: list[Any]) -> None:
    at, editor, path = of["at"], of["editor"], of["path"]
    sort, shown, _, user = filters
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    shows: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal", "show_progress_on": page[1]}

    def opened(chosen: str | None, token: str, request: gr.Request) -> list[Any]:
        with told():
            found = {"path": "", "page": 0}
            if chosen:
                desk.library.open(chosen)
                found["path"] = chosen
            return [
                *desk.page(found, desk.editor(token, request), "file", "all", "", EVERYBODY),
                "file",
                "all",
                "",
                EVERYBODY,
            ]

    def indexed(at: dict[str, Any], sort: str, shown: str, user: str) -> list[Any]:
        with told():
            return desk.facets(at["path"], sort, shown, user) if at["path"] else [gr.skip()] * 3

    def turned(
        at: dict[str, Any], token: str, sort: str, shown: str, text: str, user: str, request: gr.Request
    ) -> list[Any]:
        with told():
            return desk.page({**at, "page": 0}, desk.editor(token, request), sort, shown, text, user)

    def acted(
        at: dict[str, Any], token: str, sort: str, shown: str, text: str, user: str,
        event: gr.EventData, request: gr.Request,
    ) -> list[Any]:  # fmt: skip
        with told():
            whose = desk.editor(token, request)
            return desk.page(desk.act(at, whose, event), whose, sort, shown, text, user)

    def listed(chosen: str | None, request: gr.Request) -> Any:
        with told():
            choices = desk.choices()
            return gr.Dropdown(choices, value=chosen or request.query_params.get("data"))

    known = [at, sort, shown, user]
    blocks.load(None, None, editor, js=EDITOR, **quiet).then(listed, path, path, **quiet)
    of["again"].click(listed, path, path, **quiet)
    path.change(opened, [path, editor], [*page, *filters], **shows).success(
        indexed, known, [sort, shown, user], concurrency_id="browse-index", concurrency_limit=2, **quiet
    )
    for chosen in (sort, shown, user):
        chosen.input(turned, [at, editor, *filters], page, trigger_mode="always_last", **shows)
    filters[2].submit(turned, [at, editor, *filters], page, trigger_mode="always_last", **shows)
    for part in page[1:]:
        part.click(acted, [at, editor, *filters], page, **quiet).then(None, js=TOP)
