"""Tasks of folders, votes that reach the run that waits for them, and pictures painted while people vote."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from diffalign.errors import UserError, WaitsForVotes
from diffalign.recipes.painter import Painted
from diffalign.recipes.voting import Voting, _mirror
from diffalign.recipes.voting._live import AHEAD, Live
from diffalign.sources._votes import TALLY, VOTES, read_votes, write_ballot
from diffalign.votes import OVERALL, Ballot, Verdict, VoteBook

LEFT, RIGHT, TIE = ({OVERALL: {"ranks": ranks}} for ranks in ([0, 1], [1, 0], [0, 0]))
BAD = {OVERALL: {"ranks": [0, 0], "is_bad": True}}


def save(path: Path, *color: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)


def pictures(folder: Path, makers: Sequence[str] = ("one", "two"), prompts: int = 3, numbers: int = 1) -> Path:
    """A folder as `generate` writes it; red says who made a picture, green which prompt, blue which number."""
    rows: list[dict[str, Any]] = []
    for p in range(prompts):
        for m, maker in enumerate(makers):
            for n in range(numbers):
                file = f"{maker}/00000/{p:07d}-{n:03d}.png".lstrip("/")
                save(folder / file, m, p, n)
                row = {"file": file, "prompt": f"prompt {p}", "prompt_id": p, "number": n, "seed": 7}
                rows.append(row | ({"variant": maker, "made": {"model": maker}} if maker else {}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def queue(folder: Path, size: int = 2, entries: int = 3) -> Path:
    """A ballot as rollouts write it; red says which entry, green which image."""
    names = [[f"images/{e}-{i}.png" for i in range(size)] for e in range(entries)]
    for e, files in enumerate(names):
        for i, file in enumerate(files):
            save(folder / file, e, i, 0)
    write_ballot(folder, [(f"00000-{e:03d}", f"prompt {e}", files) for e, files in enumerate(names)])
    return folder


@pytest.fixture
def voting(tmp_path: Path) -> Iterator[Voting]:
    found = Voting(tmp_path / "votes.db", aspects=("detail",))
    yield found
    found.close()


def pixels(voting: Voting, ballot: Ballot) -> list[tuple[int, ...]]:
    return [Image.open(io.BytesIO(voting.book.picture(one))).getpixel((0, 0)) for one in ballot.pictures]


def everything(voting: Voting, task: int, rater: str, said: Any = LEFT) -> list[Ballot]:
    """Votes until there is no more."""
    seen = []
    while (ballot := voting.turn(task, rater).ballot) is not None:
        voting.cast(ballot.id, said)
        seen.append(ballot)
    return seen


# Folders


def test_several_makers_are_compared_on_one_prompt_and_number(voting, tmp_path):
    task = voting.open_folder(pictures(tmp_path / "p", ("a", "b", "c"), prompts=2, numbers=2), "title")
    seen = [pixels(voting, ballot) for ballot in everything(voting, task.id, "ann")]
    assert len(seen) == 2 * 2 * 3
    assert all(left[1:] == right[1:] and left[0] != right[0] for left, right in seen)
    assert {(*vote.contestants, vote.prompt) for vote in voting.book.votes()} == {
        (*vote.contestants, vote.prompt) for vote in voting.book.votes(task=task.id)
    }
    assert voting.book.contestants(task.id) == {name: {"model": name} for name in "abc"}
    assert voting.turn(task.id, "ann").state == "done" and voting.turn(task.id, "bob").state == "vote"


def test_one_maker_is_compared_with_itself_on_one_prompt(voting, tmp_path):
    task = voting.open_folder(pictures(tmp_path / "mine", ("",), prompts=2, numbers=3), "title")
    seen = [pixels(voting, ballot) for ballot in everything(voting, task.id, "ann")]
    assert len(seen) == 2 * 3 and all(left[1] == right[1] and left[2] != right[2] for left, right in seen)
    assert {vote.contestants for vote in voting.book.votes()} == {("mine", "mine")}


def test_a_ballot_of_three(voting, tmp_path):
    task = voting.open_folder(pictures(tmp_path / "p", ("a", "b", "c", "d")), "title", size=3)
    ballot = voting.turn(task.id, "ann").ballot
    assert ballot is not None and len(ballot.pictures) == 3
    voting.cast(ballot.id, {OVERALL: {"ranks": [2, 0, 1]}})
    assert sorted(num for _, num in voting.book.duels(task.id).values()) == [1, 1, 1]


def test_a_folder_that_grew_gives_more_and_keeps_its_votes(voting, tmp_path):
    first = voting.open_folder(pictures(tmp_path / "p", prompts=2), "title")
    everything(voting, first.id, "ann")
    manifest = tmp_path / "p" / "manifest.jsonl"
    row = json.loads(manifest.read_text().splitlines()[0])
    for m, name in enumerate(("one", "two")):
        save(tmp_path / "p" / f"{name}-9.png", m, 9, 0)
        with manifest.open("a") as lines:
            lines.write(json.dumps(row | {"file": f"{name}-9.png", "prompt_id": 9, "variant": name}) + "\n")
    assert voting.open_folder(tmp_path / "p", "title") == first
    assert len(everything(voting, first.id, "ann")) == 1


def test_a_folder_made_anew_is_another_task(voting, tmp_path):
    first = voting.open_folder(pictures(tmp_path / "p"), "title")
    everything(voting, first.id, "ann")
    time.sleep(0.02)
    save(tmp_path / "p/one/00000/0000000-000.png", 200, 0, 0)
    second = voting.open_folder(tmp_path / "p", "title")
    assert second.id != first.id and voting.turn(second.id, "ann").state == "vote"


def test_folders_are_found_and_links_not_followed(tmp_path):
    inside, outside = tmp_path / "runs", tmp_path / "outside"
    pictures(inside / "a" / "pictures")
    queue(inside / "b" / "rounds" / "round-00000")
    counted = queue(inside / "b" / "rounds" / "round-00001")
    (counted / TALLY).write_text("{}")
    pictures(outside)
    (inside / "link").symlink_to(outside)
    pictures(inside / ".hidden")
    pictures(inside / "a" / "pictures" / "one" / "deeper")  # below pictures nobody looks
    found = {path.relative_to(inside).as_posix() for path in Voting.found([inside])}
    assert found == {"a/pictures", "b/rounds/round-00000"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("manifest.jsonl", "", "no pictures"), ("manifest.jsonl", "{", "line 1 is not JSON"),
     ("manifest.jsonl", "[1]", "line 1 lacks file, prompt"), ("manifest.jsonl", '{"file": 3}', "line 1 lacks"),
     ("ballot.jsonl", '{"id": "a", "prompt": "p", "images": "ab"}', "line 1 lacks id, prompt and images"),
     ("ballot.jsonl", '{"id": "a", "prompt": "p", "images": ["x"]}', "2 or more"),
     ("other", "", "neither a manifest.jsonl")],
)  # fmt: skip
def test_folders_that_are_none(voting, tmp_path, name, text, message):
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        voting.open_folder(folder, "title")
    assert "\n" not in str(error.value) and voting.book.tasks() == []


def test_a_list_that_names_files_elsewhere_shows_none_of_them(voting, tmp_path):
    save(tmp_path / "secret.png", 1, 2, 3)
    folder = pictures(tmp_path / "p", prompts=1)
    text = (folder / "manifest.jsonl").read_text().replace("two/00000/0000000-000.png", "../secret.png")
    (folder / "manifest.jsonl").write_text(text)
    assert voting.turn(voting.open_folder(folder, "t").id, "ann").state == "done"


@pytest.mark.parametrize("name", ["manifest.jsonl", "ballot.jsonl", "votes.jsonl"])
def test_links_out_of_a_folder_are_neither_read_nor_written(voting, tmp_path, name):
    folder = pictures(tmp_path / "f") if name == "manifest.jsonl" else queue(tmp_path / "f")
    outside = tmp_path / "outside"
    outside.write_text((folder / name).read_text() if (folder / name).is_file() else "")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match="leads elsewhere"):
        voting.open_folder(folder, "title")
    assert voting.book.tasks() == []


def test_votes_are_not_written_through_a_link(voting, tmp_path):
    folder = queue(tmp_path / "q")
    task = voting.open_folder(folder, "title")
    (tmp_path / "outside").write_text("")
    (folder / VOTES).symlink_to(tmp_path / "outside")
    voting.cast(voting.turn(task.id, "ann").ballot.id, LEFT)
    assert (tmp_path / "outside").read_text() == "" and len(list(voting.book.votes())) == 1


def test_aspects_are_those_of_the_app(voting, tmp_path):
    task = voting.open_folder(pictures(tmp_path / "p"), "title")
    ballot = voting.turn(task.id, "ann").ballot
    with pytest.raises(UserError, match="no aspect 'mood'"):
        voting.cast(ballot.id, LEFT | {"mood": {"ranks": [0, 1]}})
    voting.cast(ballot.id, LEFT | {"detail": {"ranks": [1, 0]}})
    assert [vote.verdict.ranks for vote in voting.book.votes(aspect="detail")] == [(1, 0)]


# Queues


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / VOTES).read_text().splitlines()]


def winner_of(voting: Voting, ballot: Ballot, place: int) -> dict[str, Any]:
    """A vote for the image that the ballot's list names at `place`."""
    greens = [pixel[1] for pixel in pixels(voting, ballot)]
    return {OVERALL: {"ranks": [0 if green == place else 1 for green in greens]}}


