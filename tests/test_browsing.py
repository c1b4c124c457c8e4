"""Browsing, correcting and re-writing preference data: every layout, order, undo, and what must be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import makers
import numpy as np
import pyarrow.parquet as pq
import pytest

from diffalign.browsing import Library, Query, RecordBrowser, _index
from diffalign.browsing._cards import flipped
from diffalign.browsing._edits import Edit, EditLog
from diffalign.browsing._files import find_data_sets
from diffalign.data import RecordWriter
from diffalign.data.auto import Auto
from diffalign.errors import UserError
from diffalign.types import Record
from diffalign.votes import OVERALL, Place, Verdict, VoteBook
from diffalign.votes import Picture as Candidate

PICTURES = [makers.picture(seed, 100) for seed in range(6)]


def record(index: int, utility: tuple[float, ...] = (1.0, 0.0), **fields: Any) -> Record:
    images = tuple(PICTURES[(index + k) % len(PICTURES)] for k in range(len(utility)))
    return Record(id=0, prompt=fields.pop("prompt", f"thing {index}"), images=images, utility=utility, **fields)


def write(folder: Path, records: list[Record], shard: int = 1000) -> Path:
    with RecordWriter(folder, shard_records=shard) as writer:
        for one in records:
            writer.write(one)
    return folder


SCORED = [
    record(0, (1.0, 0.0), scores={"clip": (0.9, 0.1), "pick": (2.0, 1.0)}, user="ann"),
    record(1, (0.0, 1.0), scores={"clip": (0.9, 0.1), "pick": (1.0, 2.0)}, user="bob"),
    record(2, (0.5, 0.5), scores={"clip": (0.9, 0.1)}, user="ann"),
    record(3, (0.2, 0.9, 0.4), scores={"clip": (0.3, 0.1, 0.2)}, prompt="A Cat\non 50% of a_mat"),
    record(4, (0.75, 0.5), captions=("a dog", "a log")),
]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., RecordBrowser]:
    return lambda path, **options: RecordBrowser(path, tmp_path / "app", **options)


@pytest.fixture
def scored(tmp_path: Path, browse: Any) -> RecordBrowser:
    return browse(write(tmp_path / "pairs", SCORED, shard=2))


def jsonl(folder: Path, rows: list[Any]) -> Path:
    """Lines beside two pictures; text as it is, anything else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        (folder / f"{number}.png").write_bytes(PICTURES[number])
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def found(browser: RecordBrowser, **query: Any) -> list[int]:
    return [int(row) for row in browser.rows(Query(**query), "me")]


def test_sorting(scored: RecordBrowser) -> None:
    assert found(scored) == [0, 1, 2, 3, 4]
    assert found(scored, sort="margin") == [2, 4, 3, 0, 1]
    assert found(scored, sort="margin", descending=True) == [0, 1, 3, 4, 2]  # equals in the order of the file
    # gaps of clip: 0.8, -0.8, none (a tie), 0.1 - 0.3, none (not scored)
    assert found(scored, sort="clip") == [1, 3, 0, 2, 4]
    assert found(scored, sort="clip", descending=True) == [0, 3, 1, 2, 4]
    assert found(scored, sort="file", descending=True) == [4, 3, 2, 1, 0]


def test_filtering(scored: RecordBrowser) -> None:
    assert found(scored, ties="only") == [2] and found(scored, ties="without") == [0, 1, 3, 4]
    assert found(scored, disagreement="label") == [1, 3]
    assert found(scored, disagreement="scorers") == [1]  # clip says no, pick says yes
    assert found(scored, user="ann") == [0, 2] and found(scored, user="ann' OR true --") == []
    assert found(scored, text="CAT") == [3] and found(scored, text="a Log") == [4]
    assert found(scored, text="50% of a_") == [3] and found(scored, text="%") == [3] and found(scored, text="_") == [3]
    assert found(scored, text="'); DROP TABLE records; --") == []
    assert found(scored, text="thing", user="ann", ties="without", sort="margin") == [0]
    scored.log("me").drop(4)
    scored.log("you").flip(1)
    assert found(scored, is_edited=True) == [4]


