"""The file of votes: nothing lost, nothing counted twice, nobody's order or name given away, and the next pair."""

from __future__ import annotations

import dataclasses
import io
import math
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import UserError
from diffalign.votes import OVERALL, Ballot, Picture, Place, Task, Verdict, VoteBook, verdicts_of
from diffalign.votes._choice import choices, expected_gain, with_ties


def png(*color: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(out, "PNG")
    return out.getvalue()


def filled(path: Path, makers: str = "ab", prompts: int = 3, size: int = 2) -> tuple[VoteBook, Task]:
    """A book whose pictures all differ; the red channel says who made one, the green which prompt it is of."""
    book = VoteBook(path)
    task = book.add_task("key", "pictures", "title", size=size)
    places = [
        Place(f"p{n}", f"prompt {n}", tuple(Picture(m, m, png(ord(m), n % 256, n // 256)) for m in makers), n)
        for n in range(prompts)
    ]
    book.add_places(task.id, places)
    return book, task


@pytest.fixture
def book(tmp_path):
    with filled(tmp_path / "votes.db")[0] as found:
        yield found


def makers(book: VoteBook, ballot: Ballot) -> str:
    """Who made the pictures, as the pictures themselves say."""
    pixels = (Image.open(io.BytesIO(book.picture(number))).getpixel((0, 0)) for number in ballot.pictures)
    return "".join(chr(pixel[0]) for pixel in pixels)


def cast(book: VoteBook, ballot: Ballot, *ranks: int, is_bad: bool = False):
    return book.cast(ballot.id, {OVERALL: Verdict(ranks, is_bad)})


# Verdicts


@pytest.mark.parametrize(
    ("ranks", "is_bad", "utility"),
    [
        ((0, 1), False, (1, 0)),
        ((1, 0), False, (0, 1)),
        ((0, 0), False, (0.5, 0.5)),
        ((0, 0), True, (0, 0)),
        ((2, 0, 1), False, (0, 1, 0.5)),
        ((0, 0, 1), False, (0.75, 0.75, 0)),
        ((0, 1, 1, 1), False, (1, 1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_utility_is_the_share_of_comparisons_won(ranks, is_bad, utility):
    assert Verdict(ranks, is_bad).utility == pytest.approx(utility)


@pytest.mark.parametrize("ranks", [(0,), (), (1, 1), (0, 2), (-1, 0), (0, 1.0), (False, True), ("0", "1")])
def test_ranks_that_are_none(ranks):
    with pytest.raises(UserError, match="rank from 0"):
        Verdict(ranks)
    with pytest.raises(UserError, match="none of them above"):
        Verdict((0, 1), is_bad=True)


@pytest.mark.parametrize(
    "said",
    [None, [], "x", {"overall": [0, 1]}, {"overall": {"ranks": "01"}}, {"overall": {"ranks": [0, 1], "is_bad": 1}},
     {"overall": {"ranks": [0, 1], "rater": "x"}}, {"overall": {"ranks": [[0], 1]}}],
)  # fmt: skip
def test_json_that_is_no_vote(said):
    with pytest.raises(UserError):
        verdicts_of(said)


def test_json_of_a_vote():
    said = {"overall": {"ranks": [0, 0], "is_bad": True}, "detail": {"ranks": [1, 0]}}
    assert verdicts_of(said) == {"overall": Verdict((0, 0), True), "detail": Verdict((1, 0))}


# Votes


def test_a_vote_is_a_record_of_who_saw_what_in_which_order(book):
    [ballot] = book.draw(1, " ann \t b ")
    said = {OVERALL: Verdict((1, 0)), "detail": Verdict((0, 0))}
    assert book.cast(ballot.id, said).is_new
    [overall] = book.votes()
    [detail] = book.votes(aspect="detail")
    assert (overall.rater, overall.prompt, overall.ballot) == ("ann b", ballot.prompt, ballot.id)
    assert overall.pictures == ballot.pictures and "".join(overall.contestants) == makers(book, ballot)
    assert (overall.verdict, detail.verdict) == (said[OVERALL], said["detail"])
    assert detail.event == overall.event and [vote.aspect for vote in book.votes(aspect=None)] == ["detail", OVERALL]
    assert list(book.votes(rater="ann")) == list(book.votes(task=2)) == list(book.votes(after=1)) == []


def test_the_same_ballot_cast_again_gives_the_first_answer(book):
    [ballot] = book.draw(1, "ann")
    first = cast(book, ballot, 0, 1)
    for ranks in ((0, 1), (1, 0)):
        again = cast(book, ballot, *ranks)
        assert (again.verdicts, again.is_new) == (first.verdicts, False)
    assert len(list(book.votes())) == 1 and book.duels(1)["a", "b"][1] == 1
    assert book.progress(1, "ann").mine == 1 and book.last_event() == 1


def test_an_undo_brings_the_ballot_back_once_and_keeps_the_history(book):
    first, second = book.draw(1, "ann", ahead=2)
    cast(book, first, 0, 1)
    cast(book, second, 0, 1)
    assert book.last_vote(1, "ann") == second.id
    again = book.undo(second.id)
    assert book.undo(second.id) == again and again.id not in (first.id, second.id)
    assert dataclasses.replace(again, id=second.id) == second  # the same pictures in the same order
    assert book.last_vote(1, "ann") == first.id and book.progress(1, "ann").mine == 1
    assert [vote.ballot for vote in book.votes()] == [first.id]
    once_more = book.undo(first.id)
    drawn = [ballot.id for ballot in book.draw(1, "ann")]
    assert drawn == [once_more.id, again.id]  # the one taken back last comes first
    assert cast(book, second, 1, 0).is_undone  # a late retry of what was taken back changes nothing
    cast(book, once_more, 1, 0)
    cast(book, again, 1, 0)
    assert [vote.verdict.ranks for vote in book.votes()] == [(1, 0), (1, 0)]
    db = sqlite3.connect(book.path)
    assert db.execute("SELECT what, count(*) FROM events GROUP BY what").fetchall() == [("cast", 4), ("undo", 2)]
    assert db.execute("SELECT count(*) FROM verdicts").fetchone() == (4,)
    with pytest.raises(UserError, match="no vote on this ballot"):
        book.undo(book.draw(1, "bob")[0].id)


def test_the_sums_are_those_of_the_votes_that_count(tmp_path):
    rng = random.Random(0)
    with filled(tmp_path / "votes.db", "abcd", prompts=8, size=3)[0] as book:
        for step in range(60):
            name = f"r{step % 3}"
            if rng.random() < 0.3 and (last := book.last_vote(1, name)):
                book.undo(last)
            elif drawn := book.draw(1, name):
                ranks = rng.choice([(0, 1, 2), (2, 1, 0), (0, 0, 1), (0, 0, 0), (1, 0, 2)])
                cast(book, drawn[0], *ranks)
        wins: Counter[tuple[str, str]] = Counter()
        nums: Counter[tuple[str, str]] = Counter()
        votes = list(book.votes())
        for vote in votes:
            for i, j in combinations(range(3), 2):
                (first, mine), (second, other) = sorted(
                    [(vote.contestants[i], vote.verdict.ranks[i]), (vote.contestants[j], vote.verdict.ranks[j])]
                )
                wins[first, second] += (mine < other) + 0.5 * (mine == other)
                nums[first, second] += 1
        assert len(votes) > 20
        assert {pair: found for pair, found in book.duels(1).items() if found[1]} == {
            pair: (wins[pair], nums[pair]) for pair in nums
        }
        assert sum(book.progress(1, f"r{n}").mine for n in range(3)) == len(votes) == book.progress(1, "x").everybody


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [({}, "overall"), ({"detail": Verdict((0, 1))}, "overall"), ({OVERALL: Verdict((0, 1, 2))}, "ranks 3 pictures"),
     ({OVERALL: Verdict((0, 1)), "x" * 81: Verdict((0, 1))}, "aspect")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_leaves_nothing(book, verdicts, message):
    [ballot] = book.draw(1, "ann")
    with pytest.raises(UserError, match=message):
        book.cast(ballot.id, verdicts)
    assert book.last_event() == 0 and book.draw(1, "ann")[0] == ballot
    with pytest.raises(UserError, match="not known"):
        cast(book, dataclasses.replace(ballot, id="' OR 1=1 --"), 0, 1)


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "a\x00b", "a\u202eb"])
def test_names_that_are_none(book, name):
    with pytest.raises(UserError, match="rater has a name"):
        book.draw(1, name)


# Drawing


def test_who_asks_again_gets_the_same_and_a_vote_moves_on(book):
    first, second = book.draw(1, "ann", ahead=2)
    assert book.draw(1, "ann", ahead=2) == [first, second] and book.draw(1, "ann") == [first, second]
    cast(book, first, 0, 0)
    assert book.draw(1, "ann", ahead=2)[0] == second


def test_nobody_gets_the_same_pictures_twice_and_everybody_all(tmp_path):
    with filled(tmp_path / "votes.db", "abc", prompts=4)[0] as book:
        for name in ("ann", "bob"):
            seen = set()
            while drawn := book.draw(1, name, ahead=2):
                assert len(set(makers(book, drawn[0]))) == 2
                seen.add((drawn[0].prompt, frozenset(makers(book, drawn[0]))))
                cast(book, drawn[0], 0, 1)
            progress = book.progress(1, name)
            assert len(seen) == 4 * 3 == progress.mine == progress.total


def test_places_without_votes_come_first(tmp_path):
    with filled(tmp_path / "votes.db", prompts=6)[0] as book:
        prompts = []
        for n in range(6):  # each rater votes once: all places are voted on before any gets a second vote
            [ballot] = book.draw(1, f"r{n}")
            cast(book, ballot, 0, 1)
            prompts.append(ballot.prompt)
        assert prompts == [f"prompt {n}" for n in range(6)]
        held = [book.draw(1, f"late{n}")[0].prompt for n in range(6)]  # nor are two at one time given the same
        assert sorted(held) == sorted(prompts)


def test_the_order_on_the_page_is_random_and_recorded(tmp_path):
    with filled(tmp_path / "votes.db", prompts=200)[0] as book:
        shown = Counter(makers(book, ballot) for ballot in book.draw(1, "ann", ahead=200))
        assert shown["ab"] + shown["ba"] == 200 and abs(shown["ab"] - 100) < 45  # 6 sigma
        db = sqlite3.connect(book.path)
        assert db.execute("SELECT count(DISTINCT seed) FROM ballots").fetchone() == (200,)
        [one, *_] = book.draw(1, "ann")
        seed, place, stored = db.execute("SELECT seed, place, items FROM ballots WHERE id = ?", (one.id,)).fetchone()
        shuffled = random.Random(seed)
        items = [row[0] for row in db.execute("SELECT id FROM items WHERE place = ? ORDER BY id", (place,))]
        shuffled.shuffle(items)
        assert str(items) == stored  # whoever has the seed can draw it again


def test_a_ballot_says_nothing_of_who_made_its_pictures(book):
    [ballot] = book.draw(1, "ann")
    assert {field.name for field in dataclasses.fields(ballot)} == {"id", "task", "rater", "prompt", "pictures"}
    assert len(ballot.id) >= 20 and not {"a", "b"} & set(ballot.pictures)


def test_pictures_that_are_equal_or_unreadable_are_not_shown(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(9, 9, 9))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "good.png").write_bytes(png(1, 1, 1))
    (folder / "same.png").write_bytes(png(1, 1, 1))
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes(png(2, 2, 2)[:50])
    with Image.new("1", (9000, 1)) as wide:
        wide.save(folder / "wide.png")
    rivals = ["same.png", "text.png", "cut.png", "wide.png", "none.png", "link.png", "../secret.png",
              str(tmp_path / "secret.png")]  # fmt: skip
    with VoteBook(tmp_path / "votes.db") as book:
        task = book.add_task("k", "pictures", "t", str(folder))
        book.add_places(
            task.id,
            (Place(file, file, (Picture("a", "a", file="good.png"), Picture("b", "b", file=file))) for file in rivals),
        )
        assert book.progress(task.id, "ann").total == len(rivals)
        assert book.draw(task.id, "ann") == []
        assert book.progress(task.id, "ann").total == 0
        stored = sqlite3.connect(book.path).execute("SELECT data FROM pictures").fetchall()
        assert stored == [(png(1, 1, 1),)]


def test_adding_again_adds_what_is_new(tmp_path):
    with filled(tmp_path / "votes.db", prompts=2)[0] as book:
        filled(tmp_path / "votes.db", "abc", prompts=4)[0].close()
        assert [task.title for task in book.tasks()] == ["title"] and book.num_places(1) == 4
        assert book.progress(1, "ann").total == 4 * 3


# Which pair teaches most


def test_gain_of_two_in_closed_form():
    """One difference d = s1 - s2 ~ N(0, 2) beforehand: at the mode, variance 1 / (1/2 + n p (1 - p))."""
    assert expected_gain(["a", "b"], {})[0, 1] == pytest.approx(0.5 * math.log(1 + 0.25 * 2))
    wins, num = 7.0, 10
    d = 0.0
    for _ in range(200):  # mode: wins - n p(d) = d / 2
        d += 0.2 * (wins - num / (1 + math.exp(-d)) - d / 2)
    p = 1 / (1 + math.exp(-d))
    expected = 0.5 * math.log(1 + p * (1 - p) / (0.5 + num * p * (1 - p)))
    assert expected_gain(["a", "b"], {("a", "b"): (wins, num)})[0, 1] == pytest.approx(expected)


def test_gain_prefers_the_open_and_the_unknown():
    slots = ["a", "b", "c", "d"]
    duels = {pair: (5.0, 10) for pair in combinations(slots, 2)}
    duels["a", "b"] = (0.5, 1)  # compared once: the least known
    gain = expected_gain(slots, duels)
    assert gain[0, 1] == max(gain[i, j] for i, j in combinations(range(4), 2))
    duels = {("a", "b"): (50.0, 100), ("b", "c"): (0.0, 100), ("a", "c"): (0.0, 100), ("c", "d"): (50.0, 100),
             ("a", "d"): (0.0, 100), ("b", "d"): (0.0, 100)}  # fmt: skip
    gain = expected_gain(slots, duels)  # a ~ b, far below c ~ d: only the near ones are open
    assert min(gain[0, 1], gain[2, 3]) > 3 * max(gain[0, 2], gain[0, 3], gain[1, 2], gain[1, 3])
    huge = expected_gain(["a", "b"], {("a", "b"): (1e6, 10**6)})
    assert np.isfinite(huge).all() and 0 < huge[0, 1] < 0.01


def test_choices_are_each_set_once_and_ties_are_drawn():
    slots = list("abcde")
    firsts = Counter(next(choices(slots, {}, 2, random.Random(n))) for n in range(400))
    assert len(firsts) == 10 and max(firsts.values()) < 80  # 40 expected each
    assert sorted(choices(slots, {}, 2, random.Random(0))) == sorted(combinations(slots, 2))
    assert list(choices(slots, {}, 5, random.Random(0))) == [tuple(slots)]
    assert list(choices(["a"], {}, 2, random.Random(0))) == [] == list(choices([], {}, 2, random.Random(0)))
    triples = list(choices(slots, {}, 3, random.Random(0)))
    assert len(set(triples)) == len(triples) and all(len(set(triple)) == 3 for triple in triples)
    assert with_ties({("a", "b"): (1.0, 1)}, [("b", "a", "c")]) == {
        ("a", "b"): (1.5, 2), ("a", "c"): (0.5, 1), ("b", "c"): (0.5, 1)
    }  # fmt: skip


def test_chosen_pairs_find_the_order_with_fewer_votes_than_random_ones():
    """Eight contestants a step of 0.5 apart: the strengths' error after 120 votes, over 20 repetitions."""
    slots = [f"s{n}" for n in range(8)]
    truth = {slot: 0.5 * n for n, slot in enumerate(slots)}

    def unknown(is_chosen: bool, seed: int) -> float:
        rng, duels = random.Random(seed), {}
        for _ in range(120):
            pair = next(choices(slots, duels, 2, rng)) if is_chosen else tuple(sorted(rng.sample(slots, 2)))
            won = rng.random() < 1 / (1 + math.exp(truth[pair[1]] - truth[pair[0]]))
            wins, num = duels.get(pair, (0.0, 0))
            duels[pair] = (wins + won, num + 1)
        gain = expected_gain(slots, duels)
        return float(np.mean([gain[i, i + 1] for i in range(7)]))  # what is still to learn of neighbours

    assert np.mean([unknown(True, n) for n in range(20)]) < 0.95 * np.mean([unknown(False, n) for n in range(20)])


# The file


WRITER = """
import sys
from diffalign.votes import OVERALL, Verdict, VoteBook
book = VoteBook(sys.argv[1])
while drawn := book.draw(1, "ann"):
    book.cast(drawn[0].id, {OVERALL: Verdict((0, 1))})
    print(drawn[0].id, flush=True)
"""


def test_a_vote_that_was_acknowledged_outlives_sigkill(tmp_path):
    path = tmp_path / "votes.db"
    filled(path, prompts=2000)[0].close()
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(40)]
    process.kill()
    acknowledged += process.stdout.read().split()  # what was printed before the end came
    process.wait()
    with VoteBook(path) as book:
        stored = [vote.ballot for vote in book.votes()]
        assert len(set(stored)) == len(stored) < 2000 and stored[: len(acknowledged)] == acknowledged
        assert len(stored) - len(acknowledged) in (0, 1)  # cast, and killed before it could say so
        assert book.duels(1)["a", "b"][1] == len(stored)
        assert cast(book, book.draw(1, "ann")[0], 0, 1).is_new


def test_two_processes_and_many_threads_share_a_file(tmp_path):
    path = tmp_path / "votes.db"
    first, _ = filled(path, prompts=40)
    second = VoteBook(path)
    failed: list[Exception] = []

    def vote(book: VoteBook, name: str) -> None:
        try:
            for _ in range(10):
                cast(book, book.draw(1, name, ahead=2)[0], 0, 1)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=vote, args=((first, second)[n % 2], f"r{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert Counter(vote.rater for vote in first.votes()) == {f"r{n}": 10 for n in range(8)}
    assert first.duels(1)["a", "b"][1] == 80
    first.close()
    second.close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["votes.db"]  # it moves as one file
    moved = tmp_path / "moved"
    moved.mkdir()
    with VoteBook(shutil.copy(path, moved / "a ?%#.db")) as book:
        assert len(list(book.votes())) == 80 and len(book.picture(next(book.votes()).pictures[0])) > 60


def foreign(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE mine(x)")
    db.commit()
    db.close()


def newer(path: Path) -> None:
    VoteBook(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()


WRONG = {
    "text": (lambda path: path.write_text("votes, votes, votes\n" * 20), "no SQLite database"),
    "empty": (lambda path: path.write_bytes(b""), "no SQLite database"),
    "foreign": (foreign, "another program"),
    "newer": (newer, "layout 99"),
    "folder": (lambda path: path.mkdir(), "cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_files_are_refused_and_not_touched(tmp_path, kind):
    make, message = WRONG[kind]
    path = tmp_path / "votes.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(UserError, match=message) as error:
        VoteBook(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [file.name for file in tmp_path.iterdir()] == ["votes.db"]


def test_a_damaged_file_is_a_clear_error(tmp_path):
    path = tmp_path / "votes.db"
    filled(path, prompts=50)[0].close()
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * 8192 + data[12288:])
    with pytest.raises(UserError, match="damaged|cannot be used") as error:
        book = VoteBook(path)
        book.draw(1, "ann")
    assert str(path) in str(error.value)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        VoteBook(tmp_path / "file" / "votes.db")


def test_a_failed_transaction_leaves_nothing(book, monkeypatch):
    [ballot] = book.draw(1, "ann")

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("diffalign.votes._draw.count", full)
    with pytest.raises(UserError, match="disk is full"):
        cast(book, ballot, 0, 1)
    monkeypatch.undo()
    assert book.last_event() == 0 and list(book.votes()) == []
    assert cast(book, ballot, 0, 1).is_new