def test_votes_reach_the_run_with_the_winner_in_the_ballots_order(voting, tmp_path):
    folder = queue(tmp_path / "q", entries=40)
    task = voting.open_folder(folder, "title")
    assert task.kind == "queue"
    sizes = {f"00000-{e:03d}": 2 for e in range(40)}
    with pytest.raises(WaitsForVotes, match="40 of 40"):
        read_votes(folder, sizes)
    for n in range(40):
        ballot = voting.turn(task.id, "ann").ballot
        assert ballot.prompt == f"prompt {n}"  # in the order of the ballot: the least certain first
        said = TIE if n == 5 else BAD if n == 6 else winner_of(voting, ballot, n % 2)
        voting.cast(ballot.id, said)
        assert len(lines(folder)) == n + 1
    votes = {name: utility.tolist() for name, utility in read_votes(folder, sizes).items()}
    expected = {f"00000-{n:03d}": [1 - n % 2, n % 2] for n in range(40)}
    assert votes == expected | {"00000-005": [0.5, 0.5], "00000-006": [0, 0]}
    assert {row["rater"] for row in lines(folder)} == {"ann"}


def test_a_ranking_of_three_in_a_queue(voting, tmp_path):
    folder = queue(tmp_path / "q", size=3, entries=1)
    ballot = voting.turn(voting.open_folder(folder, "t", size=2).id, "ann").ballot
    greens = [pixel[1] for pixel in pixels(voting, ballot)]
    voting.cast(ballot.id, {OVERALL: {"ranks": [2 - green for green in greens]}})
    assert read_votes(folder, {"00000-000": 3})["00000-000"].tolist() == [0, 0.5, 1]


