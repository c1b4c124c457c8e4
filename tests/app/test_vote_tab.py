"""Votes by key and by mouse, blind, one at a time: in the database, in the run that waits, and in a training run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from PIL import Image, ImageDraw

from diffalign.sources._votes import read_votes, write_ballot
from diffalign.votes import VoteBook

pytestmark = pytest.mark.browser
MAKERS = ("zebrafish", "platypus", "capybara")
HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=2</script> " + "a very long prompt " * 400
WIDE = 4 / 3  # the hostile prompt's pictures are no squares


def draw(path: Path, maker: int, prompt: int, size: tuple[int, int] = (64, 64)) -> None:
    image = Image.new("RGB", size, (30 + 12 * prompt, 60, 140 - 40 * maker))
    pen, left = ImageDraw.Draw(image), 6 + 8 * maker
    pen.ellipse((left, 10 + prompt, left + 28, 38 + prompt), fill=(250, 200 - 9 * prompt, 60))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def pictures(folder: Path, prompts: list[str], size: tuple[int, int] = (64, 64)) -> None:
    rows = []
    for number, prompt in enumerate(prompts):
        for place, maker in enumerate(MAKERS):
            file = f"{maker}/{number}.png"
            draw(folder / file, place, number, size)
            rows.append({"file": file, "prompt": prompt, "prompt_id": number, "number": 0, "variant": maker})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def site(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with pictures of three makers, a queue that a run waits for, and a hostile prompt."""
    cwd = tmp_path_factory.mktemp("vote")
    pictures(cwd / "runs" / "circles", [f"a yellow circle, number {n}" for n in range(10)])
    pictures(cwd / "runs" / "hostile", [HOSTILE], (120, 90))
    queue = cwd / "runs" / "trained" / "rounds" / "round-00000"
    names = [[f"images/{n}-{i}.png" for i in range(2)] for n in range(3)]
    for n, files in enumerate(names):
        for i, file in enumerate(files):
            draw(queue / file, i, n)
    write_ballot(queue, [(f"00000-{n:03d}", f"entry {n}", files) for n, files in enumerate(names)])
    return serve("app.tabs=[vote]", "app.aspects=[beauty, <b>text</b>]", cwd=cwd)


def ballot(page: Any) -> str:
    return page.eval_on_selector(".da-vote", "e => e.dataset.ballot ?? e.dataset.state")


def changed(page: Any, before: str) -> None:
    """Waits for another ballot, or for another state."""
    page.wait_for_function(
        "b => { const e = document.querySelector('.da-vote')?.dataset; return e && (e.ballot ?? e.state) !== b }",
        arg=before,
    )


def press(page: Any, key: str) -> str:
    """Votes by key; returns the ballot that was voted on."""
    before = ballot(page)
    page.keyboard.press(key)
    changed(page, before)
    return before


def click(page: Any, name: str) -> str:
    """Votes by mouse; returns the ballot that was voted on."""
    before = ballot(page)
    page.click(f"#da-vote-{name}")
    changed(page, before)
    return before


def enter(browser: Callable[..., Any], site: Any, name: str, task: str = "circles", size: int = 2) -> Any:
    """A page on which `name` votes on a task."""
    page = browser(site.url)
    page.wait_for_selector(".da-vote[data-state=vote]")
    before = ballot(page)
    page.fill("#da-vote-name input, #da-vote-name textarea", name)
    page.keyboard.press("Enter")
    changed(page, before)
    if page.input_value("#da-vote-task input") != task:
        choose(page, "task", task)
    if size != 2:
        choose(page, "size", str(size))
    return page


def choose(page: Any, field: str, option: str) -> None:
    before = ballot(page)
    page.click(f"#da-vote-{field} input")
    page.get_by_role("option", name=option, exact=True).click()
    changed(page, before)
    page.evaluate("document.activeElement.blur()")


def votes(site: Any, rater: str, aspect: str = "overall") -> dict[str, tuple[tuple[int, ...], bool]]:
    """ballot -> (ranks, is bad)"""
    with VoteBook(site.folder / "votes.db") as book:
        return {
            vote.ballot: (vote.verdict.ranks, vote.verdict.is_bad) for vote in book.votes(rater=rater, aspect=aspect)
        }


