"""Compare: models, checkpoints and adapters side by side on the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from diffalign import api
from gradio_app import _compare_grid as show
from gradio_app._context import Context
from gradio_app._parts import escape, told

LABEL = "Compare"
FIELDS = ("contestants", "prompts", "seeds", "steps", "cfg", "sampler", "eta", "scorers", "vary", "values")
LISTS = ("contestants", "prompts", "scorers")
VALUES = {"steps": "5, 10, 20, 40", "cfg": "1, 2, 4, 8", "strength": "0, 0.5, 1, 1.5", "user": ""}
VARIES = {
    "steps": "numbers of sampler steps",
    "cfg": "guidance scales",
    "strength": "strengths of each adapter",
    "user": "users: ann, or ann:0.7+bob:0.3, or ann..bob for five mixtures",
}
MAX_AGE = 10.0  # seconds for which a list of models is good for a page that opens
EVERY = 0.4  # seconds between looks at what has arrived
CHOOSE = "element.addEventListener('click', e => daCompare.choose(element, e, cells => trigger('click', {cells})));"
PLACE = "watch('value', () => daCompare.place(element));"
DOWNLOAD = "() => daCompare.press('da-compare-file')"
TO_PAIR = "() => daCompare.show('da-compare-pair')"
LINK = "query => [daCompare.link(query)]"
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build(context: Context, blocks: gr.Blocks) -> None:
    """The form on the left, the pictures on the right."""
    studio = api.studio(config=context.config, folder=context.folder, roots=context.roots, below=context.below)
    studio.load()
    with gr.Row(elem_classes="da-compare"):
        with gr.Column(scale=2, min_width=300):
            form = _form(studio)
            with gr.Row(elem_classes="da-compare-go"):
                run = gr.Button("Compare", variant="primary", elem_id="da-compare-run", min_width=120)
                cancel = gr.Button("Cancel", elem_id="da-compare-cancel", min_width=80)
        with gr.Column(scale=5, min_width=300):
            shown = gr.State(None)  # this visitor's comparison
            status = gr.HTML("", elem_id="da-compare-status")
            grid = gr.HTML(show.nothing(), elem_id="da-compare-grid", js_on_load=CHOOSE)
            news = gr.HTML("", elem_id="da-compare-news", js_on_load=PLACE, visible="hidden")
            fields = [form[field] for field in FIELDS]
            _tools(studio, shown, fields)
            pair = gr.HTML("", elem_id="da-compare-pair")
    outputs = [shown, status, grid, news, pair]

    def compare(*values: Any) -> Iterator[list[Any]]:
        yield from _compare(studio, values)

    run.click(None, None, status, js=f"() => [{show.waiting()!r}]")  # until it is this visitor's turn
    running = run.click(compare, fields, outputs, concurrency_id="generation", concurrency_limit=1, **QUIET)
    running.failure(lambda: "", None, status, **QUIET)
    cancel.click(_stopped, shown, outputs, cancels=[running], queue=False, **QUIET)
    grid.click(_pair, shown, pair, **QUIET).then(None, js=TO_PAIR)

    def opened(request: gr.Request) -> list[Any]:
        return _opened(studio, request.query_params.multi_items())

    blocks.load(opened, None, fields, **QUIET)


def _tools(studio: Any, shown: gr.State, fields: list[Any]) -> None:
    """What leaves the page: a link, a download, pictures to vote on."""
    with gr.Row(elem_classes="da-compare-tools"):
        link = gr.Button("Link", size="sm", elem_id="da-compare-link", min_width=90)
        download = gr.Button("Download", size="sm", elem_id="da-compare-download", min_width=90)
        keep = gr.Button("Keep for voting", size="sm", elem_id="da-compare-keep", min_width=120)
    address = gr.Textbox(
        label="Link", visible="hidden", interactive=False, buttons=["copy"], elem_id="da-compare-address"
    )
    query, file = gr.Textbox(visible="hidden"), gr.DownloadButton(visible="hidden", elem_id="da-compare-file")

    def link_of(comparison: Any, *values: Any) -> list[Any]:
        """Of what is shown, else of the form."""
        with told():
            view = comparison.plan.view if comparison is not None else _view(studio, values)
            return [view.link(), gr.Textbox(visible=True)]

    def zipped(comparison: Any) -> str:
        with told():
            return str(studio.archive(_there(comparison)))

    def kept(comparison: Any) -> None:
        with told():
            folder = studio.save(_there(comparison))
        gr.Info(escape(f"{folder} is ready: tab Vote shows its pictures, blind"), title="Kept")

    link.click(link_of, [shown, *fields], [query, address], **QUIET).success(None, query, address, js=LINK)
    download.click(zipped, shown, file, **QUIET).success(None, js=DOWNLOAD)
    keep.click(kept, shown, None, **QUIET)


def _opened(studio: Any, words: Sequence[tuple[str, str]]) -> list[Any]:
    """The form as the page's link says; nothing is painted before somebody asks."""
    own = [(word, text) for word, text in words if word != "tab" and not word.startswith("__")]  # __theme is gradio's
    names = studio.refresh(MAX_AGE)
    if not own or dict(words).get("tab", "compare") != "compare":
        newest = list(studio.first_view().contestants)  # a run may have ended since the server began
        return [gr.Dropdown(choices=names, value=newest), *[gr.skip()] * (len(FIELDS) - 1)]
    with told():
        chosen, *others = _values(studio.view_of_link(own))
    return [gr.Dropdown(choices=names, value=chosen), *others]


