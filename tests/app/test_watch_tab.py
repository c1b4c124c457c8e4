"""The Watch tab in a browser: past runs over each other, a run that is being trained, and nothing yet."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from diffalign.api import example_pairs
from diffalign.errors import UserError

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=window.hacked=1>"
PATIENCE_MS = 240_000  # until a training on a busy machine has come somewhere


def rows(num: int, lift: float) -> list[dict[str, Any]]:
    """Curves as a run over-optimises: the proxy rises, the held-out scorer turns."""
    found = []
    for step in range(num):
        x = step / num
        row: dict[str, Any] = {"step": step, "loss": 0.69 - 0.2 * x * lift + 0.05 * math.sin(step), "lr": 1e-4}
        row |= {"margin": x * lift, "implicit_accuracy": 0.5 + 0.3 * x, "grad_norm": 1 + math.cos(step) / 2}
        row |= {"winner_error_gap": 0.01 * x, "loser_error_gap": 0.02 * x, EVIL: x, "pairs_per_second": 20.0}
        row |= {f"implicit_accuracy/t{low}-{low + 0.25}": 0.5 + x * low / 2 for low in (0.0, 0.25, 0.5, 0.75)}
        if step % 20 == 19:
            row |= {"samples/proxy": 0.4 + x, "samples/proxy_se": 0.05, "samples/gold": 0.8 - (x - 0.4) ** 2}
            row |= {"samples/gold_se": 0.02, "samples/diversity": 2 - x, "samples/diversity_se": 0.05}
            row |= {"holdout/implicit_accuracy": 0.5 + 0.2 * x, "holdout/margin": x / 2, "alarm": float(step == 99)}
        found.append(row)
    return found


def make(folder: Path, beta: float, lift: float) -> None:
    """A finished run, without the hours."""
    (folder / "samples").mkdir(parents=True)
    config = {
        "model": {"name": "sdxl", "path": "package:diffalign.sprites/weights/sdxl"},
        "source": {"name": "offline", "data": {"path": "pairs.parquet"}},
        "objective": {"name": "pair", "beta": beta, "note": EVIL},
        "train": {"steps": 120, "batch_size": 8, "sample_prompts": [f"a {'very ' * 60}long prompt"]},
        "stop": {"train_scorer": "proxy"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(120, lift)))
    (folder / "export_check.json").write_text(json.dumps({"steps": 120, "problems": []}))
    (folder / "alarm.json").write_text(json.dumps({"step": 100, "reason": f"proxy rises while gold falls {EVIL}"}))
    for step in (0, 60, 120):
        Image.new("RGB", (300, 200), (int(step * 2 * lift) % 256, 80, 160)).save(
            folder / "samples" / f"step-{step:08d}.png"
        )


@pytest.fixture(scope="module")
def past(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An app with two runs of long ago; the name of one is no friend of HTML."""
    cwd = tmp_path_factory.mktemp("past")
    make(cwd / "runs" / "sweep" / "runs" / "beta-500-seed0", 500.0, 1.0)
    make(cwd / "runs" / f"b {EVIL.replace('/', '')}", 2000.0, 2.0)
    return serve("app.tabs=[watch]", cwd=cwd)


def choose(page: Any, dropdown: str, text: str) -> None:
    page.click(f"#{dropdown} input")
    page.locator(f"#{dropdown} [role=option]", has_text=text).first.click()


def test_past_runs_are_looked_at_and_compared(past: Any, browser: Any, shoot: Any) -> None:
    page = browser(f"{past.url}?run={past.cwd}/runs/sweep/runs/beta-500-seed0")
    page.wait_for_selector("#da-watch-charts svg")
    status = page.inner_text("#da-watch-status")
    assert "beta-500-seed0" in status and "step 120 of 120" in status and "finished" in status
    assert "over-optimisation alarm after step 100" in status
    titles = page.locator("#da-watch-charts figcaption b").all_inner_texts()
    wanted = ["Loss", "Margin", "Implicit accuracy", "Accuracy by noise level", "Error against the reference"]
    assert [title for title in titles if title in wanted] == wanted
    assert "Proxy against held-out scorers" in titles and "Diversity" in titles and "Held-out ranking" not in titles
    title = page.locator("#da-watch-charts svg title").first.text_content()
    assert re.match(r"loss 0\.\d+ \(step \d+\)", title)

    choose(page, "da-watch-b", "b <img")
    page.wait_for_selector(".da-run-B")
    page.wait_for_function("document.querySelectorAll('#da-watch-charts figcaption b').length > 12")
    assert "Accuracy by noise level, B" in page.locator("#da-watch-charts figcaption b").all_inner_texts()
    dashed = page.locator("#da-watch-charts figure", has_text="Loss").first.locator("[style*=stroke-dasharray]").count()
    assert dashed >= 2  # the second run's line and its legend
    before = page.locator("#da-watch-charts figure").first.inner_html()
    page.click("#da-watch-log input")
    page.wait_for_function(
        "before => document.querySelector('#da-watch-charts figure').innerHTML !== before", arg=before
    )
    shoot(page, "watch-curves")
    assert page.evaluate("window.hacked") is None and EVIL in page.inner_text("#da-watch-status")


