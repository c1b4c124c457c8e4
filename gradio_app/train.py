"""Train: a run from a form made from the config schema, its command line, and starting, stopping and resuming it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from diffalign import api
from gradio_app._context import Context
from gradio_app._parts import empty, escape, told
from gradio_app._train_form import embedded, make_form, opening, show_fields
from gradio_app._watch_parts import duration, pill

LABEL = "Train"
EVERY_S = 2.0  # between looks at the runs
LOG_LINES = 14
NOTHING = empty("No run of this app yet", "What you start goes on when this page, or the app, is closed.")


class Runs:
    """The runs that can be stopped or resumed, as the tab shows them."""

    def __init__(self, context: Context, launcher: Any) -> None:
        self.context, self.launcher = context, launcher

    def choices(self) -> list[tuple[str, str]]:
        """(name, folder) of what was started here and of every unfinished run, the newest first."""
        started = [launch.folder for launch in self.launcher.launches()]
        unfinished = [run.folder for run in api.find_runs(roots=self.context.roots) if run.state != "finished"]
        folders = dict.fromkeys([*started, *unfinished])
        return [(self._name(folder), str(folder)) for folder in folders]

    def _name(self, folder: Path) -> str:
        root = next((root for root in self.context.roots if folder.is_relative_to(root)), folder.parent)
        return str(folder.relative_to(root)) if folder != root else folder.name

    def state(self, folder: Path) -> tuple[str, Any, Any]:
        """(state, run or None, launch or None); a process without a run folder yet is starting."""
        launch = self.launcher.launch(folder)
        run = api.read_run(folder=folder)
        if launch is not None and launch.is_alive and (run is None or run.state not in ("running", "finished")):
            return "starting", run, launch
        if run is None:
            return "failed" if launch is not None else "gone", run, launch
        return run.state, run, launch

    def show(self, folder: str) -> tuple[str, str]:
        """(state, HTML) of the chosen run."""
        if not folder:
            return "", NOTHING
        path = Path(folder).resolve()
        if not any(path.is_relative_to(root) for root in self.context.roots):
            return "", NOTHING
        state, run, launch = self.state(path)
        share = min(1.0, run.step / run.steps) if run is not None and run.steps else 0.0
        facts = [] if run is None else [f"step {run.step} of {run.steps}"]
        if run is not None and run.seconds_left is not None:
            facts.append(f"about {duration(run.seconds_left)} of training left")
        if run is not None and run.reason:
            facts.append(run.reason)
        log = self.launcher.log(launch).rstrip().splitlines()[-LOG_LINES:] if launch is not None else []
        link = f'<a href="?tab=watch&amp;run={quote(folder)}" target="_blank" rel="noopener">Watch it</a>'
        stands = f"{escape(', '.join(facts))} {link}" if run is not None else ""
        printed = f'<pre class="da-log">{escape(chr(10).join(log))}</pre>' if log else ""
        return state, (
            f'<div class="da-run"><div class="da-run-line"><span class="da-run-name">{escape(self._name(path))}</span>'
            f'{pill(state)}</div><div class="da-track"><div style="width:{100 * share:.1f}%"></div></div>'
            f'<div class="da-run-facts">{stands}</div>{printed}</div>'
        )


def check_html(printed: str) -> str:
    """What `diffalign check` says: the estimates in the open, the resolved config before them folded."""
    config, _, estimates = printed.strip().rpartition("\n\n")
    if not estimates:
        return ""
    folded = f"<details><summary>The resolved config</summary><pre>{escape(config)}</pre></details>" if config else ""
    return f'<div class="da-log">{escape(estimates)}{folded}</div>'


def build(context: Context, blocks: gr.Blocks) -> None:
    """The form on the left; on the right its command, and the run that it started."""
    start_with = opening(context)
    launcher = api.launcher(
        folder=context.folder, roots=context.roots, max_runs=context.settings.max_runs, configs=start_with.own
    )
    runs = Runs(context, launcher)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    words = gr.State([])
    with gr.Row(elem_classes="da-train"):
        with gr.Column(scale=3, min_width=320):
            with gr.Row():
                model = gr.Dropdown(
                    list(start_with.models), value=start_with.model, label="Model", elem_id="da-train-config-model"
                )
                method = gr.Dropdown(
                    list(start_with.methods), value=start_with.method, label="Method", elem_id="da-train-config-method"
                )
                more = gr.Dropdown(
                    list(start_with.more), value=list(start_with.chosen), multiselect=True, label="Further settings",
                    elem_id="da-train-config-more",
                )  # fmt: skip
            configs = [model, method, more]

            @gr.render(configs, triggers=[blocks.load, *(config.change for config in configs)], show_progress="minimal")
            def fields(model: str, method: str, more: list[str]) -> None:
                try:
                    form = make_form(context, model, method, more)
                except api.UserError as error:
                    gr.HTML(empty("These configs do not go together", escape(error)))
                    return
                parts = show_fields(form)

                def changed(*values: Any) -> tuple[list[str], str]:
                    made = form.words(values)
                    return made, api.command_line(words=made)

                gr.on(
                    [part.change for part in parts], changed, parts, [words, line], trigger_mode="always_last", **quiet
                )

        with gr.Column(scale=2, min_width=320, elem_classes="da-train-side"):
            line = gr.Code("", language="shell", label="The command", lines=2, wrap_lines=True, show_line_numbers=False,
                           interactive=False, elem_id="da-train-command", buttons=["copy"])  # fmt: skip
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="da-train-start", min_width=100)
                check = gr.Button("Check", elem_id="da-train-check", min_width=100)
                cancel = gr.Button("Cancel", elem_id="da-train-cancel", min_width=100, visible=False)
            checked = gr.HTML("", elem_id="da-train-checked")
            chosen = gr.Dropdown([], label="Runs", elem_id="da-train-run")
            status = gr.HTML(NOTHING, elem_id="da-train-status")
            with gr.Row():
                stop = gr.Button("Stop", elem_id="da-train-stop", min_width=90, visible=False)
                kill = gr.Button("Stop at once", variant="stop", elem_id="da-train-kill", min_width=90, visible=False)
                resume = gr.Button("Resume", elem_id="da-train-resume", min_width=90, visible=False)
    was: gr.State = gr.State(("", ""))
    panel = [was, status, stop, kill, resume]

    def show(folder: str | None, was: Any = None) -> list[Any]:
        with told():
            now = runs.show(folder or "")
        if now == was:
            return [gr.skip()] * len(panel)
        is_on, rests = now[0] in ("running", "starting"), now[0] in ("interrupted", "failed", "waits for votes")
        buttons = [gr.Button(visible=seen) for seen in (is_on, is_on, rests)]
        return [now, now[1], *buttons]

    def begin(model: str, method: str, more: list[str]) -> tuple[list[str], str]:
        try:
            form = make_form(context, model, method, more)
        except api.UserError:
            return [], ""
        made = form.words(form.values)
        return made, api.command_line(words=made)

    def choose(folder: str | None) -> Any:
        choices = runs.choices()
        folders = [value for _, value in choices]
        return gr.Dropdown(choices, value=folder if folder in folders else next(iter(folders), None))

    def started(words: list[str]) -> Any:
        with told():
            embedded(context, words)
            launch = launcher.start(words)
            gr.Info(f"{escape(launch.folder.name)} is starting; its first step comes in some seconds.")
            return choose(str(launch.folder))

    given_up: set[str | None] = set()  # sessions whose dry run was cancelled

    def try_out(words: list[str], request: gr.Request) -> Iterator[tuple[str, Any, Any]]:
        given_up.discard(request.session_hash)
        with told():
            embedded(context, words)
            begun, looks = time.monotonic(), launcher.dry_run(words)
            for is_over, printed in looks:
                if request.session_hash in given_up:
                    looks.close()  # ends the process
                    is_over, printed = True, ""
                waiting = f"checking on a tiny twin, {time.monotonic() - begun:.0f} s"
                buttons = gr.Button(interactive=is_over), gr.Button(visible=not is_over)
                yield check_html(printed if is_over else waiting), *buttons

    def give_up(request: gr.Request) -> None:
        given_up.add(request.session_hash)

    def asked_to_stop(folder: str, at_once: bool) -> None:
        with told():
            launcher.stop(Path(folder), at_once)
        if not at_once:
            gr.Info("It ends after the step it is in, with a checkpoint from which Resume goes on.")

    def go_on(folder: str) -> None:
        with told():
            launcher.resume(Path(folder))

    gr.on([blocks.load, *(config.change for config in configs)], begin, configs, [words, line], **quiet)
    blocks.load(choose, chosen, chosen, **quiet).then(show, chosen, panel, **quiet)
    start.click(started, words, chosen, **quiet).success(show, chosen, panel, **quiet)
    check.click(try_out, words, [checked, check, cancel], concurrency_id="generation", concurrency_limit=1, **quiet)
    cancel.click(give_up, None, None, queue=False, **quiet)
    stop.click(lambda folder: asked_to_stop(folder, False), chosen, None, **quiet).then(show, chosen, panel, **quiet)
    kill.click(lambda folder: asked_to_stop(folder, True), chosen, None, **quiet).then(show, chosen, panel, **quiet)
    resume.click(go_on, chosen, None, **quiet).success(show, chosen, panel, **quiet)
    chosen.input(show, chosen, panel, **quiet)
    chosen.focus(choose, chosen, chosen, **quiet)
    gr.Timer(EVERY_S).tick(show, [chosen, was], panel, **quiet)
