"""`score`: nothing asked twice, any kill ends in the same bytes, bad input is counted, memory does not grow."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from makers import run_cli
from PIL import Image

from diffalign import api
from diffalign.cli import main
from diffalign.progress import Progress
from diffalign.recipes._judging import open_image
from diffalign.recipes.score._fill import Asker, Filler
from diffalign.score_cache import ScoreCache
from diffalign.scorers._build import build_scorers
from diffalign.sections import Score
from diffalign.types import ScorerInfo, UserError

CAPTIONS = ["a small red circle", "two blue crosses", "a large green square"]


@dataclass(frozen=True)
class Scripted:
    """Mean brightness plus the prompt's length; `calls` is about how many pictures it was asked, call by call.

    How it misbehaves is no field: to the cache it stays the same scorer.
    """

    version: str = "1"
    reads_prompt: bool = True
    calls: ClassVar[list[int]] = []
    refuses: ClassVar[str] = "\0"  # ValueError on prompts with this word
    nan: ClassVar[str] = "\0"  # no number for prompts with this word
    dies: ClassVar[int] = -1  # in place of this call
    signal: ClassVar[int] = 0  # by it; 0: by an error
    most: ClassVar[int] = 1000  # pictures at once that fit into memory
    drops: ClassVar[int] = 0  # scores that it forgets

    @property
    def info(self) -> ScorerInfo:
        inputs = ("image", "prompt") if self.reads_prompt else ("image",)
        return ScorerInfo("scripted", self.version, inputs, "grey levels", (0.0, 300.0))

    def score(self, images: list[Image.Image], prompts: list[str]) -> Any:
        if len(self.calls) == self.dies:
            if self.signal:
                os.kill(os.getpid(), self.signal)
            raise RuntimeError("the power went off")
        self.calls.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("too much")
        if any(self.refuses in prompt for prompt in prompts):
            raise ValueError("cannot judge\n  this")
        assert all(image.mode == "RGB" for image in images)
        values = [
            float("nan") if self.nan in prompt else np.asarray(image).mean() + self.reads_prompt * len(prompt) / 1000
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.tensor(values[self.drops :], dtype=torch.float32)


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


def scripted(**fields: Any) -> dict[str, Any]:
    return {"name": "test_score:Scripted", "as": "scripted", **fields}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    Scripted.calls.clear()


def picture(seed: int, height: int = 64, width: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of(root: Path, num: int = 10) -> Path:
    """What `generate` leaves: two pictures of each prompt, and the manifest."""
    root.mkdir()
    rows = []
    for index in range(num):
        picture(index).save(root / f"{index:03d}.png")
        prompt = CAPTIONS[index // 2 % 3] + "!" * (index // 6)
        rows.append({"file": f"{index:03d}.png", "prompt": prompt, "prompt_id": index // 2, "number": index % 2})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "images")


def go(images: Path, *scorers: Any, **settings: Any) -> list[dict[str, Any]]:
    """The rows of scores.jsonl."""
    words = {"images": str(images), "scorers": list(scorers or [scripted()])} | settings
    path = api.score(score=words, quiet=True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(images: Path) -> dict[str, Any]:
    return json.loads((images / "scores.json").read_text())


def skipped(images: Path) -> dict[str, dict[str, str]]:
    path = images / "scores.skipped.jsonl"
    rows = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return {row["file"]: row["reasons"] for row in rows}


# Nothing is asked twice


def test_rows_keep_what_the_manifest_says(images):
    rows = go(images)
    assert [row["file"] for row in rows] == [f"{i:03d}.png" for i in range(10)]
    for index, row in enumerate(rows):
        expected = np.asarray(picture(index)).mean() + len(row["prompt"]) / 1000
        assert row["scores"]["scripted"] == pytest.approx(expected, rel=1e-6)
        assert (row["prompt_id"], row["number"]) == (index // 2, index % 2)
    made = facts(images)
    assert (made["pictures"], made["scored"], made["skipped"]) == (10, 10, 0) and not skipped(images)
    (info,) = made["scorers"]
    assert (info["key"], info["name"], info["version"]) == ("scripted", "scripted", "1") and info["fingerprint"]


def test_a_second_run_asks_nobody_and_changes_nothing(images, tmp_path):
    go(images, batch_size=4)
    assert Scripted.calls == [4, 4, 2]
    before = {name: (images / name).read_bytes() for name in ("scores.jsonl", "scores.json")}
    go(images, batch_size=3)
    go(images, workers=1, out=str(tmp_path / "other.jsonl"))
    assert Scripted.calls == [4, 4, 2]
    assert {name: (images / name).read_bytes() for name in before} == before
    assert (tmp_path / "other.jsonl").read_bytes() == before["scores.jsonl"]


def test_only_what_is_new_is_asked(images, tmp_path):
    go(images)
    picture(99).save(images / "new.png")
    with (images / "manifest.jsonl").open("a") as manifest:
        manifest.write(json.dumps({"file": "new.png", "prompt": CAPTIONS[0], "prompt_id": 5, "number": 0}) + "\n")
        manifest.write(json.dumps({"file": "000.png", "prompt": "another", "prompt_id": 6, "number": 0}) + "\n")
    assert len(go(images)) == 12 and Scripted.calls == [10, 2]
    go(images, scripted(version="2"), out=str(tmp_path / "two.jsonl"))  # a changed version knows nothing
    assert Scripted.calls == [10, 2, 12]
    # one that is new asks for all, the other for nothing
    go(images, scripted(), scripted(**{"as": "blind", "reads_prompt": False}), out=str(tmp_path / "three.jsonl"))
    assert Scripted.calls == [10, 2, 12, 11]  # 000.png is the same picture whatever the prompt


def test_the_same_pixels_are_the_same_picture(images):
    rows = go(images)
    Image.open(images / "003.png").save(images / "003.bmp")
    (images / "004.png").write_bytes((images / "003.png").read_bytes())
    lines = [
        {"file": name, "prompt": rows[3]["prompt"], "prompt_id": 0, "number": 0}
        for name in ("003.bmp", "004.png", "003.png")
    ]
    (images / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {row["scores"]["scripted"] for row in go(images)} == {rows[3]["scores"]["scripted"]}
    assert Scripted.calls == [10]


def test_a_changed_picture_is_scored_anew(images):
    before = go(images)
    picture(77).save(images / "003.png")
    after = go(images)
    assert Scripted.calls == [10, 1]
    assert [index for index in range(10) if before[index] != after[index]] == [3]


def test_what_appears_twice_is_asked_once(images):
    rows = (images / "manifest.jsonl").read_text()
    (images / "manifest.jsonl").write_text(rows * 3)
    assert len(go(images, batch_size=64)) == 30
    assert Scripted.calls == [10]


# Kills


@pytest.mark.parametrize("cache", [True, False])
def test_a_failed_run_goes_on_where_it_stopped(cache, images, tmp_path, monkeypatch):
    go(folder_of(tmp_path / "whole"), batch_size=2, cache_dir=str(tmp_path / "elsewhere"))
    Scripted.calls.clear()
    monkeypatch.setattr(Scripted, "dies", 3)
    with pytest.raises(RuntimeError, match="the power went off"):
        go(images, batch_size=2, cache=cache)
    assert not (images / "scores.jsonl").exists()
    monkeypatch.setattr(Scripted, "dies", -1)
    go(images, batch_size=2, cache=cache)
    assert Scripted.calls == [2] * 5
    assert (images / "scores.jsonl").read_bytes() == (tmp_path / "whole" / "scores.jsonl").read_bytes()


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
import test_score
test_score.Scripted.dies, test_score.Scripted.signal = 3, 9
test_score.go(test_score.Path(sys.argv[1]), test_score.scripted(), {"name": "sprites_clip"}, batch_size=2)
"""