def test_facets(scored: RecordBrowser) -> None:
    facets = scored.facets()
    assert (facets.num, facets.num_ties, facets.num_bad, facets.num_against_label) == (5, 1, 0, 2)
    assert facets.scorers == ("clip", "pick") and facets.users == (("ann", 2), ("bob", 1))


@pytest.mark.parametrize("sort", ["nothing", "margin; DROP TABLE records", "'"])
def test_a_scorer_that_nobody_has_keeps_the_order(scored: RecordBrowser, sort: str) -> None:
    assert found(scored, sort=sort) == [0, 1, 2, 3, 4]


def test_cards(scored: RecordBrowser) -> None:
    cards = scored.page([3, 0, 4])
    assert [card.row for card in cards] == [3, 0, 4]
    assert [image.rank for image in cards[0].images] == [3, 1, 2] and cards[0].margin == pytest.approx(0.7)
    assert cards[1].images[0].scores == {"clip": 0.9, "pick": 2.0} and cards[1].user == "ann"
    assert [image.caption for image in cards[2].images] == ["a dog", "a log"]
    assert cards[1].images[0].picture.size == (32, 32) and not cards[1].problem
    assert scored.page([0], side=8)[0].images[0].picture.size == (8, 8)
    assert cards[1].place == "records-00000.parquet row 0" and scored.page([2])[0].place.startswith("records-00001")


def test_pickapic(tmp_path: Path, browse: Any) -> None:
    browser = browse(makers.pickapic(tmp_path / "pick[a]*pic.parquet", 6, labels=(1.0, 0.5, 0.0)))
    assert found(browser, ties="only") == [1, 4] and found(browser, text="NUMBER 3") == [3]
    card = browser.page([2])[0]
    assert [image.utility for image in card.images] == [0.0, 1.0] and card.prompt == "thing number 2"


def test_jsonl_rows_are_numbered_as_the_reader_numbers_them(tmp_path: Path, browse: Any) -> None:
    short = {"prompt": "short", "chosen": "0.png", "rejected": "1.png"}
    long = {"prompt": "long", "images": ["0.png", "1.png"], "utility": [0.5, 0.5], "scores": {"clip": [1, 2]}}
    path = jsonl(
        tmp_path / "in", [short, "", "{broken", long, "[1]", {**short, "prompt": None}, {**long, "utility": [1, None]}]
    )
    browser = browse(path)
    assert len(browser) == 6
    assert found(browser, text="long") == [2, 5] and found(browser, ties="only") == [2]
    assert found(browser, is_bad=True)[:3] == [1, 3, 4]
    cards = browser.page(range(6))
    assert [bool(card.images) for card in cards] == [True, False, True, False, True, False]
    assert "bad JSON" in cards[1].problem and "missing caption" in cards[4].problem
    assert [image.utility for image in cards[0].images] == [1.0, 0.0]


def test_mirrored_folders(tmp_path: Path, browse: Any) -> None:
    for side, picture in (("w", PICTURES[0]), ("l", PICTURES[1])):
        (tmp_path / "mirrored" / side).mkdir(parents=True)
        for name in ("a", "b"):
            (tmp_path / "mirrored" / side / f"{name}.png").write_bytes(picture)
    (tmp_path / "mirrored" / "w" / "a.txt").write_text("a red thing")
    browser = browse(tmp_path / "mirrored")
    assert found(browser, text="red") == [0] and found(browser, is_bad=True) == [1]
    assert [card.problem for card in browser.page([0, 1])] == ["", "missing caption"]


def test_votes(tmp_path: Path, browse: Any) -> None:
    with VoteBook(tmp_path / "votes.db") as book:
        task = book.add_task("t", "pictures", "t")
        pictures = tuple(Candidate(name, name, PICTURES[k]) for k, name in enumerate("ab"))
        book.add_places(task.id, [Place(str(k), f"a thing {k}", pictures) for k in range(2)])
        for ranks in ((0, 1), (0, 0)):
            [ballot] = book.draw(task.id, "ann")
            book.cast(ballot.id, {OVERALL: Verdict(ranks)})
        browser = browse(tmp_path / "votes.db")
        assert found(browser, ties="only") == [1] and browser.facets().users == (("ann", 2),)
        assert sorted(image.utility for image in browser.page([0])[0].images) == [0.0, 1.0]
        book.undo(ballot.id)
        assert len(browser.page([0, 1])) == 2 and len(browse(tmp_path / "votes.db")) == 1


