"""The Train tab in a browser: the form and its command line, a dry run, and a run that is started, stopped, resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign import launching
from diffalign.metrics import read_metrics

pytestmark = pytest.mark.browser
PATIENCE_MS = 240_000  # until a process on a busy machine has come somewhere
RUN = "runs/sprites-sdxl-diffusion-dpo-sprites-quick"


@pytest.fixture(scope="module")
def site(serve: Any) -> Iterator[Any]:
    server = serve("app.tabs=[train]")
    yield server
    launcher = launching.Launcher(server.folder, [server.cwd])
    for launch in launcher.running():  # of a test that failed half-way
        launcher.stop(launch.folder, at_once=True)


def opened(page: Any) -> Any:
    page.wait_for_selector("#da-key-train-steps")
    return page


def command(page: Any) -> str:
    return " ".join(page.inner_text("#da-train-command .cm-content").split())


def fill(page: Any, key: str, text: str) -> None:
    page.fill(f"#da-key-{key.replace('.', '-')} :is(input, textarea)", text)
    page.keyboard.press("Tab")


def wait_for_command(page: Any, part: str) -> None:
    shown = "document.querySelector('#da-train-command .cm-content').innerText.replace(/\\s+/g, ' ')"
    page.wait_for_function(f"part => {shown}.includes(part)", arg=part)


def wait_for_state(page: Any, state: str) -> None:
    page.wait_for_function(
        "state => document.querySelector('#da-train-status .da-state')?.innerText === state",
        arg=state,
        timeout=PATIENCE_MS,
    )


def test_the_form_is_the_command_line(site: Any, browser: Any, shoot: Any) -> None:
    page = opened(browser(site.url))
    wait_for_command(page, "train.out")
    assert command(page) == (
        "diffalign train sprites-sdxl diffusion-dpo sprites-quick source.data.path=runs/app/example/pairs.parquet"
        f" source.cache_dir=runs/app/cache train.out={RUN}"
    )
    fill(page, "train.steps", "80")
    wait_for_command(page, "train.steps=80")
    fill(page, "train.steps", "40")  # the config's own: no word for it
    page.wait_for_function("!document.querySelector('#da-train-command .cm-content').innerText.includes('steps')")
    page.click("#da-section-model")
    page.click("#da-key-model-gradient_checkpointing input")
    page.click("#da-key-model-attention input")
    page.locator("#da-key-model-attention [role=option]", has_text="sdpa").click()
    wait_for_command(page, "model.attention=sdpa model.gradient_checkpointing=true")
    shoot(page, "train-form")


def test_other_methods_have_other_fields(site: Any, browser: Any, shoot: Any) -> None:
    page = opened(browser(site.url))
    page.click("#da-train-config-more button[title='Clear'], #da-train-config-more .remove-all")
    page.fill("#da-train-config-method input", "d3po")
    page.locator("#da-train-config-method [role=option]", has_text="d3po").first.click()
    page.wait_for_selector("#da-key-source-prompts")
    wait_for_command(page, "diffalign train sprites-sdxl d3po source.prompts=sprites:train:64:two")
    assert not page.locator("#da-key-source-data-path").count()
    assert "'source.scorers=[sprites_gold]'" in command(page)  # as a shell wants it


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.steps", "many", "train.steps"),
        ("train.out", "/tmp/elsewhere", "is not below the folders of this app"),
        ("source.data.path", "/etc/passwd", "is not below the folders of this app"),
        ("source.data.path", "runs/<img src=x onerror=window.hacked=1>", "<img src=x onerror=window.hacked=1>"),
    ],
)
def test_bad_input_is_told_and_nothing_starts(site: Any, browser: Any, key: str, value: str, told: str) -> None:
    page = opened(browser(site.url))
    fill(page, key, value)
    wait_for_command(page, f"{key}=")
    page.click("#da-train-start")
    message = page.wait_for_selector(".toast-body, [data-testid=toast-body]")
    assert told in message.inner_text() and page.evaluate("window.hacked") is None
    assert not list((site.folder / "launches").glob("*.json")) and not (site.cwd / RUN).exists()


def test_a_dry_run_says_what_it_will_take_and_can_be_cancelled(site: Any, browser: Any) -> None:
    page = opened(browser(site.url))
    wait_for_command(page, "train.out")
    page.click("#da-train-check")
    page.wait_for_selector("#da-train-cancel")
    page.wait_for_function("document.querySelector('#da-train-checked').innerText.includes('tiny twin, ')")
    page.click("#da-train-cancel")
    page.wait_for_function("document.querySelector('#da-train-checked').innerText.trim() === ''")
    page.click("#da-train-check")
    page.wait_for_function(
        "document.querySelector('#da-train-checked').innerText.includes('one step on the tiny twin: loss 0.693147')",
        timeout=PATIENCE_MS,
    )
    assert not (site.cwd / RUN).exists()


def test_a_run_survives_the_app_and_is_stopped_and_resumed(site: Any, browser: Any, shoot: Any) -> None:
    page = opened(browser(site.url))
    fill(page, "train.steps", "900")
    fill(page, "train.batch_size", "4")
    wait_for_command(page, "train.steps=900")
    wait_for_command(page, "train.batch_size=4")
    page.click("#da-train-start")
    wait_for_state(page, "running")
    said = json.loads(next((site.folder / "launches").glob("*.json")).read_text())["words"]
    assert " ".join(["diffalign", "train", *said]) == command(page)
    page.wait_for_function(
        "/step [1-9]\\d* of 900/.test(document.querySelector('#da-train-status').innerText)", timeout=PATIENCE_MS
    )
    shoot(page, "train-running")
    site.kill()
    site.restart()
    page = opened(browser(site.url))
    wait_for_state(page, "running")  # the run did not end with the app, and the new app knows it
    wait_for_command(page, "quick-2")
    page.click("#da-train-start")
    refused = page.wait_for_selector(".toast-body, [data-testid=toast-body]").inner_text()
    assert "1 of at most 1 runs are going on" in refused
    page.click("#da-train-stop")
    wait_for_state(page, "interrupted")
    out = site.cwd / RUN
    done = len(read_metrics(out))
    assert 0 < done < 900 and (out / "checkpoints" / f"step-{done:08d}").is_dir()
    shoot(page, "train-stopped")
    page.click("#da-train-resume")
    wait_for_state(page, "running")
    step = "Number(document.querySelector('#da-train-status').innerText.match(/step (\\d+) of 900/)[1])"
    page.wait_for_function(f"{step} > {done}", timeout=PATIENCE_MS)
    page.click("#da-train-kill")
    wait_for_state(page, "interrupted")
    steps = [row["step"] for row in read_metrics(out)]
    assert steps == list(range(len(steps))) and len(steps) > done  # it went on where it had stopped


def test_the_app_keeps_to_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign import api
    from gradio_app._context import open_context
    from gradio_app.train import NOTHING, Runs

    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "run").mkdir(parents=True)
    (tmp_path / "secret" / "run" / "config.yaml").write_text("model: {name: secret}")
    (tmp_path / "secret" / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    context = open_context(["app.roots=[given]"])
    runs = Runs(context, api.launcher(folder=context.folder, roots=context.roots))
    for path in (tmp_path / "secret" / "run", f"{tmp_path}/given/../secret/run"):
        assert runs.show(str(path)) == ("", NOTHING)