def test_undone_votes_leave_the_file_and_others_lines_stay(voting, tmp_path):
    folder = queue(tmp_path / "q")
    (folder / VOTES).write_text('{"id": "00000-002", "winner": 1, "rater": "by hand"}')  # and no end of line
    task = voting.open_folder(folder, "title")
    first = voting.turn(task.id, "ann").ballot
    voting.cast(first.id, winner_of(voting, first, 0))
    assert [row["rater"] for row in lines(folder)] == ["by hand", "ann"]
    again = voting.undo(first.id)
    voting.undo(first.id)
    assert [row["rater"] for row in lines(folder)] == ["by hand"]
    voting.cast(again.id, winner_of(voting, again, 1))
    assert [(row["id"], row["winner"]) for row in lines(folder)] == [("00000-002", 1), ("00000-000", 1)]


def test_two_raters_and_a_retry_are_two_lines(voting, tmp_path):
    folder = queue(tmp_path / "q", entries=1)
    task = voting.open_folder(folder, "title")
    for name in ("ann", "bob"):
        ballot = voting.turn(task.id, name).ballot
        for _ in range(3):
            voting.cast(ballot.id, LEFT)
    assert sorted(row["rater"] for row in lines(folder)) == ["ann", "bob"]


@pytest.mark.parametrize("crash", ["before the file", "half a line", "before the mark", "no end of line"])
def test_exactly_once_across_a_crash_between_the_two_writes(tmp_path, monkeypatch, crash):
    folder = queue(tmp_path / "q")
    voting = Voting(tmp_path / "votes.db")
    task = voting.open_folder(folder, "title")
    voting.cast(voting.turn(task.id, "ann").ballot.id, LEFT)
    real = _mirror._append

    def append(path: Path, data: bytes) -> None:
        if crash != "before the file":
            real(path, {"half a line": data[:20], "no end of line": data[:-1]}.get(crash, data))
        raise RuntimeError("the power fails")

    monkeypatch.setattr(_mirror, "_append", append)
    with pytest.raises(RuntimeError):
        voting.cast(voting.turn(task.id, "ann").ballot.id, RIGHT)
    monkeypatch.undo()
    voting.close()
    voting = Voting(tmp_path / "votes.db")  # the start alone puts it right
    stored = [vote.ballot for vote in voting.book.votes()]
    assert [row["ballot"] for row in lines(folder)] == stored and len(stored) == 2
    voting.cast(voting.turn(task.id, "ann").ballot.id, TIE)
    assert len(lines(folder)) == 3 and lines(folder)[2]["winner"] is None
    voting.close()


def test_votes_do_not_go_into_a_round_made_anew(voting, tmp_path):
    folder = queue(tmp_path / "q")
    task = voting.open_folder(folder, "title")
    ballot = voting.turn(task.id, "ann").ballot
    for file in folder.rglob("*.*"):
        file.unlink()
    time.sleep(0.02)
    queue(folder)
    voting.cast(ballot.id, LEFT)  # of the old pictures: kept, and not told to the new run
    assert len(list(voting.book.votes())) == 1 and not (folder / VOTES).exists()
    assert voting.open_folder(folder, "title").id != task.id