def test_what_would_fill_the_page_is_cut(tmp_path: Path, browse: Any) -> None:
    many = Record(0, "x", (PICTURES[0],) * 40, tuple(map(float, range(40))))
    card = browse(write(tmp_path / "x", [many])).page([0])[0]
    assert len(card.images) == 32 and "32 of 40" in card.problem and card.margin == 39


def test_visitors_read_at_the_same_time(tmp_path: Path, browse: Any) -> None:
    browser = browse(write(tmp_path / "pairs", [record(k) for k in range(400)]))
    rows = np.random.default_rng(0).integers(0, 400, (8, 40))
    with ThreadPoolExecutor(8) as pool:
        for asked, cards in zip(rows, pool.map(browser.page, rows), strict=True):
            assert [card.prompt for card in cards] == [f"thing {row}" for row in asked]


@pytest.mark.parametrize("kind", ["records", "pickapic", "jsonl"])
def test_the_index_says_what_the_reader_says(kind: str, tmp_path: Path, browse: Any) -> None:
    """DuckDB and the readers parse the same rows; they must not disagree about one."""
    if kind == "records":
        path = write(tmp_path / "data", SCORED)
    elif kind == "pickapic":
        path = makers.pickapic(tmp_path / "data.parquet", 9, labels=(1.0, 0.5, 0.0))
    else:
        rows = [{"prompt": r.prompt, "images": ["0.png"] * len(r.utility), "utility": r.utility} for r in SCORED]
        path = jsonl(
            tmp_path / "data", [{**row, "scores": dict(r.scores)} for row, r in zip(rows, SCORED, strict=True)]
        )
    browser = browse(path)
    drafts = [browser.draft(row) for row in range(len(browser))]
    margins = [max(draft.utility) - min(draft.utility) for draft in drafts]
    assert found(browser, sort="margin") == sorted(range(len(drafts)), key=lambda row: (margins[row], row))
    reader = Auto(str(path), ties="drop")
    assert len(found(browser, ties="without")) == len(reader)
    streamed = tmp_path / "streamed.duckdb"
    layout = replace(browser._layout, name="another", rows=_NoFiles(browser._layout.rows))
    _index.build_index(layout, streamed)
    import duckdb

    with duckdb.connect(str(streamed), read_only=True) as connection:
        expected = connection.execute("SELECT * FROM records").fetchall()
    with browser.index().result().cursor() as cursor:
        rows = cursor.execute("SELECT * FROM records").fetchall()
    assert repr(rows) == repr(expected) and len(rows) == len(drafts)


class _NoFiles:
    """Rows without names of files: the index must take the way through the parser."""

    def __init__(self, rows: Any) -> None:
        self._rows, self.where = rows, rows.where

    def light(self) -> Iterator[Any]:
        return (self._rows[row] for row in range(len(self)))

    def __len__(self) -> int:
        return len(self._rows)


def test_an_index_is_made_once_and_anew_for_other_data(tmp_path: Path, browse: Any, monkeypatch: Any) -> None:
    path = write(tmp_path / "pairs", SCORED)
    browse(path).facets()
    built: list[Path] = []
    build = _index.build_index
    monkeypatch.setattr(_index, "build_index", lambda layout, to: (built.append(to), build(layout, to)))
    browse(path).facets()
    assert not built
    os.utime(path / "records-00000.parquet", (1, 1))
    browse(path).facets()
    assert len(built) == 1


def test_data_that_changed_underneath_is_not_shown(scored: RecordBrowser) -> None:
    os.utime(scored.path / "records-00001.parquet", (1, 1))
    with pytest.raises(UserError, match="changed on the disk"):
        scored.page([0])


def test_flipping_is_its_own_inverse() -> None:
    assert flipped((1.0, 0.0)) == (0.0, 1.0) and flipped((0.5, 0.5)) == (0.5, 0.5)
    assert flipped((0.1, 0.7, 0.3)) == (0.7, 0.1, 0.3) and flipped((3.0, 1.0, 1.0)) == (1.0, 3.0, 3.0)
    values = tuple(np.random.default_rng(0).normal(size=9))
    assert flipped(flipped(values)) == values and np.argmax(flipped(values)) == np.argmin(values)


