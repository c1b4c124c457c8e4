"""Readers: every layout gives the same records, and nothing bad is lost, swapped or fatal."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.data import BadRow, RecordWriter, Report, good_records
from diffalign.registry import build, names
from diffalign.types import Record, UserError


def data(name: str, path, **settings_):
    return build("data", {"name": name, "path": str(path), **settings_})


def test_names_are_the_layouts():
    assert names("data") == ["auto", "folders", "jsonl", "pickapic", "records", "votes"]


LABELS = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=12).filter(lambda labels: set(labels) != {0.5})


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=LABELS, ties=st.sampled_from(["drop", "keep"]), group=st.integers(1, 5))
def test_pickapic_keeps_order_and_labels(kit, tmp_path, labels, ties, group):
    path = kit.pickapic(tmp_path / "a.parquet", [{"label_0": label} for label in labels], row_group_size=group)
    reader = data("pickapic", path, ties=ties)
    kept = [i for i, label in enumerate(labels) if ties == "keep" or label != 0.5]
    assert len(reader) == len(kept)
    for position, row in reversed(list(enumerate(kept))):  # random access
        found = reader[position]
        assert found.prompt == f"p{row}"
        assert found.images == (kit.picture(2 * row), kit.picture(2 * row + 1))
        assert found.utility == (labels[row], 1 - labels[row])  # never swapped: the utility says who won
        assert found.user == str(row)
    assert reader.report.dropped["tie"] == (labels.count(0.5) if ties == "drop" else 0)
    assert reader.report.num_bad == 0


def test_every_layout_gives_the_same_record(kit, tmp_path):
    kit.pickapic(tmp_path / "p" / "a.parquet", [{}])
    (tmp_path / "j").mkdir()
    for k in (0, 1):
        (tmp_path / "j" / f"{k}.png").write_bytes(kit.picture(k))
    kit.jsonl(tmp_path / "j" / "a.jsonl", [{"prompt": "p0", "chosen": "0.png", "rejected": "1.png"}])
    kit.jsonl(tmp_path / "j" / "b.jsonl", [{"prompt": "p0", "images": ["0.png", "1.png"], "utility": [1, 0]}])
    folders = kit.folders(tmp_path / "f", 1)
    (folders / "l" / "000.jpg").unlink()
    (folders / "l" / "000.png").write_bytes(kit.picture(1))
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(Record(7, "p0", (kit.picture(0), kit.picture(1)), (1.0, 0.0)))
    sources = {
        "pickapic": tmp_path / "p", "jsonl": tmp_path / "j" / "a.jsonl", "folders": folders, "records": tmp_path / "r",
    }  # fmt: skip
    seen = set()
    for name, path in [*sources.items(), ("jsonl", tmp_path / "j" / "b.jsonl")]:
        explicit, auto = data(name, path), data("auto", path)
        assert explicit[0] == auto[0]
        assert explicit.fingerprint() == auto.fingerprint()
        seen.add((explicit[0].id, explicit[0].prompt, explicit[0].images, explicit[0].utility))
    assert len(seen) == 1


def test_general_jsonl_with_captions_scores_and_splits(kit, tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(kit.picture(k))
    row = {
        "prompt": "p", "images": ["0.png", "1.png", "2.png"], "utility": [0.5, 2, -1], "captions": ["a", "b", "c"],
        "user": "u", "split": "train", "scores": {"hps": [1, 2, 3]}, "meta": {"x": 1},
    }  # fmt: skip
    path = kit.jsonl(tmp_path / "a.jsonl", [row, row | {"split": "test", "captions": None}])
    reader = data("jsonl", path, split="train")
    assert len(reader) == 1 and reader.report.dropped == {"other split": 1}
    found = reader[0]
    assert found.utility == (0.5, 2.0, -1.0) and found.caption(1) == "b" and found.user == "u"
    assert found.scores == {"hps": (1.0, 2.0, 3.0)} and found.meta == {"x": 1}
    assert data("jsonl", path, split="test")[0].id != found.id  # captions are part of the content
    with pytest.raises(UserError, match="splits are test, train"):
        data("jsonl", path, split="valid")


def test_split_by_hub_file_names(kit, tmp_path):
    kit.pickapic(tmp_path / "train-00000-of-00001.parquet", [{}, {}])
    kit.pickapic(tmp_path / "test-00000-of-00001.parquet", [{"caption": "other"}])
    assert [r.prompt for _, r in good_records(data("auto", tmp_path, split="test"), Report())] == ["other"]
    assert len(data("auto", tmp_path)) == 3


def bad_pickapic_rows(kit):
    image = kit.picture(500, (64, 64), "JPEG")
    return {
        "missing caption": [{"caption": None}, {"caption": "  "}],
        "bad label": [{"label_0": None}, {"label_0": float("nan")}, {"label_0": 0.7}, {"label_0": -1.0}],
        "broken image": [{"jpg_0": b"no image at all"}],
        "missing image": [{"jpg_1": None}, {"jpg_1": b""}],
        "equal images": [{"jpg_0": image, "jpg_1": image}],
        "absurd size": [{"jpg_0": kit.picture(9, (8, 64))}, {"jpg_1": kit.picture(9, (64, 300))}],
    }


def test_bad_rows_are_counted_listed_and_skipped(kit, tmp_path):
    bad = bad_pickapic_rows(kit)
    rows = [{}] + [row for group in bad.values() for row in group] + [{"label_0": 0.0}]
    path = kit.pickapic(tmp_path / "a.parquet", rows)
    reader = data("pickapic", path, max_size=256)
    report = Report(reader.report.num_rows, reader.report.bad.copy(), reader.report.dropped, list(reader.report.rows))
    good = [found.prompt for _, found in good_records(reader, report)]
    assert good == ["p0", f"p{len(rows) - 1}"]
    assert report.bad == {reason: len(group) for reason, group in bad.items()}
    assert sorted(entry["row"] for entry in report.rows) == list(range(1, len(rows) - 1))
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["num_kept"] == 2 and saved["num_rows"] == len(rows) and saved["is_list_complete"]
    assert all(entry["file"] == str(path) for entry in saved["rows"])


def test_refuse_names_the_first_bad_row(kit, tmp_path):
    path = kit.pickapic(tmp_path / "a.parquet", [{}, {"caption": None}, {"label_0": 3.0}])
    with pytest.raises(UserError, match=r"a\.parquet row 1: missing caption.*2 of 3 rows bad"):
        data("pickapic", path, bad_rows="refuse")
    path = kit.pickapic(tmp_path / "b.parquet", [{}, {"jpg_0": b"x"}])
    with pytest.raises(BadRow, match=r"b\.parquet row 1: broken image"):
        list(good_records(data("pickapic", path, bad_rows="refuse"), Report()))


def test_bad_jsonl_lines(kit, tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(kit.picture(k))
    good = {"prompt": "p", "images": ["0.png", "1.png"], "utility": [0, 1]}
    rows = [
        good, "{broken", "[1, 2]", "", good | {"utility": [0]}, good | {"utility": "ab"}, good | {"utility": [0, None]},
        good | {"images": ["0.png", "gone.png"]}, good | {"prompt": 3}, good | {"captions": ["x"]},
        '{"prompt": "p", "images": ["0.png", "1.png"], "utility": [NaN, 1]}', good | {"scores": {"a": [1]}},
    ]  # fmt: skip
    reader = data("jsonl", kit.jsonl(tmp_path / "a.jsonl", rows))
    report = Report()
    assert [index for index, _ in good_records(reader, report)] == [0]
    assert reader.report.bad == {"bad JSON": 2, "bad label": 6, "missing caption": 1}
    assert report.bad == {"missing image": 1} and report.rows[0]["row"] == 8  # blank lines count, as in an editor
    assert [entry["row"] for entry in reader.report.rows] == [2, 3, 5, 6, 7, 9, 10, 11, 12]


def test_unpaired_and_uncaptioned_files_of_folders(kit, tmp_path):
    root = kit.folders(tmp_path / "f", 4)
    (root / "w" / "000.txt").unlink()
    (root / "l" / "001.jpg").unlink()
    (root / "w" / "002.png").unlink()
    reader, report = data("folders", root), Report()
    assert [found.prompt for _, found in good_records(reader, report)] == ["p3"]
    assert reader.report.bad == {"missing caption": 1}
    assert report.bad == {"missing image": 2}


def test_candidates_may_share_an_image_where_captions_differ(kit):
    from diffalign.data._parse import Draft
    from diffalign.data._reader import check_texts, is_tie

    draft = Draft("p", (b"x", b"x"), (1.0, 1.0), captions=("a", "b"))
    check_texts(draft)
    assert is_tie(draft) and not is_tie(Draft("p", (b"x",), (1.0,)))


WRONG_FILES = [
    ("pickapic", "a.parquet", b"", "file is empty"),
    ("pickapic", "a.parquet", b"PAR1 nonsense", "not a Parquet file"),
    ("auto", "a.parquet", b"", "file is empty"),
    ("auto", "a.parquet", b"nonsense", "not a Parquet file"),
    ("auto", "a.csv", b"a,b", "layout is not recognised"),
    ("jsonl", "a.jsonl", b"\n \n", "file is empty"),
    (
        "jsonl",
        "a.jsonl",
        b'{"prompt": "p", "img": 1}',
        "neither chosen and rejected nor images and utility.*prompt, img",
    ),
    ("jsonl", "a.jsonl", b'{"prompt": "", "chosen": "a", "rejected": "b"}', "no rows left.*missing caption 1"),
    ("folders", "x/a.txt", b"", "no folder w/"),
    ("auto", "x/a.txt", b"", "layout is not recognised"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), WRONG_FILES)
def test_whole_file_errors_are_one_line(tmp_path, name, file, content, message):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    target = path.parent if "/" in file else path
    with pytest.raises(UserError, match=message) as caught:
        data(name, target)
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)


def test_missing_paths_columns_and_keys(kit, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        data("auto", tmp_path / "gone")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"caption": ["a"], "jpg_0": [b"x"], "label_0": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no column 'jpg_1'; it has caption, jpg_0, label_0"):
        data("auto", tmp_path / "a.parquet")
    path = kit.pickapic(tmp_path / "b.parquet", [{}])
    with pytest.raises(UserError, match="unknown key data.tie"):
        data("auto", path, tie="drop")
    with pytest.raises(UserError, match=r"data.ties: .*'drop' or 'keep'"):
        data("auto", path, ties="maybe")
    with pytest.raises(UserError, match="no rows left.*tie 1"):
        data("auto", kit.pickapic(tmp_path / "c.parquet", [{"label_0": 0.5}]))
    with pytest.raises(IndexError):
        data("auto", path)[1]


def test_offline_hub_path_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="hf://datasets/someone/pairs: cannot be reached .*offline.*local folder"):
        data("auto", "hf://datasets/someone/pairs")


def test_remote_file_system(kit, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    content = kit.pickapic(tmp_path / "a.parquet", [{}, {"label_0": 0.0}]).read_bytes()
    with fsspec.open("memory://set/data/a.parquet", "wb") as file:
        file.write(content)
    reader = data("auto", "memory://set")
    assert [reader[i].utility for i in (0, 1)] == [(1.0, 0.0), (0.0, 1.0)]
    assert reader.fingerprint() == data("auto", "memory://set").fingerprint()


def test_fingerprint_sees_what_changes(kit, tmp_path):
    root = kit.folders(tmp_path / "f", 3)
    path = kit.pickapic(tmp_path / "a.parquet", [{}, {}])

    def marks():
        return [data("folders", root).fingerprint(), data("pickapic", path).fingerprint()]

    before = marks()
    assert marks() == before
    assert data("pickapic", path, ties="keep").fingerprint() != before[1]
    os.utime(root / "l" / "001.jpg", ns=(1, 1))  # an image beside the data
    assert marks()[0] != before[0]
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    times = path.stat()
    path.write_bytes(bytes(raw))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time, other bytes near an end
    assert marks()[1] != before[1]


def test_folder_move_keeps_the_fingerprint(kit, tmp_path):
    root = kit.folders(tmp_path / "f", 2)
    before = data("folders", root).fingerprint()
    root.rename(tmp_path / "g")
    assert data("folders", tmp_path / "g").fingerprint() == before


def test_readers_travel_to_workers(kit, tmp_path):
    reader = data("pickapic", kit.pickapic(tmp_path / "a.parquet", [{}, {}]))
    first = reader[0]
    assert pickle.loads(pickle.dumps(reader))[0] == first


def test_id_is_the_content(kit, tmp_path):
    same = {"caption": "x", "jpg_0": kit.picture(1), "jpg_1": kit.picture(2)}
    rows = [same, same | {"label_0": 0.0}, same | {"caption": "y"}, same | {"jpg_1": kit.picture(3)}]
    reader = data("pickapic", kit.pickapic(tmp_path / "a.parquet", rows))
    ids = [reader[i].id for i in range(4)]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(0 <= i < 2**63 for i in ids)


def test_writer_round_trip_resume_and_datasets(kit, tmp_path):
    records = [kit.record(i, split="train", scores={"s": (1.0, 2.0)}, meta={"i": i}) for i in range(7)]
    with RecordWriter(tmp_path / "whole", shard_records=3) as writer:
        for i, item in enumerate(records):
            writer.write(item, {"next": i + 1})
    with pytest.raises(KeyboardInterrupt), RecordWriter(tmp_path / "cut", shard_records=3) as writer:
        for i, item in enumerate(records[:5]):
            writer.write(item, {"next": i + 1})
        raise KeyboardInterrupt
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["records-00000.parquet"]
    with RecordWriter(tmp_path / "cut", resume=True, shard_records=3) as writer:
        assert writer.state == {"next": 3} and writer.num_written == 3
        for i in range(3, 7):
            writer.write(records[i], {"next": i + 1})
    assert kit.tree(tmp_path / "cut") == kit.tree(tmp_path / "whole")
    with pytest.raises(UserError, match="holds records already"):
        RecordWriter(tmp_path / "cut")
    reader = data("auto", tmp_path / "whole")
    for i, item in enumerate(records):
        found = reader[i]
        assert (found.prompt, found.images, found.utility) == (item.prompt, item.images, item.utility)
        assert (found.scores, found.meta, found.split) == (item.scores, item.meta, "train")
    datasets = pytest.importorskip("datasets")
    files = [str(p) for p in sorted((tmp_path / "whole").glob("*.parquet"))]
    table = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "hf"))
    assert len(table) == 7 and table[4]["prompt"] == "prompt 4" and table[4]["utility"] == [1.0, 0.0]
    assert table[4]["images"][1]["bytes"] == records[4].images[1]


def test_records_in_parquet_may_name_files(kit, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(kit.picture(k))
    images = [{"bytes": None, "path": f"{k}.png"} for k in range(2)]
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "images": images, "utility": [0, 1]}]), tmp_path / "a.parquet")
    reader = data("auto", tmp_path / "a.parquet")
    assert reader[0].images == (kit.picture(0), kit.picture(1)) and reader[0].utility == (0.0, 1.0)
    before = reader.fingerprint()
    (tmp_path / "1.png").write_bytes(kit.picture(7))
    assert data("auto", tmp_path / "a.parquet").fingerprint() != before


def test_memory_does_not_grow_with_the_images(tmp_path: Path):
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    blob = np.random.default_rng(0).bytes(40_000)
    schema = pa.schema(
        [("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()), ("label_0", pa.float64())]
    )
    with pq.ParquetWriter(path, schema, compression="NONE", use_dictionary=False) as writer:
        for group in range(25):
            rows = [
                {"caption": f"p{group} {i}", "jpg_0": b"%d" % i + blob, "jpg_1": blob, "label_0": 1.0}
                for i in range(20)
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    assert path.stat().st_size > 38_000_000
    with contextlib.suppress(BadRow):
        data("pickapic", path)[0]  # what is imported on first use is not the reader's memory
    tracemalloc.start()
    held = pa.total_allocated_bytes()
    reader, report = data("pickapic", path), Report()
    peak = 0
    for index in range(0, 500, 7):
        try:
            reader[index]
        except BadRow as error:  # noise is no image: what counts here is what was held to find that out
            report.add_bad(error)
        peak = max(peak, pa.total_allocated_bytes() - held)
    assert report.num_bad == 72 and peak < 8_000_000
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
