"""The Compare tab in a real browser, on the embedded models."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
import yaml

from diffalign.config import resolve

pytestmark = pytest.mark.browser
RED, BLUE = "a small red circle on a dark background", "a large blue square on a light background"
EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=2</script> ${window.hacked=3} {{1}} </div>\U0001f600"
DONE = "document.querySelector('.da-cmp-status')?.innerText.startsWith('{}')"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An app with the embedded models and one run."""
    cwd = tmp_path_factory.mktemp("compare")
    config = resolve(["sprites-sdxl"])
    model, run = config.model.load(), cwd / "runs" / "demo" / "train"
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.export(run / "export")
    (run / "config.yaml").write_text(yaml.safe_dump({**config.to_dict(("model",)), "train": {}}))
    return serve("app.tabs=[compare]", "app.max_pictures=24", cwd=cwd)


def opened(browser: Callable[[str], Any], server: Any, **words: Any) -> Any:
    """The page of a link, its form filled."""
    words = {"c": ["sprites-sdxl", "demo/train"], "p": [RED], "seeds": "0-1", "steps": 4, "cfg": 1, **words}
    page = browser(f"{server.url}?tab=compare&{urlencode(words, doseq=True)}")
    page.wait_for_function(
        "s => document.querySelector('#da-compare-steps input')?.value == s", arg=str(words["steps"])
    )
    return page


def run(page: Any, ends: str = "Done") -> Any:
    page.click("#da-compare-run")
    page.wait_for_function("!document.querySelector('.da-cmp-status')?.innerText.startsWith('Done')")
    page.wait_for_function(DONE.format(ends))
    return page


def pictures(page: Any) -> dict[str, str]:
    """cell -> the data of its picture."""
    found = (
        "[...document.querySelectorAll('.da-cmp-pick')].map(pick => [pick.dataset.cell, pick.querySelector('img').src])"
    )
    return dict(page.evaluate(found))


def message(page: Any) -> str:
    return str(page.locator("[data-testid=toast-body]").first.inner_text())


def test_the_first_comparison_appears_within_seconds(browser: Any, server: Any, shoot: Any) -> None:
    page = browser(server.url)
    page.wait_for_selector("#da-compare-grid .da-empty")
    shoot(page, "compare-empty")
    for kind in ("first click", "second click"):
        start = time.monotonic()
        page.click("#da-compare-run")  # nothing else: what the form begins with is a comparison
        page.wait_for_selector(".da-cmp-blank")
        page.wait_for_selector(".da-cmp-pick img")
        seconds = time.monotonic() - start
        print(f"\n{kind} to first picture: {seconds:.1f} s")
        page.wait_for_function(DONE.format("Done"))
    assert seconds < 20
    assert len(pictures(page)) == 12
    assert page.locator(".da-cmp-head").all_inner_texts() == ["sprites-sdxl", "demo/train"]
    assert page.locator(".da-cmp-score b").count() == 12
    shoot(page, "compare")


def test_two_pictures_meet_behind_a_slider(browser: Any, server: Any, shoot: Any) -> None:
    page = run(opened(browser, server))
    page.click("[data-cell='0-0-0']")
    page.click("[data-cell='1-0-0']")
    page.wait_for_selector(".da-cmp-slide input")
    assert page.locator(".da-cmp-ends span").all_inner_texts() == ["sprites-sdxl, seed 0", "demo/train, seed 0"]
    mean = float(page.locator(".da-cmp-pair figcaption b").inner_text())
    assert mean > 0
    page.focus(".da-cmp-slide input")
    page.keyboard.press("Home")
    assert page.evaluate("document.querySelector('.da-cmp-slide').style.getPropertyValue('--da-cmp-at')") == "0%"
    page.keyboard.press("End")
    assert page.evaluate("document.querySelector('.da-cmp-slide').style.getPropertyValue('--da-cmp-at')") == "100%"
    page.evaluate("""() => {
        const range = document.querySelector('.da-cmp-slide input');
        range.value = 50;
        range.dispatchEvent(new Event('input', { bubbles: true }));
    }""")
    shoot(page, "compare-pair")
    page.click("[data-cell='0-0-1']")  # a third begins anew
    assert page.locator(".da-cmp-picked").count() == 1


def test_a_link_makes_the_same_pictures_for_another_visitor(browser: Any, server: Any) -> None:
    page = run(opened(browser, server, vary="strength", values="0,1.5", score=["sprites_gold"]))
    page.click("#da-compare-link")
    box = page.locator("#da-compare-address textarea")
    page.wait_for_function("document.querySelector('#da-compare-address textarea')?.value.includes('vary=strength')")
    other = browser(box.input_value())
    other.wait_for_function(
        "document.querySelector('#da-compare-values input, #da-compare-values textarea')?.value == '0,1.5'"
    )
    assert not pictures(other)  # a link paints nothing by itself
    assert pictures(run(other)) == pictures(page)
    assert len(pictures(page)) == 6
    heads = other.locator(".da-cmp-head").all_inner_texts()
    assert heads == ["sprites-sdxl", "demo/train, strength 0", "demo/train, strength 1.5"]
    by_cell = pictures(page)
    assert by_cell["0-0-0"] == by_cell["1-0-0"] != by_cell["2-0-0"]