def test_edits_show_on_the_card_and_are_undone_one_by_one(scored: RecordBrowser) -> None:
    log = scored.log("me")
    log.flip(0)
    log.caption(0, " a new prompt ")
    log.caption(4, "a frog", image=1)
    log.drop(4)
    first, fourth = scored.page([0, 4], "me")
    assert [image.utility for image in first.images] == [0.0, 1.0] and first.prompt == "a new prompt"
    assert [image.caption for image in fourth.images] == ["a dog", "a frog"] and fourth.edit.is_dropped
    assert scored.page([0], "you")[0].prompt == "thing 0"
    assert [log.undo(), log.undo(), log.undo()] == [4, 4, 0] and log.num_undone == 3
    assert log.of(0) == Edit(is_flipped=True) and log.rows() == [0]
    assert log.redo() == 0 and log.of(0).captions == ((None, "a new prompt"),)
    log.flip(1)  # a new edit forgets what could be redone
    assert log.redo() is None and [log.undo(), log.undo(), log.undo(), log.undo()] == [1, 0, 0, None]
    assert log.rows() == [] and log.of(0) == Edit()


def test_a_log_survives_its_process_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "edits" / "log.jsonl"
    EditLog(path).flip(3)
    with open(path, "a") as file:
        file.write('{"do": "drop", "ro')  # killed while writing
    again = EditLog(path)
    assert again.rows() == [3]
    again.drop(5)
    again.undo()
    again.flip(7)
    other = EditLog(path)
    assert other.rows() == [3, 7] and [entry["do"] for entry in other.entries] == ["flip", "flip"]
    again.flip(3)
    assert other.rows() == [7]  # follows what others wrote


def test_lines_that_are_no_edits_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"do": "undo"}\n{"do": "explode", "row": 1}\n[]\n\n{"do": "redo"}\n{"do": "flip", "row": 2}\n')
    assert EditLog(path).rows() == [2]


@pytest.mark.parametrize("text", ["", "  ", "x" * 10_001])
def test_captions_have_a_length(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="characters"):
        EditLog(tmp_path / "log").caption(0, text)


def save(browser: RecordBrowser, editor: str = "me", name: str | None = None) -> Path:
    folder = browser.version_folder(name)
    for _ in browser.save(editor, name):
        pass
    return folder


def test_a_version_has_the_edits_and_trains(scored: RecordBrowser, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in scored.path.iterdir()}
    log = scored.log("me")
    log.flip(0)
    log.caption(1, "fixed")
    log.caption(4, "a frog", image=1)
    log.drop(3)
    log.flip(2)
    log.undo()
    folder = save(scored)
    assert folder == tmp_path / "app" / "data" / "pairs-v2"
    assert {path.name: path.read_bytes() for path in scored.path.iterdir()} == before
    reader = Auto(str(folder), ties="keep")
    assert [reader[k].prompt for k in range(4)] == ["thing 0", "fixed", "thing 2", "thing 4"]
    assert reader[0].utility == (0.0, 1.0) and reader[0].images == SCORED[0].images
    assert reader[0].scores == SCORED[0].scores and reader[1].user == "bob"
    assert reader[3].captions == ("a dog", "a frog")
    version = json.loads((folder / "version.json").read_text())
    assert version["parent"] == str(scored.path) and version["fingerprint"] == scored.fingerprint
    assert [entry["do"] for entry in version["edits"]] == ["flip", "caption", "caption", "drop"]
    assert (version["records"], version["dropped"], version["left_out"]) == (4, 1, {})
    assert scored.version_folder().name == "pairs-v3"
    odd = makers.pickapic(tmp_path / f"{'x' * 150} [1] ü.parquet", 2)
    assert RecordBrowser(odd, tmp_path / "app").version_folder().name == "x" * 80 + "-v2"
    assert RecordBrowser(folder, tmp_path / "app").version_folder().name == "pairs-v3"


