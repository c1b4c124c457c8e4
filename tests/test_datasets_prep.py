"""The preparation scripts: filters, reports, resuming, and sprite pairs that are what they say."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.registry import build
from diffalign.sprites.scene import caption, parse, prompts

ROOT = Path(__file__).parent.parent / "datasets_prep"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"prep_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(seed: int, side: int = 32) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """20 rows: ties, a small image, votes, an unsafe one, a broken one, repeated prompts."""
    rows = [
        {
            "caption": f"p{i % 8}", "jpg_0": picture(2 * i, 20 if i == 3 else 32), "jpg_1": picture(2 * i + 1),
            "label_0": 0.5 if i in (1, 2) else float(i % 2), "num_votes": i, "nsfw_score": 0.9 if i == 4 else 0.1,
        }
        for i in range(20)
    ]  # fmt: skip
    rows[6]["jpg_0"] = b"broken"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=5)
    return tmp_path / "in.parquet"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(source: Path, out: Path, *flags: str) -> dict:
    assert script("pickapic").main([str(source), str(out), "--shard-records", "3", *flags]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["num_kept"] == sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))
    return report


def test_filters_drop_and_say_why(source, tmp_path):
    flags = ("--min-side", "24", "--safe", "--min-votes", "1", "--one-per-prompt")
    report = run(source, tmp_path / "out", *flags)
    assert report["num_rows"] == 20 and report["bad"] == {"broken image": 1}
    assert report["dropped"] == {"tie": 2, "small image": 1, "unsafe": 1, "few votes": 1, "prompt seen": 6}
    reader = build("data", {"name": "auto", "path": str(tmp_path / "out")})
    found = [reader[i] for i in range(len(reader))]
    assert [record.prompt for record in found] == ["p5", "p7", "p0", "p1", "p2", "p3", "p4", "p6"]
    assert found[0].utility == (1.0, 0.0) and found[2].utility == (0.0, 1.0) and found[0].meta["num_votes"] == 5


def test_plain_and_limited(source, tmp_path):
    assert run(source, tmp_path / "all")["dropped"] == {"tie": 2}
    assert run(source, tmp_path / "ties", "--ties", "keep")["dropped"] == {}
    report = run(source, tmp_path / "few", "--max-pairs", "4")
    assert report["num_kept"] == 4 and report["dropped"]["over max-pairs"] == 14


def test_resume_gives_the_same_files(source, tmp_path, monkeypatch):
    flags = ("--one-per-prompt", "--safe")
    run(source, tmp_path / "whole", *flags)
    module = script("pickapic")
    real, count = module.RecordWriter.write, []

    def dying(self, *args):
        if len(count) == 5:
            raise KeyboardInterrupt
        count.append(1)
        real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.RecordWriter, "write", dying)
        module.main([str(source), str(tmp_path / "cut"), "--shard-records", "3", *flags])
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["records-00000.parquet"]
    run(source, tmp_path / "cut", *flags)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    run(source, tmp_path / "cut", *flags)  # once more: nothing to do
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_other_settings_in_the_same_folder_are_refused(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    assert script("pickapic").main([str(source), str(tmp_path / "out"), "--safe"]) == 2
    assert "give an empty folder" in capsys.readouterr().err
    assert script("pickapic").main([str(tmp_path / "gone.parquet"), str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_wrong_scenes_differ_in_one_named_thing():
    module = script("sprites")
    rng = np.random.default_rng(0)
    changed = Counter()
    for text in prompts(300, seed=3):
        scene = parse(text)
        wrong = module.wrong_scene(scene, rng)
        assert parse(caption(wrong)) == wrong and caption(wrong) != text  # still in the grammar
        assert wrong.kind == scene.kind
        for what in ("relation", "count", "background"):
            changed[what] += getattr(wrong, what) != getattr(scene, what)
        for before, after in zip(scene.sprites, wrong.sprites, strict=True):
            for what in ("shape", "colour", "size"):
                is_changed = getattr(before, what) != getattr(after, what)
                assert not (is_changed and getattr(before, what) is None)  # what is left open cannot be wrong
                changed[what] += is_changed
    assert sum(changed.values()) == 300 and len(changed) == 6 and min(changed.values()) > 0


def test_sprite_pairs_noise_and_resume(tmp_path, monkeypatch):
    module = script("sprites")
    flags = ["--num", "40", "--seed", "5", "--noise", "0.3", "--shard-records", "16"]
    assert module.main([str(tmp_path / "whole"), *flags]) == 0
    reader = build("data", {"name": "auto", "path": str(tmp_path / "whole")})
    found = [reader[i] for i in range(len(reader))]
    assert [record.prompt for record in found] == prompts(40, 5)
    flipped = sum(record.meta["is_flipped"] for record in found)
    assert 4 <= flipped <= 20
    assert 8 <= sum(record.utility == (1.0, 0.0) for record in found) <= 32  # the winner's place says nothing
    clean = [module.pair(record.prompt, i, 5, 0.0) for i, record in enumerate(found)]
    for record, truth in zip(found, clean, strict=True):
        assert record.images == truth.images
        assert (record.utility != truth.utility) == record.meta["is_flipped"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = module.pair
        patch.setattr(
            module,
            "pair",
            lambda p, n, *rest: real(p, n, *rest) if n < 20 else (_ for _ in ()).throw(KeyboardInterrupt),
        )
        module.main([str(tmp_path / "cut"), *flags])
    assert module.main([str(tmp_path / "cut"), *flags]) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert module.main([str(tmp_path / "cut"), *flags[:-2], "--noise", "0.2"]) == 2