@pytest.mark.parametrize(
    "link, told",
    [("evil=1", "unknown word 'evil'"), ("steps=99999", "steps must lie in"), ("score=a&seeds=x", "seeds='x'")],
)
def test_a_wrong_link_is_refused(browser: Any, server: Any, link: str, told: str) -> None:
    page = browser(f"{server.url}?tab=compare&{link}")
    page.wait_for_selector("[data-testid=toast-body]")
    assert told in message(page)
    assert page.input_value("#da-compare-steps input") == "20"


def test_cancel_stops_in_the_middle(browser: Any, server: Any) -> None:
    page = opened(browser, server, steps=500, seeds="0-3")
    page.click("#da-compare-run")
    page.wait_for_function(DONE.format("Painting"))
    page.click("#da-compare-cancel")
    start = time.monotonic()
    page.wait_for_function(DONE.format("Cancelled"))
    print(f"\ncancelled after {time.monotonic() - start:.1f} s")
    assert page.locator(".da-cmp-waits").count() == 0
    page.fill("#da-compare-steps input", "3")
    assert len(pictures(run(page))) == 8  # the next one is not held up


def test_visitors_wait_for_their_turn_and_may_leave(browser: Any, server: Any) -> None:
    first = opened(browser, server, steps=900, seeds="0-3")
    first.click("#da-compare-run")
    first.wait_for_function(DONE.format("Painting"))
    second, third = opened(browser, server), opened(browser, server)
    for page in (second, third):
        page.click("#da-compare-run")
        page.wait_for_function(DONE.format("Waiting for your turn"))
    second.click("#da-compare-cancel")
    second.wait_for_function("!document.querySelector('.da-cmp-status')")
    first.close()  # whoever leaves holds up nobody
    third.wait_for_function(DONE.format("Done"))
    assert len(pictures(third)) == 4
    assert not pictures(second)


def test_prompts_are_inert_whatever_they_hold(browser: Any, server: Any, shoot: Any) -> None:
    long = "a word and another " * 500
    page = opened(browser, server, p=[EVIL, "", long, EVIL], seeds="0", score=["sprites_gold"])
    run(page)
    page.click("[data-cell='0-0-0']")
    page.click("[data-cell='0-1-0']")
    page.wait_for_selector(".da-cmp-pair")
    assert page.evaluate("window.hacked") is None
    assert page.locator(".da-cmp-prompt").first.inner_text() == EVIL
    assert page.locator(".da-cmp-prompt").count() == 2
    page.click(".da-cmp-prompt summary")
    assert long.strip() in page.locator(".da-cmp-prompt").nth(1).inner_text()
    assert "sprites_gold gave no score for 4 of 4" in page.inner_text(".da-cmp-status")
    shoot(page, "compare-hostile")


def test_what_cannot_be_is_told(browser: Any, server: Any) -> None:
    page = opened(browser, server, seeds="0-19")
    page.click("#da-compare-run")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "has at most 24 (app.max_pictures)" in message(page)
    page = opened(browser, server, c=["../../etc", "demo/train"])
    page.click("#da-compare-run")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "there is no '../../etc'" in message(page)
    page = opened(browser, server, p=["hpsv2:/etc"])
    page.click("#da-compare-run")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "not below the folders" in message(page)


def test_downloads_and_votes_get_the_pictures(browser: Any, server: Any) -> None:
    page = opened(browser, server)
    page.click("#da-compare-download")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "press Compare first" in message(page)
    run(page)
    with page.expect_download() as download:
        page.click("#da-compare-download")
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        names = archive.namelist()
    assert {f"comparison/{name}" for name in ("config.yaml", "README.txt", "grid.png", "manifest.jsonl")} <= set(names)
    page.click("#da-compare-keep")
    page.wait_for_function("document.body.innerText.includes('tab Vote shows its pictures')")
    (kept,) = (server.folder / "comparisons").iterdir()
    assert len(list(kept.rglob("*/00000/*.png"))) == 4


def test_prompts_come_from_sets_and_files(browser: Any, server: Any, tmp_path: Path) -> None:
    page = opened(browser, server)
    page.click("text=Prompts from a set or a file")
    page.click("#da-compare-fill")
    page.wait_for_function("document.querySelector('#da-compare-prompts textarea').value.split('\\n').length == 4")
    (tmp_path / "mine.txt").write_text(f"{BLUE}\n\n{RED}\n")
    page.set_input_files("input[type=file]", tmp_path / "mine.txt")
    page.wait_for_function(
        "t => document.querySelector('#da-compare-prompts textarea').value == t", arg=f"{BLUE}\n{RED}"
    )