def test_a_version_is_never_written_over(scored: RecordBrowser) -> None:
    folder = save(scored, name="mine")
    written = (folder / "version.json").read_bytes()
    with pytest.raises(UserError, match="there already"):
        save(scored, name="mine")
    assert (folder / "version.json").read_bytes() == written


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "/tmp/x", ".hidden", "a b", "x" * 101, "a\n", "a.db", "a.partial"]
)
def test_names_of_versions_are_file_names(scored: RecordBrowser, name: str) -> None:
    with pytest.raises(UserError, match="version's name"):
        scored.version_folder(name)


def test_an_interrupted_version_goes_on_to_the_same_bytes(tmp_path: Path, browse: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("diffalign.browsing._versions.EVERY", 1)
    many = [record(k, prompt=f"p{k}") for k in range(2500)]
    browser = browse(write(tmp_path / "pairs", many))
    browser.log("me").drop(5)
    whole = save(browser, name="whole")
    half = browser.save("me", "half")
    for done, _ in half:
        if done == 1700:
            with pytest.raises(UserError, match="being written already"):
                next(browser.save("me", "half"))
            half.close()
    folder = tmp_path / "app" / "data" / "half.partial"
    assert (folder / "records-00000.parquet").is_file() and not (folder / "records-00001.parquet").exists()
    browser.log("me").flip(7)
    with pytest.raises(UserError, match="unfinished version with other edits"):
        next(browser.save("me", "half"))
    browser.log("me").undo()
    assert next(browser.save("me", "half"))[0] == 1001
    half_done = save(browser, name="half")
    assert not folder.exists()
    for path in whole.glob("*.parquet"):
        assert path.read_bytes() == (half_done / path.name).read_bytes()
    facts = [json.loads((one / "version.json").read_text()) for one in (whole, half_done)]
    assert facts[0]["records"] == facts[1]["records"] == 2499 and facts[0]["dropped"] == facts[1]["dropped"] == 1


def test_rows_that_nobody_can_read_are_left_out_and_counted(tmp_path: Path, browse: Any) -> None:
    good = {"prompt": "x", "chosen": "0.png", "rejected": "1.png"}
    path = jsonl(tmp_path / "in", [good, "{", {**good, "chosen": "none.png"}, {**good, "prompt": ""}])
    (tmp_path / "in" / "2.png").write_bytes(PICTURES[0][:60])
    with open(path, "a") as file:
        file.write(json.dumps({**good, "rejected": "2.png"}) + "\n")
    browser = browse(path)
    browser.log("me").caption(3, "found again")
    version = json.loads((save(browser) / "version.json").read_text())
    assert version["records"] == 2 or version["left_out"].get("truncated image")
    assert version["left_out"]["bad JSON"] == 1 and version["left_out"]["missing image"] == 1
    for row in range(5):
        browser.log("me").drop(row)
    with pytest.raises(UserError, match="no record is left of 5"):
        save(browser, name="empty")


def test_pictures_outside_the_folders_are_not_read(tmp_path: Path, browse: Any) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "s.png").write_bytes(PICTURES[0])
    inside = tmp_path / "in"
    outside = ["../secret/s.png", str(tmp_path / "secret" / "s.png"), "link.png", "/etc/passwd", "/dev/zero", "."]
    path = jsonl(inside, [{"prompt": "x", "chosen": name, "rejected": "1.png"} for name in outside])
    (inside / "link.png").symlink_to(tmp_path / "secret" / "s.png")

    def below(path: Path) -> Path:
        if not Path(path).resolve().is_relative_to(inside):
            raise UserError("not below the folders")
        return Path(path).resolve()

    browser = browse(path, below=below)
    for card in browser.page(range(len(outside))):
        assert card.images[0].picture is None and card.images[0].problem.startswith("missing image")
        assert card.images[1].picture is not None
    with pytest.raises(UserError, match="no record is left"):
        save(browser)
    for bad in (inside / "out.parquet", inside / "w"):
        with pytest.raises(UserError, match="not below the folders"):
            _make_link(bad, tmp_path, inside)
            browse(inside, below=below)
        os.remove(bad) if bad.is_symlink() else None