def _form(studio: Any) -> dict[str, Any]:
    """The components by field."""
    view = studio.first_view()
    form: dict[str, Any] = {}
    form["contestants"] = gr.Dropdown(
        list(studio.found), value=list(view.contestants), multiselect=True, allow_custom_value=True,
        label="Models and adapters", info="NAME@0.5 is an adapter at half its strength",
        elem_id="da-compare-contestants",
    )  # fmt: skip
    form["prompts"] = gr.Textbox(
        "\n".join(view.prompts), label="Prompts", info="one a line", lines=4, max_lines=12, elem_id="da-compare-prompts"
    )
    _filling(studio, form["prompts"])
    with gr.Row():
        form["seeds"] = gr.Textbox(view.seeds, label="Seeds", elem_id="da-compare-seeds", min_width=70)
        form["steps"] = gr.Number(view.steps, label="Steps", precision=0, elem_id="da-compare-steps", min_width=70)
        form["cfg"] = gr.Number(view.cfg, label="CFG", step=0.5, elem_id="da-compare-cfg", min_width=70)
    form["scorers"] = gr.Dropdown(
        studio.judges.names, value=list(view.scorers), multiselect=True, label="Scorers", elem_id="da-compare-scorers"
    )
    with gr.Row():
        vary = form["vary"] = gr.Dropdown(
            ["none", "seeds", *VALUES], value=view.vary, label="Vary", elem_id="da-compare-vary", min_width=90
        )
        values = form["values"] = gr.Textbox(
            view.values, label="Values", visible=False, elem_id="da-compare-values", min_width=140
        )
    with gr.Accordion("Sampler and list of models", open=False):
        with gr.Row():
            form["sampler"] = gr.Dropdown(list(studio.samplers), value=view.sampler, label="Sampler", min_width=120)
            form["eta"] = gr.Number(view.eta, label="Eta", step=0.1, min_width=70)
        refresh = gr.Button("Look for new runs", size="sm", elem_id="da-compare-refresh")
    refresh.click(
        lambda: gr.Dropdown(choices=studio.refresh()), None, form["contestants"], api_visibility="private"
    )  # fmt: skip
    vary.input(lambda kind: gr.Textbox(value=VALUES.get(kind, "")), vary, values, api_visibility="private")
    vary.change(_values_box, vary, values, **QUIET)
    return form


def _filling(studio: Any, prompts: gr.Textbox) -> None:
    """Ways to fill the box of prompts."""
    with gr.Accordion("Prompts from a set or a file", open=False):
        with gr.Row():
            name = gr.Dropdown(list(studio.sets), label="Set", min_width=120)
            num = gr.Number(4, label="Number", precision=0, minimum=1, min_width=70)
        with gr.Row():
            fill = gr.Button("Take these", size="sm", elem_id="da-compare-fill", min_width=90)
            sent = gr.UploadButton("Text or JSONL file", size="sm", file_types=[".txt", ".jsonl"])

    def of_set(chosen: str, number: float | None) -> str:
        with told():
            return "\n".join(studio.prompts_of(chosen, int(number or 0)))

    def of_file(path: str) -> str:
        with told():
            return "\n".join(studio.prompts_in(path))

    fill.click(of_set, [name, num], prompts, api_visibility="private")
    sent.upload(of_file, sent, prompts, api_visibility="private")


def _values_box(kind: str) -> gr.Textbox:
    return gr.Textbox(visible=kind in VALUES, label=f"Values: {VARIES[kind]}" if kind in VARIES else "Values")


def _view(studio: Any, values: Sequence[Any]) -> Any:
    """The view of the form's components, in the order of FIELDS."""
    said = dict(zip(FIELDS, values, strict=True))
    said["prompts"] = [line for line in (said["prompts"] or "").split("\n") if line.strip()]
    return studio.view({field: list(value) if field in LISTS else value for field, value in said.items()})


def _values(view: Any) -> list[Any]:
    """The form's components for a view."""
    said = {field: getattr(view, field) for field in FIELDS}
    said["prompts"] = "\n".join(view.prompts)
    return [list(value) if field in LISTS and field != "prompts" else value for field, value in said.items()]


def _compare(studio: Any, values: Sequence[Any]) -> Iterator[list[Any]]:
    """The page while a comparison is made; whoever closes this stops it."""
    with told():
        comparison = studio.start(_view(studio, values))
    there: set[Any] = set()
    try:
        yield [comparison, show.status(comparison), show.grid(comparison, with_pictures=False), "", ""]
        while not comparison.wait(EVERY):
            fresh = [cell for cell in list(comparison.pictures) if cell not in there]
            there.update(fresh)
            news = show.news(comparison, fresh) if fresh else gr.skip()
            yield [gr.skip(), show.status(comparison), gr.skip(), news, gr.skip()]
    finally:
        comparison.stop()
    yield [gr.skip(), show.status(comparison), show.grid(comparison), "", gr.skip()]


def _stopped(comparison: Any) -> list[Any]:
    """The page with what is there of a comparison that was cancelled, or never began."""
    if comparison is None:
        return [None, "", show.nothing(), "", ""]
    comparison.stop()
    comparison.wait(30)
    return [gr.skip(), show.status(comparison), show.grid(comparison), "", gr.skip()]


def _there(comparison: Any) -> Any:
    if comparison is None:
        raise api.UserError("there are no pictures yet: press Compare first")
    return comparison


def _pair(comparison: Any, event: gr.EventData) -> str:
    """A slider between two pictures, and their difference; `cells` comes from the page, and may be anything."""
    with told():
        said = [show.cell_of(name) for name in list(getattr(event, "cells", []))[:2]]
        cells = [cell for cell in said if cell is not None and cell in _there(comparison).pictures]
        if len(cells) != 2:
            raise api.UserError("choose two pictures that are there")
        return show.pair(comparison, cells[0], cells[1])