def test_ten_votes_by_key_and_by_mouse_are_in_the_database_and_train(browser, site, shoot, tmp_path):
    page = enter(browser, site, "ann")
    shoot(page, "vote-pair")
    left, right, tie, bad = ((0, 1), False), ((1, 0), False), ((0, 0), False), ((0, 0), True)
    cast = {press(page, key): said for key, said in [
        ("1", left), ("ArrowRight", right), ("0", tie), ("X", bad), ("ArrowLeft", left), ("2", right)
    ]}  # fmt: skip
    cast |= {click(page, name): said for name, said in [("left", left), ("tie", tie), ("right", right), ("bad", bad)]}
    assert votes(site, "ann") == cast and len(cast) == 10
    assert page.inner_text("#da-vote-progress").startswith("10 of 30, 20 left by you")

    out = tmp_path / "run"
    words = ["sprites-sdxl", "diffusion-dpo", f"source.data.path={site.folder / 'votes.db'}", "train.steps=2"]
    words += ["train.batch_size=2", "source.holdout=0", f"source.cache_dir={tmp_path / 'cache'}", f"train.out={out}"]
    done = subprocess.run([sys.executable, "-m", "diffalign", "train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads((out / "run.json").read_text())["data"]
    assert (data["report"]["num_rows"], data["num_records"], data["report"]["dropped"]) == (10, 6, {"tie": 4})


def test_undo_takes_votes_back_one_by_one_and_they_may_be_cast_anew(browser, site):
    page = enter(browser, site, "una")
    shown = [page.get_attribute(".da-vote-picture img >> nth=0", "src")]
    first = press(page, "1")
    shown.append(page.get_attribute(".da-vote-picture img >> nth=0", "src"))
    second = press(page, "1")
    press(page, "u")
    assert page.get_attribute(".da-vote-picture img >> nth=0", "src") == shown[1]
    click(page, "undo")
    assert page.get_attribute(".da-vote-picture img >> nth=0", "src") == shown[0]
    assert votes(site, "una") == {} and page.is_disabled("#da-vote-undo")
    anew = [press(page, "2"), press(page, "2")]
    assert set(votes(site, "una")) == set(anew) and not {first, second} & set(anew)


def test_keys_do_not_vote_while_somebody_types_or_a_vote_is_under_way(browser, site):
    page = enter(browser, site, "kim")
    page.click("#da-vote-name input, #da-vote-name textarea")
    page.keyboard.type("1x0u")
    page.wait_for_timeout(500)
    page.fill("#da-vote-name input, #da-vote-name textarea", "kim")
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)
    assert votes(site, "kim") == {}
    before = ballot(page)
    page.evaluate("""() => { for (let n = 0; n < 5; n++) {
        document.body.dispatchEvent(new KeyboardEvent('keydown', {key: '1', bubbles: true}));
        document.querySelector('#da-vote-right').click(); } }""")
    changed(page, before)
    page.wait_for_timeout(1000)
    assert votes(site, "kim") == {before: ((0, 1), False)}
    page.keyboard.press("Control+1")
    page.keyboard.press("Alt+2")
    page.wait_for_timeout(500)
    assert len(votes(site, "kim")) == 1
    assert page.locator(".da-vote-image").first.is_visible()


def test_nothing_on_the_page_or_behind_it_says_who_made_a_picture(browser, site):
    answers: list[str] = []
    page = enter(browser, site, "eve")
    page.on(
        "response", lambda response: answers.append(response.url + response.text()) if "/run/" in response.url else None
    )
    for _ in range(3):
        press(page, "1")
    press(page, "u")
    body = json.dumps({"data": ["runs/circles", "eve"]}).encode()
    request = Request(f"{site.url}/gradio_api/run/vote_next", body, {"content-type": "application/json"})
    answers.append(urlopen(request).read().decode())
    assert len(answers) >= 4
    for text in [page.content(), *answers, urlopen(f"{site.url}/config").read().decode()]:
        assert not [maker for maker in MAKERS if maker in text]
    assert "da-vote-picture" in page.content() and "data:image/png" in answers[-1]


def test_order_is_different_for_different_people_and_ballots_are_their_own(browser, site):
    pages = [enter(browser, site, name) for name in ("zoe", "yan")]
    assert ballot(pages[0]) != ballot(pages[1])
    mine = ballot(pages[0])
    press(pages[1], "1")
    pages[0].reload()
    pages[0].wait_for_selector(".da-vote[data-state=vote]")
    assert pages[0].input_value("#da-vote-name input, #da-vote-name textarea") == "zoe"  # the browser remembers
    choose(pages[0], "task", "circles") if pages[0].input_value("#da-vote-task input") != "circles" else None
    assert ballot(pages[0]) == mine


def test_a_ranking_by_mouse_and_keys_with_aspects(browser, site, shoot):
    page = enter(browser, site, "rob", size=3)
    page.click("#da-vote-pick-2")
    page.keyboard.press("1")
    page.keyboard.press("Backspace")
    page.click("#da-vote-aspect-0-1")
    page.click("#da-vote-aspect-1-tie")
    page.keyboard.press("Enter")  # one of three is chosen: not yet
    page.keyboard.press("2")
    shoot(page, "vote-ranking")
    before = ballot(page)
    page.keyboard.press("Enter")
    changed(page, before)
    assert votes(site, "rob") == {before: ((2, 1, 0), False)}
    assert votes(site, "rob", "beauty") == {before: ((1, 0, 1), False)}
    assert votes(site, "rob", "<b>text</b>") == {before: ((0, 0, 0), False)}
    assert page.locator(".da-vote-picked").count() == 0 and page.locator(".da-vote input:checked").count() == 0


def test_a_run_that_waits_gets_its_votes(browser, site):
    folder = site.cwd / "runs" / "trained" / "rounds" / "round-00000"
    page = enter(browser, site, "quinn", "trained/rounds/round-00000")
    for key in ("1", "2", "0"):
        press(page, key)
    assert ballot(page) == "done" and "You have seen all" in page.inner_text("#da-vote-page")
    rows = [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["00000-000", "00000-001", "00000-002"]
    found = read_votes(folder, {f"00000-{n:03d}": 2 for n in range(3)})
    with VoteBook(site.folder / "votes.db") as book:
        for vote in book.votes(rater="quinn"):  # the page's order is not the ballot's: the winner is the same image
            utility = dict(zip(vote.slots, vote.verdict.utility, strict=True))
            assert found[vote.place].tolist() == [utility["000"], utility["001"]]
    assert sorted(max(utility) for utility in found.values()) == [0.5, 1, 1]
    press(page, "u")
    assert len((folder / "votes.jsonl").read_text().splitlines()) == 2


def test_a_hostile_prompt_is_text(browser, site, shoot):
    page = enter(browser, site, "hal", "hostile")
    assert page.inner_text(".da-vote-prompt").startswith("<img src=x onerror=")
    assert page.evaluate("window.hacked") is None and page.locator(".da-vote-prompt *").count() == 0
    shoot(page, "vote-long-prompt")
    box = page.locator(".da-vote-picture img").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(WIDE, rel=0.02)
    page.set_viewport_size({"width": 390, "height": 844})
    bar = page.locator(".da-vote-bar").bounding_box()
    assert bar["y"] + bar["height"] <= 845  # within reach without scrolling


def test_folders_outside_are_refused(browser, site):
    for path in ("../..", "/etc", "runs/../../..", "runs/nothing"):
        body = json.dumps({"data": [path, "mal"]}).encode()
        request = Request(f"{site.url}/gradio_api/run/vote_next", body, {"content-type": "application/json"})
        with pytest.raises(OSError, match="500"):
            urlopen(request)


def test_an_empty_app_says_how_to_begin_and_paints_while_people_vote(browser, serve, shoot):
    server = serve("app.tabs=[vote]", "sampling.num_steps=4")
    page = browser(server.url)
    page.wait_for_selector(".da-vote[data-state=empty]")
    assert "Nothing to vote on yet" in page.inner_text("#da-vote-page")
    shoot(page, "vote-empty")
    page.click("#da-vote-live button")
    page.wait_for_function("document.querySelector('#da-vote-prompts textarea')?.value.length > 0")
    shoot(page, "vote-live")
    page.click("#da-vote-begin")
    page.wait_for_selector(".da-vote[data-state=vote]")
    for _ in range(3):
        page.wait_for_selector(".da-vote[data-state=vote]")
        press(page, "1")
    page.click("#da-vote-stop")
    with VoteBook(server.folder / "votes.db") as book:
        found = list(book.votes())
        assert len(found) == 3 and all(len(set(vote.contestants)) == 2 for vote in found)
        assert len({vote.place for vote in found}) == 3
        made = book.contestants(found[0].task)
        assert all(facts["sampling"]["num_steps"] == 4 for facts in made.values()) and len(made) == 2


def test_a_malformed_database_ends_the_start_with_one_line(tmp_path):
    folder = tmp_path / "runs" / "app"
    folder.mkdir(parents=True)
    (folder / "votes.db").write_text("no database " * 50)
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "app", "app.tabs=[vote]", "app.port=0"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "votes.db: not a file of votes" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and (folder / "votes.db").read_text().startswith("no database")