def _make_link(bad: Path, root: Path, inside: Path) -> None:
    if bad.suffix:
        makers.pickapic(root / "secret" / "out.parquet", 2)
        bad.symlink_to(root / "secret" / "out.parquet")
    else:
        bad.symlink_to(root / "secret")
        (inside / "l").mkdir()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.parquet", b"", "empty"),
        ("x.parquet", b"PAR1 this is not Parquet PAR1", "not a Parquet file"),
        ("x.jsonl", b"", "empty"),
        ("x.jsonl", b'{"a": 1}\n', "neither chosen and rejected"),
        ("x.db", b"not a database" * 20, "x.db"),
        ("x.txt", b"hello", "not recognised"),
    ],
)
def test_malformed_files_are_one_line(name: str, content: bytes, says: str, tmp_path: Path, browse: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        browse(tmp_path / name)
    assert "\n" not in str(error.value)


def test_damage_inside_a_parquet_file_is_told(tmp_path: Path, browse: Any) -> None:
    path = makers.pickapic(tmp_path / "x.parquet", 30)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    browser = browse(path)
    with pytest.raises(UserError, match="damaged"):
        browser.page([0])


def test_hostile_images_are_placeholders(tmp_path: Path, browse: Any) -> None:
    bomb = bytearray(makers.picture(0, 100))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    images = (bytes(bomb), b"<svg onload=alert(1)>", PICTURES[0][:80])
    browser = browse(write(tmp_path / "x", [Record(id=0, prompt="x", images=images, utility=(1.0, 0.5, 0.0))]))
    shown = browser.page([0])[0].images
    assert [image.picture for image in shown] == [None] * 3
    assert [image.problem.split(":")[0] for image in shown[:2]] == ["absurd size", "broken image"]


def test_a_library_opens_each_data_set_once(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs", SCORED)
    library = Library(tmp_path / "app", Path.resolve)
    browser = library.open(path)
    assert library.open(str(path)) is browser and library.get(path) is browser
    os.utime(path / "records-00000.parquet", (1, 1))
    assert library.get(path) is browser and library.open(path) is not browser


def test_data_sets_are_found_below_the_roots(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "pairs", SCORED)
    jsonl(tmp_path / "runs" / "lines", [{"prompt": "x", "chosen": "0.png", "rejected": "1.png"}])
    makers.pickapic(tmp_path / "runs" / "one.parquet", 2)
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "runs" / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "runs" / "run" / "broken.jsonl").write_bytes(b"\xff\xfe{")
    for side in ("w", "l"):
        (tmp_path / "runs" / "mirrored" / side).mkdir(parents=True)
    write(tmp_path / "runs" / "half.partial", SCORED)
    write(tmp_path / "elsewhere", SCORED)
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    names = [str(path.relative_to(tmp_path / "runs")) for path in find_data_sets([tmp_path / "runs"])]
    assert names == ["lines/pairs.jsonl", "mirrored", "one.parquet", "pairs"]


@pytest.mark.slow
def test_a_version_survives_a_kill(tmp_path: Path) -> None:
    write(tmp_path / "pairs", [record(k, prompt=f"p{k}") for k in range(3000)])
    code = f"""
import os
from pathlib import Path
from diffalign.browsing import RecordBrowser
browser = RecordBrowser({str(tmp_path / "pairs")!r}, Path({str(tmp_path / "app")!r}))
for done, _ in browser.save("me"):
    if done >= {{}}: os._exit(9)
"""
    for stop, expected in ((1500, 9), (10**9, 0)):
        done = subprocess.run([sys.executable, "-c", code.format(stop)], capture_output=True, text=True, timeout=300)
        assert done.returncode == expected, done.stderr
    folder = tmp_path / "app" / "data" / "pairs-v2"
    files = sorted(folder.glob("*.parquet"))
    prompts = [prompt for file in files for prompt in pq.read_table(file)["prompt"].to_pylist()]
    assert prompts == [f"p{k}" for k in range(3000)]


@pytest.mark.slow
def test_a_version_is_training_data(tmp_path: Path, browse: Any) -> None:
    browser = browse(makers.pickapic(tmp_path / "pairs.parquet"))
    browser.log("me").flip(1)
    browser.log("me").drop(2)
    words = makers.tokens("sd15", tmp_path, source__data__path=save(browser), train__steps=2)
    done = makers.run_cli("train", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["fingerprint"]
