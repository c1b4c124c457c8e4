"""Watch: curves, sample grids and configs of running and past runs, one or two at a time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from diffalign import api
from gradio_app._context import Context
from gradio_app._parts import data_uri, empty, escape, told
from gradio_app._watch_parts import charts_html, differences_html, status_html

LABEL = "Watch"
EVERY_S = 3.0  # between looks at the files
PATIENCE_S = 1.0  # a long file is read on at the next look
MAX_VIEWS = 16  # runs whose curves are kept in memory, for all visitors together
GRID_WIDTH = 1600  # pixels of a sample grid in the page
NONE = ""  # no second run
NO_RUNS = empty(
    "No runs yet",
    "A run appears here as soon as it begins: start one on the <b>Train</b> tab, or<br>"
    "<code>diffalign train sprites-sdxl diffusion-dpo source.data.path=PAIRS</code>",
)


class Views:
    """The runs that are being looked at; their curves are read once for all visitors."""

    def __init__(self) -> None:
        self._views: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, folder: Path) -> Any:
        """The view of a run, read as far as there is time."""
        with self._lock:
            view = self._views.get(folder) or api.view_run(folder=folder)
            self._views[folder] = view
            self._views.move_to_end(folder)
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        until = time.monotonic() + PATIENCE_S
        while view.refresh() and view.curves.unread and time.monotonic() < until:
            pass
        return view


class Watch:
    """What the tab shows, as functions of the chosen runs."""

    def __init__(self, context: Context) -> None:
        self.context, self.views, self.drawer = context, Views(), api.run_charts()

    def choices(self) -> list[tuple[str, str]]:
        """(name, folder) of every run, the newest first."""
        return [(run.name, str(run.folder)) for run in api.find_runs(roots=self.context.roots)]

    def chosen(self, *folders: str) -> dict[str, tuple[Any, Any]]:
        """A and B -> how the run stands, and its view; without what is not chosen or gone."""
        found = {}
        for name, folder in zip("AB", folders, strict=True):
            run = api.read_run(folder=self.context.below(folder)) if folder else None
            if run is not None:
                found[name] = (run, self.views.of(run.folder))
        return found

    def mark(self, runs: dict[str, tuple[Any, Any]]) -> list[Any]:
        """Changes whenever something that is shown does."""
        return [
            [str(run.folder), view.curves.version, view.curves.step, run.state, run.reason, len(view.samples())]
            for run, view in runs.values()
        ]

    def curves(self, runs: dict[str, tuple[Any, Any]], smooth: bool, log: bool) -> str:
        """The charts, or what is missing."""
        if not runs:
            return NO_RUNS
        curves = {name: view.curves for name, (_, view) in runs.items()}
        proxies = {name: view.proxy for name, (_, view) in runs.items()}
        groups = self.drawer.groups(curves, proxies, smooth, log)
        return charts_html(groups) if groups else empty("No numbers yet", "The first step has not been logged.")

    def steps(self, runs: dict[str, tuple[Any, Any]]) -> list[int]:
        """Steps at which any of the runs has a sample grid."""
        return sorted({step for _, view in runs.values() for step in view.samples()})

    def grids(self, runs: dict[str, tuple[Any, Any]], index: int) -> str:
        """The sample grids of the runs at one place of the slider, side by side."""
        steps = self.steps(runs)
        if not steps:
            return empty(
                "No sample grids yet", "Runs draw one every <code>train.sample_every</code> steps and at the end."
            )
        step = steps[max(0, min(int(index), len(steps) - 1))]
        grids = "".join(self._grid(name, *of, step) for name, of in runs.items())
        return f'<div class="da-watch-grids-box">{grids}</div>'

    def _grid(self, name: str, run: Any, view: Any, step: int) -> str:
        grids = view.samples()
        at = max((each for each in grids if each <= step), default=None)
        if at is None:
            return ""
        what = "the base model" if at == 0 else f"after step {at}"
        title = f'<div class="da-name-{name}"><b>{name}</b> {escape(run.name)}, {what}</div>'
        try:
            with Image.open(grids[at]) as image:
                picture = f'<img src="{data_uri(image, GRID_WIDTH)}" alt="sample grid {what}">'
        except (OSError, Image.DecompressionBombError):
            picture = empty("This grid cannot be read", escape(grids[at].name))
        return f'<div class="da-watch-grid">{title}{picture}</div>'


def build(context: Context, blocks: gr.Blocks) -> None:
    """The choice of one or two runs; below their curves, samples and configs, which follow the files by themselves."""
    watch = Watch(context)
    with gr.Row(elem_classes="da-watch-top"):
        first = gr.Dropdown([], label="Run", elem_id="da-watch-a", filterable=True, scale=5, min_width=240)
        second = gr.Dropdown([], label="Compare with", elem_id="da-watch-b", filterable=True, scale=5, min_width=240)
        again = gr.Button("Find runs", elem_id="da-watch-refresh", scale=1, min_width=110)
    status = gr.HTML(NO_RUNS, elem_id="da-watch-status")
    with gr.Tabs():
        with gr.Tab("Curves", elem_id="da-watch-curves-tab"):
            with gr.Row(elem_classes="da-watch-options"):
                smooth = gr.Checkbox(
                    True, label="Smooth", elem_id="da-watch-smooth", container=False, scale=0, min_width=120
                )
                log = gr.Checkbox(
                    False, label="Logarithmic loss", elem_id="da-watch-log", container=False, scale=0, min_width=180
                )
            charts = gr.HTML("", elem_id="da-watch-charts")
        with gr.Tab("Samples", elem_id="da-watch-samples-tab"):
            place = gr.Slider(
                0, 1, 0, step=1, label="Sample grid, oldest to newest", elem_id="da-watch-place", visible=False
            )
            grids = gr.HTML("", elem_id="da-watch-grids")
        with gr.Tab("Config", elem_id="da-watch-config-tab"):
            differences = gr.HTML("", elem_id="da-watch-differences")
            config = gr.Code("", language="yaml", label="Resolved config", elem_id="da-watch-config", max_lines=30)
    mark: gr.State = gr.State([])
    shown = [mark, status, charts, place, grids, differences, config]

    def draw(a: str, b: str, smooth: bool, log: bool, index: int, was: list[Any]) -> list[Any]:
        with told():
            runs = watch.chosen(a, b)
            steps, text = watch.steps(runs), runs["A"][1].config_text if "A" in runs else ""
            had = was[-1] if was else 0
            index = len(steps) - 1 if not had or index >= had - 1 else index  # who looks at the newest stays there
            slider = gr.Slider(maximum=max(1, len(steps) - 1), value=max(0, index), visible=len(steps) > 1)
            return [
                [*watch.mark(runs), len(steps)],
                status_html(runs) if runs else "",
                watch.curves(runs, smooth, log),
                slider,
                watch.grids(runs, index) if runs else "",
                differences_html(*(run for run, _ in runs.values())) if len(runs) == 2 else "",
                gr.Code(text, visible=bool(text)),
            ]

    def look(a: str, b: str, smooth: bool, log: bool, index: int, was: list[Any]) -> list[Any]:
        """The page anew where a file has changed."""
        try:
            is_same = [*watch.mark(watch.chosen(a, b)), was[-1] if was else 0] == was
        except api.UserError:  # the folder is gone: what was drawn stays, and nobody is told every three seconds
            is_same = True
        return [gr.skip()] * len(shown) if is_same else draw(a, b, smooth, log, index, was)

    def find(a: str, b: str, request: gr.Request) -> list[Any]:
        choices = watch.choices()
        folders = [folder for _, folder in choices]
        asked = [folder for folder in folders if folder == request.query_params.get("run")]
        a = a if a in folders else next(iter([*asked, *folders]), NONE)
        b = b if b in folders else NONE
        return [gr.Dropdown(choices, value=a or None), gr.Dropdown([("nothing", NONE), *choices], value=b)]

    given = [first, second, smooth, log, place, mark]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (blocks.load, again.click):
        event(find, [first, second], [first, second], **quiet).then(draw, given, shown, **quiet)
    gr.on([first.input, second.input, smooth.input, log.input], draw, given, shown, trigger_mode="always_last", **quiet)
    place.input(
        lambda a, b, index: watch.grids(watch.chosen(a, b), index),
        [first, second, place], grids, trigger_mode="always_last", **quiet,
    )  # fmt: skip
    gr.Timer(EVERY_S).tick(look, given, shown, **quiet)