def test_sample_grids_follow_the_slider_side_by_side(past: Any, browser: Any, shoot: Any) -> None:
    page = browser(past.url)
    page.wait_for_selector("#da-watch-charts svg")
    choose(page, "da-watch-a", "beta-500")
    choose(page, "da-watch-b", "b <img")
    page.wait_for_selector(".da-run-B")
    page.click("button[role=tab]:has-text('Samples')")
    grids = page.locator("#da-watch-grids img")
    page.wait_for_function("document.querySelectorAll('#da-watch-grids img').length === 2")
    assert page.inner_text("#da-watch-grids").count("after step 120") == 2
    newest = [grids.nth(number).get_attribute("src") for number in (0, 1)]
    assert newest[0] != newest[1]
    page.fill("#da-watch-place input[type=number]", "0")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('#da-watch-grids').innerText.includes('the base model')")
    assert page.inner_text("#da-watch-grids").count("the base model") == 2
    assert grids.nth(0).get_attribute("src") != newest[0]
    page.wait_for_timeout(4000)  # a look at the files does not move the slider
    assert page.inner_text("#da-watch-grids").count("the base model") == 2
    shoot(page, "watch-samples")


def test_configs_are_shown_with_what_differs(past: Any, browser: Any, shoot: Any) -> None:
    page = browser(past.url)
    page.wait_for_selector("#da-watch-charts svg")
    choose(page, "da-watch-a", "beta-500")
    choose(page, "da-watch-b", "b <img")
    page.click("button[role=tab]:has-text('Config')")
    page.wait_for_selector("#da-watch-differences tbody tr")
    table = [row.split("\t") for row in page.locator("#da-watch-differences tbody tr").all_inner_texts()]
    assert table == [["objective.beta", "500.0", "2000.0"]]
    assert "beta: 500.0" in page.inner_text("#da-watch-config")
    shoot(page, "watch-config")
    assert page.evaluate("window.hacked") is None


def test_a_run_is_watched_live(serve: Any, browser: Any, shoot: Any) -> None:
    """From nothing, through the first steps of a real training, to its end; the page is never loaded again."""
    server = serve("app.tabs=[watch]")
    page = browser(server.url)
    page.wait_for_selector("#da-watch-charts .da-empty")
    assert "No runs yet" in page.inner_text("#da-watch-charts")
    shoot(page, "watch-empty")
    example_pairs(path=server.cwd / "pairs.parquet", num=60)
    words = ["sprites-sdxl", "diffusion-dpo", "sprites-quick", "source.data.path=pairs.parquet", "train.out=runs/live"]
    words += ["train.steps=24", "train.batch_size=4", "train.sample_every=8", "train.validate_every=8"]
    with open(server.cwd / "train.log", "wb") as log:
        training = subprocess.Popen(
            [sys.executable, "-m", "diffalign", "train", *words],
            cwd=server.cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        for _ in range(60):
            page.click("#da-watch-refresh")
            page.wait_for_timeout(2000)
            if page.locator(".da-run-A").count():
                break
        step = "Number((document.querySelector('.da-run-A')?.innerText.match(/step (\\d+) of 24/) || [])[1] || 0)"
        page.wait_for_function(f"{step} > 0", timeout=PATIENCE_MS)
        first = page.evaluate(step)
        assert "running" in page.inner_text(".da-run-A")
        drawn = page.locator("#da-watch-charts figure").first.inner_html()
        page.wait_for_function(f"{step} > {first}", timeout=PATIENCE_MS)
        page.wait_for_function(
            "before => document.querySelector('#da-watch-charts figure').innerHTML !== before", arg=drawn
        )
        page.wait_for_function(
            "document.querySelector('.da-run-A').innerText.includes('finished')", timeout=PATIENCE_MS
        )
        assert training.wait(timeout=60) == 0, (server.cwd / "train.log").read_text()
    finally:
        training.kill()
        training.wait()
    assert page.evaluate(step) == 24
    page.click("button[role=tab]:has-text('Samples')")
    page.wait_for_function("document.querySelector('#da-watch-grids').innerText.includes('after step 24')")
    shoot(page, "watch-live")


def test_runs_outside_the_folders_are_refused(tmp_path: Path) -> None:
    from gradio_app._context import open_context
    from gradio_app.watch import Watch

    make(tmp_path / "secret" / "run", 1.0, 1.0)
    make(tmp_path / "given" / "run", 1.0, 1.0)
    (tmp_path / "given" / "link").symlink_to(tmp_path / "secret")
    watch = Watch(open_context([f"app.folder={tmp_path / 'app'}", f"app.roots=[{tmp_path / 'given'}]"]))
    assert [name for name, _ in watch.choices()] == ["run"]
    assert list(watch.chosen(str(tmp_path / "given" / "run"), "")) == ["A"]
    for path in (tmp_path / "secret" / "run", tmp_path / "given" / "link" / "run", f"{tmp_path}/given/../secret/run"):
        with pytest.raises(UserError, match="not below the folders"):
            watch.chosen(str(path), "")