def test_a_counted_round_takes_no_more_votes(voting, tmp_path):
    folder = queue(tmp_path / "q")
    task = voting.open_folder(folder, "title")
    (folder / TALLY).write_text("{}")
    assert voting.turn(task.id, "ann").state == "counted"
    assert voting.turn(voting.open_folder(folder, "title").id, "bob").state == "counted"


# Painted while people vote


class Easel:
    """A painter whose pictures are one colour each; `paint` may be made to fail or to wait."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, int]] = []
        self.fails = False

    def paint(
        self, parts: Sequence[Any], prompts: Sequence[str], numbers: Sequence[int], on_step: Callable[[float], None]
    ) -> Iterator[Painted]:
        for part in parts:
            on_step(0.5)
            if self.fails:
                raise UserError("the weights are gone")
            self.made.append((part.name, prompts[0], numbers[0]))
            image = Image.new("RGB", (16, 16), (len(self.made) % 256, len(self.made) // 256, 0))
            yield Painted(part.name, prompts[0], numbers[0], image, {"seed": 3, "model": part.name})


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pairs_are_painted_ahead_and_no_more(tmp_path):
    easel, parts = Easel(), [SimpleNamespace(name=name) for name in "abc"]
    with VoteBook(tmp_path / "votes.db") as book:
        task = book.add_task("live:x", "live", "title")
        live = Live(book, task, easel, parts, ["p", "q"])
        until(lambda: len(book.fresh(task.id)) == AHEAD)
        time.sleep(0.05)
        assert len(easel.made) == 2 * AHEAD and live.is_running
        for _ in range(8):
            ballot = book.draw(task.id, "ann")[0]
            live.wake()
            book.cast(ballot.id, {OVERALL: Verdict((0, 1))})
            until(lambda: len(book.fresh(task.id)) == AHEAD)
        assert [(prompt, number) for _, prompt, number in easel.made[::2]] == [
            (prompt, number) for number in range(6) for prompt in "pq"
        ]
        pairs = zip(easel.made[::2], easel.made[1::2], strict=True)
        assert len({frozenset((left[0], right[0])) for left, right in pairs}) == 3
        assert book.contestants(task.id) == {name: {"model": name} for name in "abc"}
        live.stop()
        assert not live.is_running


def test_a_painter_that_fails_is_told_to_the_voters(tmp_path):
    voting, easel = Voting(tmp_path / "votes.db"), Easel()
    easel.fails = True
    task = voting.book.add_task("live:x", "live", "title")
    voting._lives[task.id] = live = Live(voting.book, task, easel, [SimpleNamespace(name=name) for name in "ab"], ["p"])
    until(lambda: not live.is_running)
    turn = voting.turn(task.id, "ann")
    assert (turn.state, turn.problem) == ("done", "the weights are gone")
    voting.close()


def test_what_can_not_be_painted_is_refused(tmp_path):
    from diffalign.api import configure, studio

    voting = Voting(tmp_path / "votes.db")
    config = configure(configs=["sprites-sdxl"])
    place = studio(config=config, folder=tmp_path, roots=[tmp_path], below=Path)
    for contestants, prompts, message in [
        (["sprites-sdxl"], ["a circle"], "two or more"),
        (["sprites-sdxl", "nobody"], ["a circle"], "no 'nobody'"),
        (["sprites-sdxl", "sprites-sd3"], [], "write one"),
    ]:
        with pytest.raises(UserError, match=message):
            voting.open_live(place, contestants, prompts)
    assert voting.book.tasks() == []
    voting.close()


@pytest.mark.slow
def test_a_d3po_round_waits_is_voted_on_and_goes_on(tmp_path):
    import diffalign

    def train() -> Path:
        return diffalign.train(
            configs=["sprites-sdxl", "d3po"],
            quiet=True,
            source={
                "votes": True, "scorers": [], "prompts": "sprites:heldout:4:two", "prompts_per_round": 4,
                "images_per_prompt": 2, "sampling": {"num_steps": 4},
            },
            train={"steps": 1, "batch_size": 1, "out": str(tmp_path / "run")},
        ).folder  # fmt: skip

    with pytest.raises(WaitsForVotes, match="4 of 4 prompts wait"):
        train()
    voting = Voting(tmp_path / "votes.db")
    [folder] = Voting.found([tmp_path])
    task = voting.open_folder(folder, "round")
    assert (task.kind, len(everything(voting, task.id, "ann", RIGHT))) == ("queue", 4)
    assert (train() / "export").is_dir()
    assert voting.turn(task.id, "bob").state == "counted" and Voting.found([tmp_path / "run" / "rounds"]) == []
    tally = json.loads((folder / TALLY).read_text())
    for vote in voting.book.votes():
        utility = dict(zip(vote.slots, vote.verdict.utility, strict=True))
        assert tally[vote.place] == [utility["000"], utility["001"]]
    voting.close()