@pytest.mark.slow
def test_sigkill_ends_in_the_same_bytes(images, tmp_path):
    """A scorer whose numbers depend in the last bit on who is judged together."""
    whole = folder_of(tmp_path / "whole")
    go(whole, scripted(), {"name": "sprites_clip"}, batch_size=2, cache_dir=str(tmp_path / "elsewhere"))
    here = Path(__file__).parent
    words = [sys.executable, "-c", CHILD, str(images), str(here), str(here.parent)]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    assert not (images / "scores.jsonl").exists()
    Scripted.calls.clear()
    go(images, scripted(), {"name": "sprites_clip"}, batch_size=2)
    assert Scripted.calls == [2, 2]
    assert (images / "scores.jsonl").read_bytes() == (whole / "scores.jsonl").read_bytes()


def test_a_run_without_a_cache_leaves_none(images, tmp_path):
    go(images, cache=False)
    go(images, cache=False)
    assert Scripted.calls == [10, 10]
    assert not (tmp_path / "cache").exists() and not list(images.glob("*sqlite*"))


@pytest.mark.slow
def test_two_processes_write_what_one_does(images, tmp_path):
    words = [str(images), "scorers=[sprites_sparse,sprites_clip]", "batch_size=2"]
    more = [f"out={tmp_path}/2.jsonl", f"cache_dir={tmp_path}/2"]
    result = run_cli("score", *words, *more, processes=2)
    assert result.returncode == 0, result.stderr
    alone = {"out": str(tmp_path / "1.jsonl"), "cache_dir": str(tmp_path / "1"), "batch_size": 2}
    go(images, "sprites_sparse", "sprites_clip", **alone)
    rows = [[json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in (1, 2)]
    assert len(rows[0]) == 10
    for one, two in zip(*rows, strict=True):
        assert two["scores"] == pytest.approx(one["scores"], abs=1e-5)
        assert one | {"scores": 0} == two | {"scores": 0}


# Scores are a picture's own


def test_batches_order_mates_and_workers_do_not_matter(images, tmp_path):
    lines = (images / "manifest.jsonl").read_text().splitlines(keepends=True)
    expected: dict[str, Any] = {}
    for index, (batch_size, workers, order) in enumerate([(64, 4, 1), (1, 1, 1), (3, 2, -1), (7, 8, 1)]):
        (images / "manifest.jsonl").write_text("".join(lines[::order]))
        settings = {"batch_size": batch_size, "workers": workers, "cache": False}
        made = go(images, "sprites_clip", "sprites_sparse", out=str(tmp_path / f"{index}.jsonl"), **settings)
        assert [row["file"] for row in made] == [json.loads(line)["file"] for line in lines[::order]]
        scores = {row["file"]: row["scores"] for row in made}
        expected = expected or scores
        assert len(scores) == 10
        for name, values in scores.items():
            assert values == pytest.approx(expected[name], abs=1e-5)


def test_memory_does_not_grow_with_the_rows(images, tmp_path):
    """Of 1000 rows, read one at a time, only the window is ever there; and every picture is decoded once."""

    class Row(dict):
        alive = most = 0

        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            Row.alive += 1
            Row.most = max(Row.most, Row.alive)

        def __del__(self) -> None:
            Row.alive -= 1

    settings = Score(batch_size=16, workers=2)
    rows = (Row({"file": f"{i % 10:03d}.png", "prompt": f"prompt {i}"}) for i in range(1000))
    with ScoreCache(tmp_path / "scores.sqlite") as cache:
        asker = Asker("scripted", build_scorers([scripted()])["scripted"], cache, settings)
        Filler(images, [asker], cache, settings).fill(rows, Progress("score", 1000, quiet=True))
        last = asker.answer(cache.file(images / "009.png", (images / "009.png").stat()), "prompt 999")
    assert sum(Scripted.calls) == 1000 and set(Scripted.calls) <= {16, 1000 % 16}
    assert isinstance(last, float) and Row.most <= 16 + 2


def test_huge_pictures_wait_in_small_batches(images, monkeypatch):
    monkeypatch.setattr("diffalign.recipes.score._fill.HELD_PIXELS", 3 * 64 * 64)
    assert len(go(images)) == 10
    assert Scripted.calls == [3, 3, 3, 1]


def test_a_batch_that_does_not_fit_is_halved(images, monkeypatch):
    monkeypatch.setattr(Scripted, "most", 4)
    assert len(go(images)) == 10
    assert Scripted.calls == [10, 5, 2, 3, 5, 2, 3]
    monkeypatch.setattr(Scripted, "most", 0)
    with pytest.raises(torch.OutOfMemoryError):
        go(images, scripted(version="2"), out=str(images / "two.jsonl"))


# Bad input


def png(width: int, height: int) -> bytes:
    """A PNG of that size as far as its header goes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"nothing")
    whole = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, data):
        whole += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return whole


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


BAD = {
    "empty": (b"", "broken image"),
    "text": (b"<html>not found</html>", "broken image"),
    "truncated": (encoded(picture(0))[:2000], "truncated image"),
    "one pixel": (encoded(picture(0, 1, 1)), "absurd size: 1 x 1"),
    "a line": (encoded(picture(0, 3, 64)), "absurd size: 64 x 3"),
    "20,000 wide": (png(20_000, 64), "absurd size: 20000 x 64"),
    "a bomb": (png(20_000, 20_000), "absurd size"),
    "missing": (None, "missing: no such file"),
}


@pytest.mark.parametrize("data,reason", BAD.values(), ids=list(BAD))
@pytest.mark.filterwarnings("error")
def test_bad_pictures_are_counted_and_skipped(data, reason, images, capsys):
    expected = go(images, cache=False)
    (images / "004.png").unlink()
    if data is not None:
        (images / "004.png").write_bytes(data)
    for _ in range(2):  # asked, and from the cache
        assert go(images) == expected[:4] + expected[5:]
        (found,) = skipped(images)["004.png"].items()
        assert found[0] == "picture" and found[1].startswith(reason)
        made = facts(images)
        assert (made["scored"], made["skipped"]) == (9, 1)
        assert made["skipped_because"] == {reason.partition(":")[0]: 1}
        assert "score: 1 of 10 pictures skipped" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"004.png: {reason}"):
        go(images, strict=True)
    picture(4).save(images / "004.png")  # a good one again
    assert go(images) == expected and not (images / "scores.skipped.jsonl").exists()


def test_every_mode_is_rgb_by_one_rule(tmp_path):
    """Upright, transparency over white, first frame; else what Pillow's convert gives."""
    base = picture(1)
    layer = base.convert("RGBA")
    layer.putalpha(Image.new("L", base.size, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 270 degrees
    made = {
        "rgb.png": (encoded(base), base),
        "palette.png": (encoded(base.quantize(16)), base.quantize(16).convert("RGB")),
        "grey.png": (encoded(base.convert("L")), base.convert("L").convert("RGB")),
        "one.png": (encoded(base.convert("1")), base.convert("1").convert("RGB")),
        "cmyk.tif": (encoded(base.convert("CMYK"), "tiff"), base.convert("CMYK").convert("RGB")),
        "clear.png": (encoded(layer), Image.new("RGB", base.size, "white")),
        "turned.png": (encoded(base, exif=turned), base.transpose(Image.Transpose.ROTATE_270)),
        "moving.gif": (
            encoded(base.quantize(8), "gif", save_all=True, append_images=[picture(2).quantize(8)]),
            base.quantize(8).convert("RGB"),
        ),
    }
    for name, (data, expected) in made.items():
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name)), np.asarray(expected), err_msg=name)


