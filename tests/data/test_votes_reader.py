"""Votes as training data: what counts, in one moment's state, as the records that the raters meant."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from diffalign import train
from diffalign.data import good_records, users_of
from diffalign.registry import build
from diffalign.types import UserError
from diffalign.votes import OVERALL, Picture, Place, Verdict, VoteBook

BETTER = {"a": 0, "b": 1}  # ranks of who made a picture: what all raters here think


def png(*color: int, side: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), color).save(out, "PNG")
    return out.getvalue()


def filled(path: Path, prompts: int = 12) -> VoteBook:
    book = VoteBook(path)
    task = book.add_task("key", "pictures", "title")
    book.add_places(
        task.id,
        (
            Place(f"p{n}", f"a {n} circle", tuple(Picture(m, m, png(ord(m), 10 * n, 0)) for m in "ab"), n)
            for n in range(prompts)
        ),
    )
    return book


def vote(book: VoteBook, rater: str, said: str = "best", aspect: str = OVERALL) -> str:
    """One vote; returns its ballot."""
    ballot = book.draw(1, rater)[0]
    reds = [Image.open(io.BytesIO(book.picture(number))).getpixel((0, 0))[0] for number in ballot.pictures]
    ranks = {
        "best": tuple(BETTER[chr(red)] for red in reds),
        "worst": tuple(1 - BETTER[chr(red)] for red in reds),
    }.get(said, (0, 0))
    verdicts = {OVERALL: Verdict(ranks, said == "bad")} | ({aspect: Verdict(ranks[::-1])} if aspect != OVERALL else {})
    book.cast(ballot.id, verdicts)
    return ballot.id


def read(path: Path, **fields: object):
    return build("data", {"name": "auto" if not fields else "votes", "path": str(path), **fields})


def test_a_record_per_vote_with_the_winner_on_its_side(tmp_path):
    with filled(tmp_path / "votes.db") as book:
        for _ in range(12):  # left and right at random: the utilities follow the pictures
            vote(book, "ann")
        records = list(read(tmp_path / "votes.db")[i] for i in range(12))
        for n, record in enumerate(records):
            assert record.images == (png(97, 10 * n, 0), png(98, 10 * n, 0)) and record.utility == (1, 0)
            assert (record.prompt, record.user) == (f"a {n} circle", "ann")
            assert record.meta["contestants"] == ["a", "b"] and record.meta["vote"] == n + 1


def test_two_raters_of_the_same_pictures_are_two_records_of_one_id(tmp_path):
    with filled(tmp_path / "votes.db", prompts=1) as book:
        vote(book, "ann")
        vote(book, "bob", "worst")
    reader = read(tmp_path / "votes.db")
    assert [reader[i].utility for i in range(2)] == [(1, 0), (0, 1)] and reader[0].id == reader[1].id
    assert users_of(reader).names == ["ann", "bob"]


def test_ties_and_both_bad_follow_the_tie_policy(tmp_path):
    with filled(tmp_path / "votes.db") as book:
        for said in ("best", "tie", "bad"):
            vote(book, "ann", said)
    dropped, kept = read(tmp_path / "votes.db"), read(tmp_path / "votes.db", ties="keep")
    assert len(dropped) == 1 and dropped.report.dropped["tie"] == 2
    assert [kept[i].utility for i in range(3)] == [(1, 0), (0.5, 0.5), (0, 0)]
    assert [kept[i].meta["both_bad"] for i in range(3)] == [False, False, True]


def test_undone_votes_are_absent_and_aspects_apart(tmp_path):
    path = tmp_path / "votes.db"
    with filled(path) as book:
        vote(book, "ann")
        book.undo(vote(book, "ann", "worst", "detail"))
        vote(book, "ann", "best", "detail")
        assert [record.utility for _, record in good_records(read(path), read(path).report)] == [(1, 0), (1, 0)]
        reader = read(path, aspect="detail")
        assert [reader[i].utility for i in range(len(reader))] == [(0, 1)]
        with pytest.raises(UserError, match=r"no vote of aspect 'mood' counts \(its aspects are detail, overall\)"):
            read(path, aspect="mood")


def test_a_reader_sees_one_moment_while_people_go_on(tmp_path):
    path = tmp_path / "votes.db"
    with filled(path) as book:
        vote(book, "ann")
        taken_back = vote(book, "ann")
        reader, moment = read(path), book.last_event()
        mark = reader.fingerprint()
        book.undo(taken_back)
        vote(book, "bob", "worst")
        assert [reader[i].utility for i in range(len(reader))] == [(1, 0), (1, 0)] and reader.fingerprint() == mark
        assert read(path).fingerprint() != mark and [read(path)[i].user for i in range(2)] == ["ann", "bob"]
        pinned = read(path, until=moment)
        assert len(pinned) == 2 and pinned.fingerprint() == mark
        with pytest.raises(UserError, match="until=99: the newest event is 4"):
            read(path, until=99)
        travelled = pickle.loads(pickle.dumps(reader))  # to a worker process
        assert travelled[1] == reader[1]


def test_the_fingerprint_is_of_the_votes_not_of_the_file(tmp_path):
    path, copy = tmp_path / "votes.db", tmp_path / "copy.sqlite"
    with filled(path) as book:
        vote(book, "ann")
        before = read(path).fingerprint()
        book.draw(1, "bob")  # a ballot without a vote
        assert read(path).fingerprint() == before
    shutil.copy(path, copy)
    assert read(copy).fingerprint() == before


def test_a_copy_on_a_disk_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        with filled(folder / "votes.db") as book:
            vote(book, "ann")
        folder.chmod(0o555)
        try:
            os.seteuid(user or 65534)  # nobody, where the tests run as root, who may write everywhere
            with pytest.raises(OSError):
                (folder / "new").write_text("")
            assert read(folder / "votes.db")[0].user == "ann"
        finally:
            os.seteuid(user)
            folder.chmod(0o700)
        assert [file.name for file in folder.iterdir()] == ["votes.db"]


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda path: None, "no such file"), (lambda path: path.write_text("x" * 200), "no SQLite database"),
     (lambda path: VoteBook(path).close(), "vote in `diffalign app`")],
)  # fmt: skip
def test_files_without_votes_are_one_clear_line(tmp_path, make, message):
    make(tmp_path / "votes.db")
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "votes.db")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_trains_on_votes_and_a_new_vote_is_noticed(tmp_path):
    path = tmp_path / "votes.db"
    with filled(path) as book:
        for said in ("best", "worst", "best", "tie", "bad", "best"):
            last = vote(book, "ann", said)
        book.undo(last)
        configs = ["sprites-sdxl", "diffusion-dpo"]
        sections = {
            "source": {"data": {"path": str(path)}, "cache_dir": str(tmp_path / "cache"), "holdout": 0.0},
            "train": {"steps": 2, "batch_size": 2, "out": str(tmp_path / "run")},
        }
        run = train(configs=configs, quiet=True, **sections)
        facts = (run.folder / "run.json").read_text()
        assert '"num_records": 3' in facts and '"tie": 2' in facts
        vote(book, "bob")
        with pytest.raises(UserError, match="data changed"):
            train(configs=configs, quiet=True, **sections)
