"""Browsing in a real browser: pages, order, search, edits and their undo, a saved version, and hostile data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import makers
import pytest

from diffalign.browsing import RecordBrowser
from diffalign.data import RecordWriter
from diffalign.data.auto import Auto
from diffalign.sprites.preferences import rendered_pairs, write_pairs
from diffalign.types import Record

EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>"\'><b>bold</b>'
LONG = "a very long prompt that goes on and on about a small red circle left of a large blue square, " * 6


def hostile(folder: Path) -> Path:
    """Records with HTML in every text, a broken picture, and more images than two."""
    picture = makers.picture(0, 100)
    rows = [
        Record(0, EVIL, (picture, makers.picture(1, 150)), (1.0, 0.0), user=EVIL, scores={EVIL: (1.0, 2.0)}),
        Record(0, LONG, (picture, picture[:90]), (0.0, 1.0), user="bob", scores={"clip": (0.31, 0.27)}),
        Record(
            0,
            "a list of five",
            tuple(makers.picture(k, 40 * k + 20) for k in range(5)),
            (0.1, 0.9, 0.5, 0.5, 0.3),
            captions=("a", "b", EVIL, "d", LONG),
        ),
    ]
    with RecordWriter(folder) as writer:
        for row in rows:
            writer.write(row)
    return folder


@pytest.fixture(scope="module")
def server(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cwd = tmp_path_factory.mktemp("browse")
    write_pairs(cwd / "runs" / "sprites.parquet", rendered_pairs(60, seed=0))
    hostile(cwd / "runs" / "hostile")
    (cwd / "runs" / "broken.jsonl").write_text('{"prompt": "x", "chosen": "a.png", "rejected": "../../etc/passwd"}\n{')
    (cwd / "runs" / "torn").mkdir()
    (cwd / "runs" / "torn" / "x.parquet").write_bytes(b"PAR1 no Parquet")
    (cwd / "outside").mkdir()
    makers.pickapic(cwd / "outside" / "secret.parquet", 4)
    (cwd / "runs" / "link").symlink_to(cwd / "outside")
    return serve("sprites-sdxl", "app.tabs=[browse]", cwd=cwd)


@pytest.fixture
def opened(server: Any, browser: Any) -> Any:
    """Opens a data set as another visitor each time."""

    def visit(path: str) -> Any:
        page = browser(f"{server.url}/?data={server.cwd / 'runs' / path}")
        page.locator("#da-browse-cards .da-browse-card").first.wait_for()
        return page

    return visit


def bar(page: Any) -> str:
    return str(page.locator("#da-browse-bar").inner_text())


def says(page: Any, text: str) -> None:
    page.locator("#da-browse-bar", has_text=text).wait_for()


def card(page: Any, row: int) -> Any:
    return page.locator(f".da-browse-card[data-row='{row}']")


def best(page: Any, row: int) -> list[bool]:
    """Per image whether it is outlined as the best."""
    return [
        "da-browse-best" in str(one.get_attribute("class")) for one in card(page, row).locator(".da-browse-image").all()
    ]


def choose(page: Any, elem: str, text: str) -> None:
    page.locator(f"#{elem} input").click()
    page.get_by_role("option", name=re.compile(text)).first.click()


def notice(page: Any) -> str:
    found = page.locator(".toast-body, .toast-wrap").first
    found.wait_for()
    return str(found.inner_text())


@pytest.mark.browser
@pytest.mark.slow
def test_the_first_look_and_the_pages(server: Any, browser: Any, shoot: Any) -> None:
    page = browser(server.url)
    page.get_by_text("Choose a data set").wait_for()
    shoot(page, "browse-empty")
    choose(page, "da-browse-path", "^sprites.parquet$")
    page.locator(".da-browse-card").first.wait_for()
    assert page.locator(".da-browse-card").count() == 24 and "60 records" in bar(page)
    ties = page.locator(".da-browse-card", has=page.get_by_text("tie", exact=True)).count()
    assert page.locator(".da-browse-best").count() == 24 - ties > 12
    shoot(page, "browse")
    page.locator("#da-browse-bar button", has_text="Next").click()
    card(page, 24).wait_for()
    page.locator("#da-browse-bar input").fill("3")
    page.locator("#da-browse-bar input").press("Enter")
    card(page, 59).wait_for()
    assert page.locator(".da-browse-card").count() == 12
    assert page.locator("#da-browse-bar button", has_text="Next").is_disabled()
    page.locator("#da-browse-cards button", has_text="Back").click()
    card(page, 24).wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_a_flip_is_undone(opened: Any, shoot: Any) -> None:
    page, other = opened("sprites.parquet"), opened("sprites.parquet")
    before = best(page, 3)
    assert sorted(before) == [False, True]
    card(page, 3).get_by_role("button", name="Flip").click()
    says(page, "1 edit")
    assert best(page, 3) == before[::-1]
    card(page, 5).get_by_role("button", name="Drop").click()
    says(page, "2 edits")
    page.locator(".da-browse-dropped").wait_for()
    shoot(page, "browse-edited")
    page.locator("#da-browse-bar button", has_text="Undo").click()
    says(page, "1 edit")
    page.locator("#da-browse-bar button", has_text="Undo").click()
    page.locator("#da-browse-bar", has_text="edit").wait_for(state="detached")
    assert best(page, 3) == before and page.locator(".da-browse-dropped").count() == 0
    page.locator("#da-browse-bar button", has_text="Redo").click()
    says(page, "1 edit")
    assert best(page, 3) == before[::-1]
    other.reload()
    other.locator(".da-browse-card").first.wait_for()
    assert best(other, 3) == before and "edit" not in bar(other)  # another visitor's draft is their own
    page.reload()
    says(page, "1 edit")
    assert best(page, 3) == before[::-1]


@pytest.mark.browser
@pytest.mark.slow
def test_a_caption_is_fixed_and_a_version_saved(server: Any, opened: Any, shoot: Any) -> None:
    page = opened("sprites.parquet")
    was = card(page, 0).locator(".da-browse-text").inner_text()
    card(page, 0).get_by_role("button", name="Fix caption").click()
    page.keyboard.type("never kept")
    page.keyboard.press("Escape")
    assert card(page, 0).locator(".da-browse-text").inner_text() == was
    card(page, 0).get_by_role("button", name="Fix caption").click()
    shoot(page, "browse-caption")
    card(page, 0).locator(".da-browse-text").click()
    page.keyboard.press("Control+A")
    page.keyboard.type(f"fixed {EVIL}")
    page.keyboard.press("Enter")
    says(page, "1 edit")
    assert card(page, 0).locator(".da-browse-text").inner_text() == f"fixed {EVIL}"
    card(page, 1).get_by_role("button", name="Drop").click()
    says(page, "2 edits")
    choose(page, "da-browse-show", "my edits")
    says(page, "2 of 60 records")
    page.get_by_text("Save your edits").click()
    page.locator("#da-browse-save").click()
    page.locator("#da-browse-saved").wait_for()
    shoot(page, "browse-saved")
    folder = server.folder / "data" / "sprites-v2"
    reader = Auto(str(folder), ties="keep")
    assert len(reader) == 59 and reader[0].prompt == f"fixed {EVIL}"
    assert json.loads((folder / "version.json").read_text())["parent"].endswith("sprites.parquet")
    page.locator("#da-browse-name textarea, #da-browse-name input").fill("sprites-v2")
    page.locator("#da-browse-save").click()
    assert "there already" in notice(page)


@pytest.mark.browser
@pytest.mark.slow
def test_search_order_and_filters(server: Any, opened: Any) -> None:
    page = opened("hostile")
    choose(page, "da-browse-sort", "clip contradicts")
    page.wait_for_function("document.querySelector('.da-browse-card').dataset.row == '1'")
    choose(page, "da-browse-user", "bob")
    says(page, "1 of 3 records")
    choose(page, "da-browse-user", "everybody")
    says(page, "3 records")
    box = page.locator("#da-browse-text textarea, #da-browse-text input")
    box.fill("FIVE")
    box.press("Enter")
    says(page, "1 of 3 records")
    assert card(page, 2).locator(".da-browse-image").count() == 5
    box.fill("no such words")
    box.press("Enter")
    page.get_by_text("No record fits").wait_for()


@pytest.mark.browser
@pytest.mark.slow
def test_hostile_records_are_text_and_placeholders(opened: Any, shoot: Any) -> None:
    page = opened("hostile")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.hacked") is None
    assert card(page, 0).locator(".da-browse-text").inner_text() == EVIL
    assert "image" in card(page, 1).locator(".da-browse-missing").inner_text()
    shoot(page, "browse-hostile")
    text = card(page, 1).locator(".da-browse-text")
    height = text.bounding_box()["height"]
    text.click()
    assert text.bounding_box()["height"] > height < 80


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/passwd", "not below the folders"),
        ("runs/../outside/secret.parquet", "not below the folders"),
        ("runs/link/secret.parquet", "not below the folders"),
        ("runs/torn", "not a Parquet file"),
        ("runs/nothing", "no such file"),
        ("runs/<img src=x onerror=window.hacked=1>", "no such file"),
    ],
)
def test_what_may_not_or_cannot_be_opened_is_said(path: str, message: str, server: Any, browser: Any) -> None:
    page = browser(f"{server.url}/?data={server.cwd / path}")
    assert message in notice(page)
    assert page.evaluate("window.hacked") is None and page.locator(".da-browse-card").count() == 0


@pytest.mark.browser
@pytest.mark.slow
def test_pictures_outside_are_not_shown(opened: Any) -> None:
    page = opened("broken.jsonl")
    missing = card(page, 0).locator(".da-browse-missing")
    assert missing.count() == 2 and "root:" not in page.content()
    assert "bad JSON" in card(page, 1).inner_text()


def test_drafts_are_told_apart_by_browser_and_login(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from gradio_app._context import open_context
    from gradio_app.browse import Desk

    desk = Desk(open_context([f"app.folder={tmp_path}", "sprites-sdxl"]))
    names = {desk.editor("a", SimpleNamespace(username=name)) for name in (None, "a", "browser a", "b")}  # type: ignore[arg-type]
    assert len(names) == 4
    browser = RecordBrowser(makers.pickapic(tmp_path / "x.parquet", 2), tmp_path)
    logs = {browser.log(name).path for name in names}
    assert len(logs) == 4 and all(log.parent.parent == tmp_path / "edits" for log in logs)
