"""Fifty people vote at once, and the server is killed in between: no vote that was acknowledged is lost or doubled."""

from __future__ import annotations

import http.client
import io
import json
import random
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.votes import VoteBook

VOTERS, VOTES_EACH, KILL_AFTER = 50, 20, 400
PATIENCE = 240.0


def pictures(folder: Path, prompts: int = 30) -> None:
    """Two makers' pictures in the format of `generate`."""
    rows = []
    for prompt in range(prompts):
        for number, maker in enumerate(("base", "tuned")):
            file = f"{maker}/{prompt}.png"
            (folder / maker).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (prompt, 200 * number, 90)).save(folder / file)
            rows.append(
                {"file": file, "prompt": f"prompt {prompt}", "prompt_id": prompt, "number": 0, "variant": maker}
            )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def post(url: str, name: str, *data: Any) -> Any:
    """One call; an answer that does not come, for whatever reason of the network, is asked for again."""
    body = json.dumps({"data": list(data)}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/run/{name}", body, {"content-type": "application/json"})
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())["data"][0]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{name}: {error.code} {error.read()[:500]!r}") from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError):
            assert time.monotonic() < until, f"{name} was not answered"
            time.sleep(0.2)


@pytest.mark.slow
def test_fifty_voters_and_a_server_killed_in_between(serve, tmp_path, capsys):
    pictures(tmp_path / "runs" / "pictures")
    server = serve("app.tabs=[vote]", cwd=tmp_path)
    acknowledged: dict[str, list[int]] = {}
    retried: list[str] = []
    failed: list[BaseException] = []

    def vote(number: int) -> None:
        rng = random.Random(number)
        try:
            for _ in range(VOTES_EACH):
                ballot = post(server.url, "vote_next", "runs/pictures", f"voter {number}")["ballot"]
                ranks = rng.choice([[0, 1], [1, 0], [0, 0]])
                receipt = post(server.url, "vote_cast", ballot, {"overall": {"ranks": ranks}})
                assert receipt["said"]["overall"]["ranks"] == ranks and not receipt["is_undone"]
                acknowledged[ballot] = ranks
                if not receipt["is_new"]:
                    retried.append(ballot)
                elif rng.random() < 0.05:  # an answer lost on the way: the same ballot, another vote
                    again = post(server.url, "vote_cast", ballot, {"overall": {"ranks": [1, 0]}})
                    assert again["said"]["overall"]["ranks"] == ranks and not again["is_new"]
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=vote, args=(number,)) for number in range(VOTERS)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    while len(acknowledged) < KILL_AFTER and not failed:
        time.sleep(0.01)
    server.kill()
    before, killed = len(acknowledged), time.monotonic()
    server.restart()
    down = time.monotonic() - killed
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start - down
    server.kill()
    assert not failed

    with VoteBook(server.folder / "votes.db") as book:
        votes = list(book.votes())
        assert len(votes) == len({vote.ballot for vote in votes}) == VOTERS * VOTES_EACH == len(acknowledged)
        assert {vote.ballot: list(vote.verdict.ranks) for vote in votes} == acknowledged
        assert Counter(vote.rater for vote in votes) == {f"voter {n}": VOTES_EACH for n in range(VOTERS)}
        assert len({(vote.rater, vote.prompt) for vote in votes}) == len(votes)  # nobody judged the same twice
        [(wins, num)] = book.duels(1).values()
        assert num == len(votes)
        assert wins == sum(vote.verdict.utility[vote.contestants.index("base")] for vote in votes)
        Image.open(io.BytesIO(book.picture(votes[0].pictures[0]))).verify()
    assert sqlite3.connect(server.folder / "votes.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
    rate, waiting = len(votes) / seconds, len(retried)
    with capsys.disabled():
        print(f"\n{len(votes)} votes of {VOTERS} voters, {rate:.0f} a second apart from {down:.0f} s without a server")
        print(f"killed after {before} acknowledged votes, when {waiting} were stored and not yet answered")