def test_prompts_of_every_kind(images, tmp_path):
    """No prompt: no score by who reads it. Ten thousand characters and emoji: a score, and no other row's changes."""
    expected = [row["scores"] for row in go(images, "sprites_clip", out=str(tmp_path / "plain.jsonl"))]
    rows = [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]
    odd = {0: "", 2: " \t", 4: "a small red circle " * 520, 6: "\N{CAT}\N{ZERO WIDTH JOINER}\N{CAT}", 8: "\ud800"}
    for index, prompt in odd.items():
        rows[index]["prompt"] = prompt
    (images / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {row["file"]: row["scores"]["scripted"] for row in go(images, out=str(tmp_path / "own.jsonl"))}
    assert len(made) == 7
    assert {name: list(reasons.values()) for name, reasons in skipped_at(tmp_path / "own.jsonl").items()} == {
        "000.png": ["the prompt is empty"],
        "002.png": ["the prompt is empty"],
        "008.png": ["the prompt is no Unicode text"],
    }
    assert len(go(images, scripted(reads_prompt=False), out=str(tmp_path / "blind.jsonl"))) == 10
    scored = {row["file"]: row["scores"] for row in go(images, "sprites_clip", out=str(tmp_path / "clip.jsonl"))}
    assert {"004.png", "006.png"} <= set(scored)
    for index in (1, 3, 5, 7, 9):
        assert scored[f"{index:03d}.png"] == pytest.approx(expected[index], abs=1e-5)


def skipped_at(path: Path) -> dict[str, dict[str, str]]:
    lines = path.with_suffix(".skipped.jsonl").read_text().splitlines()
    return {row["file"]: row["reasons"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("fault,reason", [("refuses", "cannot judge this"), ("nan", "gave nan")])
def test_what_a_scorer_cannot_judge_is_skipped_alone(fault, reason, images, monkeypatch):
    expected = go(images, cache=False)
    Scripted.calls.clear()
    monkeypatch.setattr(Scripted, fault, "crosses!")  # two pictures
    assert go(images) == [row for row in expected if "crosses!" not in row["prompt"]]
    assert skipped(images) == {name: {"scripted": reason} for name in ("008.png", "009.png")}
    assert facts(images)["skipped_because"] == {"not judged by scripted": 2}
    asked = len(Scripted.calls)
    go(images)
    assert len(Scripted.calls) == asked  # a reason is kept
    with pytest.raises(UserError, match=f"008.png: scripted: {reason}"):
        go(images, strict=True)
    monkeypatch.setattr(Scripted, fault, "\0")
    go(images)
    assert len(Scripted.calls) == asked
    assert go(images, retry=True) == expected and Scripted.calls[asked:] == [2]


def test_strict_stops_at_the_first(images, monkeypatch):
    monkeypatch.setattr(Scripted, "nan", "blue")
    with pytest.raises(UserError, match="scorer scripted, 002.png: gave nan"):
        go(images, strict=True, batch_size=2)
    assert Scripted.calls == [2, 2]


def test_nothing_scored_is_an_error(images, monkeypatch):
    monkeypatch.setattr(Scripted, "refuses", "a")
    (images / "manifest.jsonl").write_text(json.dumps({"file": "000.png", "prompt": "a"}) + "\n")
    with pytest.raises(UserError, match=r"no picture could be scored; .*000.png: scripted: cannot judge this") as error:
        go(images)
    assert "\n" not in str(error.value) and not list(images.glob("scores*"))


def test_another_number_of_scores_is_no_score(images, monkeypatch):
    monkeypatch.setattr(Scripted, "drops", 1)
    with pytest.raises(RuntimeError, match="scorer scripted gave 9 scores for 10 images"):
        go(images)


def test_scores_outside_the_expected_range_are_told_and_not_clipped(images, capsys):
    for name in ("001.png", "002.png"):
        Image.new("RGB", (64, 64), "white").save(images / name)
    rows = [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]
    rows[1]["prompt"] = "x" * 60_000
    (images / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go(images)[1]["scores"]["scripted"] == pytest.approx(255 + 60)
    assert "1 of 10 scores of scripted lie outside its expected range 0 to 300" in capsys.readouterr().err
    assert facts(images)["outside_expected_range"] == {"scripted": 1}


def test_scores_of_other_library_versions_are_told_and_kept(images, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("diffalign.score_cache.versions", lambda: {"torch": "0.1"})
        go(images)
    capsys.readouterr()
    go(images)
    assert "scores of scripted in the cache were begun with torch 0.1; here are torch " in capsys.readouterr().err
    assert Scripted.calls == [10]


def test_scores_of_other_scorers_are_not_overwritten(images):
    go(images)
    with pytest.raises(UserError, match="holds scores of other scorers or images: choose another score.out"):
        go(images, scripted(version="2"))
    made = facts(images)
    for info in made["scorers"]:
        del info["key"], info["fingerprint"]
    old = {"images": made["images"], "scorers": made["scorers"]}  # as it was written before there was a cache
    (images / "scores.json").write_text(json.dumps(old))
    assert len(go(images)) == 10
    assert facts(images)["scorers"][0]["key"] == "scripted"


# Any folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Pictures without a manifest, in an order of their own, and what is none."""
    root = tmp_path / "plain"
    (root / "b").mkdir(parents=True)
    for index, name in enumerate(("c.jpg", "a.png", "b/2.PNG", "b/1.webp")):
        picture(index).save(root / name)
    for name in ("notes.txt", ".hidden.png"):
        (root / name).write_text("")
    return root


NAMES = ["a.png", "b/1.webp", "b/2.PNG", "c.jpg"]


def test_a_line_per_picture_in_the_order_of_their_names(plain, tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\na cat\r\n a dog\u2028here \r\na cat", encoding="utf-8")
    rows = go(plain, prompts=str(tmp_path / "p.txt"))
    assert [row["file"] for row in rows] == NAMES
    assert [row["prompt"] for row in rows] == ["a cat", "a cat", " a dog\u2028here ", "a cat"]
    assert [(row["prompt_id"], row["number"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (2, 0)]


def test_jsonl_names_its_pictures(plain, tmp_path):
    lines = [{"file": "c.jpg", "prompt": "a cat", "by": "me"}, {"file": "gone.png", "prompt": "a dog"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    (row,) = go(plain, prompts=str(tmp_path / "p.jsonl"))
    assert (row["file"], row["by"], row["prompt_id"]) == ("c.jpg", "me", 0)
    assert skipped(plain) == {"gone.png": {"picture": "missing: no such file"}}


def test_scorers_of_pictures_alone_need_no_prompts(plain):
    assert [row["file"] for row in go(plain, scripted(reads_prompt=False))] == NAMES


@pytest.mark.parametrize(
    "name,content,match",
    [
        ("p.txt", "a cat\na dog\n", "holds 2 lines for the 4 pictures"),
        ("p.txt", "\n" * 5, "5 lines"),
        ("p.txt", b"\xff\xfe\n" * 4, "is not UTF-8"),
        ("p.jsonl", '{"prompt": "a cat"}\n', "line 1 has no text `file`"),
        ("p.jsonl", '{"file": "a.png", "prompt": "x"}\n{"file"', "line 2 is not JSON"),
        ("p.jsonl", "[1]\n", "line 1 is no JSON object"),
        ("p.jsonl", "", "holds no pictures"),
        ("nowhere.txt", None, "no such file"),
        (None, None, "holds no manifest.jsonl"),
    ],
)
def test_bad_prompts_are_one_line(name, content, match, plain, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=match) as error:
        go(plain, prompts=None if name is None else str(tmp_path / name))
    assert "\n" not in str(error.value) and not Scripted.calls


def test_bad_folders_and_settings_are_one_line(images, tmp_path):
    (images / "manifest.jsonl").write_text('{"file": "000.png"}\n')
    (tmp_path / "none").mkdir()
    for settings, match in (
        ({"images": str(images)}, "row 1 of the manifest has no text `prompt`"),
        ({"images": "/nowhere"}, "/nowhere: no such folder"),
        ({"images": None}, "score.images is missing"),
        ({"images": str(images / "manifest.jsonl"), "prompts": "p.txt"}, "is no folder"),
        ({"images": str(tmp_path / "none"), "scorers": ["sprites_sparse"]}, "holds no pictures"),
        ({"scorers": []}, "score.scorers is empty"),
        ({"scorers": ["sprites_gold", "sprites-gold"]}, "score.scorers names 'sprites_gold' twice"),
        ({"batch_size": 0}, "score.batch_size must be at least 1"),
        ({"workers": 0}, "score.workers must be at least 1"),
    ):
        with pytest.raises(UserError, match=match):
            api.score(score={"images": str(images), "scorers": [scripted()]} | settings)


# Names and words


def test_a_function_is_a_scorer(images):
    rows = go(images, "test_score:brightness", {"name": "test_score:brightness", "as": "mine", "version": "3"})
    for index, row in enumerate(rows):
        expected = pytest.approx(np.asarray(picture(index)).mean(), rel=1e-6)
        assert row["scores"] == {"test_score:brightness": expected, "mine": expected}
    with pytest.raises(UserError, match="cannot import it"):
        build_scorers(["test_score:nothing"])


def test_the_short_words_of_the_command_line(images, plain, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a small red circle\n" * 4)
    words = [str(plain), "--prompts", str(tmp_path / "p.txt"), "scorers=[sprites-gold,sprites_sparse]", "--quiet"]
    assert main(["score", *words]) == 0
    assert capsys.readouterr().out.strip() == str(plain / "scores.jsonl")
    first = json.loads((plain / "scores.jsonl").read_text().splitlines()[0])
    assert list(first["scores"]) == ["sprites_gold", "sprites_sparse"]
    assert main(["score", f"score.images={images}", "scorers=[test_score:brightness]", "--quiet"]) == 0
    for missing in ("/nowhere", "nowhere", "no/where"):
        assert main(["score", missing, "scorers=[sprites_gold]", "--quiet"]) == 2
        assert f"score.images={missing}: no such folder" in capsys.readouterr().err
    assert main(["score", "nowhere.yaml", "--quiet"]) == 2  # a config by its name
    assert "no config file nowhere.yaml" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["score", str(images), "--promts", "x"])
    assert exit_.value.code == 2 and "--promts" in capsys.readouterr().err
