"""Captions by a vision-language model, and preferences without scores: asked once, resumed to the same bytes."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scorers.tiny_vlm import write_vlm
from scorers.towers import write_head
from test_label import NAMES, files, go, read, rows_of, scored, write_rows

from diffalign._json import read_json
from diffalign.recipes.label import _asked
from diffalign.registry import build
from diffalign.scorers._vlm_questions import CAPTION
from diffalign.scorers.vlm import Vlm
from diffalign.types import ScorerInfo, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return scored(tmp_path / "images", prompts=4, images=2)


def captioner(model: Path, **more: Any) -> dict[str, Any]:
    fields = {"path": str(model), "device": "cpu", "dtype": "float32", "batch_size": 3, "max_new_tokens": 5}
    return {"name": "vlm", **fields, **more}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spoken(monkeypatch: pytest.MonkeyPatch, dies: int = -1) -> list[list[str]]:
    """The answers are the questions' last words; returns the batches asked. The process dies in place of one."""
    asked: list[list[str]] = []

    def ask(self: Any, images: list[Any], texts: list[str], prompts: list[str] = ()) -> list[str]:
        if any("refuse" in prompt for prompt in prompts):
            raise ValueError("not\n  this one")
        if len(asked) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        asked.append(list(texts))
        return [f" says:\n{text} #{np.asarray(image).mean():.3f} " for image, text in zip(images, texts, strict=True)]

    monkeypatch.setattr(Vlm, "ask", ask)
    return asked


def test_a_model_writes_a_caption_for_every_picture(folder: Path, model: Path) -> None:
    out = go(folder, scorer="sharp", captions=captioner(model))
    lines = lines_of(folder / "captions.jsonl")
    assert [line["file"] for line in lines] == [row["file"] for row in rows_of(folder)]
    vlm = Vlm(path=str(model), device="cpu", dtype="float32", max_new_tokens=5)
    images = [_asked.read_picture(folder / line["file"]) for line in lines]
    texts = [CAPTION.replace("{prompt}", row["prompt"]) for row in rows_of(folder)]
    assert [line["caption"] for line in lines] == [
        " ".join(answer.split()) or None for answer in vlm.ask(images, texts)
    ]
    by_file = {line["file"]: line["caption"] for line in lines}
    made = read(out)
    assert made and all(record.captions == tuple(by_file[file] for file in record.meta["files"]) for record in made)
    facts = read_json(folder / "captions.json")
    assert facts["pictures"] == 8 and facts["by"]["question"] == CAPTION


def test_another_rule_asks_nothing_again_and_more_pictures_are_asked_alone(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = spoken(monkeypatch)
    go(folder, "a", scorer="sharp", captions=captioner(model, question="What? {prompt}"))
    assert [len(batch) for batch in asked] == [3, 3, 2] and asked[0][0] == "What? thing 0"
    before = (folder / "captions.jsonl").read_text()
    go(folder, "b", scorer="sharp", rule="all-pairs", captions=captioner(model, question="What? {prompt}"))
    assert len(asked) == 3 and (folder / "captions.jsonl").read_text() == before
    assert lines_of(folder / "captions.jsonl")[0]["caption"].startswith("says: What? thing 0 #")
    with pytest.raises(UserError, match="is of another model or question: move it away"):
        go(folder, "c", scorer="sharp", captions=captioner(model))
    more = rows_of(scored(folder, prompts=6, images=2))
    go(folder, "d", scorer="sharp", captions=captioner(model, question="What? {prompt}"))
    assert len(asked) == 5 and len(lines_of(folder / "captions.jsonl")) == 12
    assert (folder / "captions.jsonl").read_text().startswith(before)
    write_rows(folder, more[2:])
    with pytest.raises(UserError, match="is of other pictures"):
        go(folder, "e", scorer="sharp", captions=captioner(model, question="What? {prompt}"))


@pytest.mark.parametrize("dies", [0, 1, 2])
def test_a_killed_captioning_goes_on_to_the_same_bytes(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies: int
) -> None:
    whole = scored(tmp_path / "whole", prompts=4, images=2)
    with monkeypatch.context() as patch:
        spoken(patch)
        go(whole, scorer="sharp", captions=captioner(model))
    child = os.fork()
    if child == 0:
        spoken(monkeypatch, dies)
        try:
            go(folder, scorer="sharp", captions=captioner(model))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    path = folder / "captions.jsonl"
    assert len(lines_of(path)) == 3 * dies
    if dies:  # the kill came in the middle of a line, and of a batch
        path.write_bytes(path.read_bytes()[:-20])
    asked = spoken(monkeypatch)
    go(folder, scorer="sharp", captions=captioner(model))
    assert [len(batch) for batch in asked] == [3, 3, 2][max(0, dies - 1) :]
    for name in ("captions.jsonl", "captions.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert files(folder / "out") == files(whole / "out")


def test_what_cannot_be_captioned_is_counted_and_left_out(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(folder)
    rows[2]["prompt"] = rows[3]["prompt"] = "refuse this"
    write_rows(folder, rows)
    (folder / "2-0.png").write_bytes(b"no picture")
    spoken(monkeypatch)
    out = go(folder, scorer="sharp", captions=captioner(model))
    lines = {line["file"]: line for line in lines_of(folder / "captions.jsonl")}
    reasons = {file: line["reason"] for file, line in lines.items() if "reason" in line}
    assert set(reasons) == {"1-0.png", "1-1.png", "2-0.png"}
    assert reasons["2-0.png"].startswith("broken image") and reasons["1-0.png"] == "not this one"
    assert all(lines[file]["caption"] is None for file in reasons) and lines["0-0.png"]["caption"]
    assert read_json(folder / "captions.json")["without"] == 3
    assert "label: 3 of 8 pictures have no caption of vlm" in capsys.readouterr().err
    assert read_json(out / "label.json")["counts"]["records_without_caption"] == 2 and len(read(out)) == 2
    (folder / "captions.jsonl").unlink()
    (folder / "3-1.png").unlink()
    with pytest.raises(UserError, match=r"3-1\.png: No such file or directory: generate it again"):
        go(folder, "gone", scorer="sharp", captions=captioner(model))


@dataclass(frozen=True)
class Circle:
    """Embeds pictures by their grey level, 40 levels a third of a turn: 60 beats 100, 100 beats 140, 140 beats 60."""

    batch_size: int = 4
    info: ClassVar[ScorerInfo] = ScorerInfo("circle", "1", ("image", "prompt"), "none", (0.0, 1.0))
    asked: ClassVar[list[int]] = []

    def represent(self, images: list[Any], prompts: list[str]) -> torch.Tensor:
        self.asked.append(len(images))
        turns = torch.tensor([float(np.asarray(image).mean()) / 120 for image in images]) * 2 * torch.pi
        is_known = torch.tensor([prompt != "thing 3" for prompt in prompts])
        return torch.where(is_known[:, None], torch.stack([turns.cos(), turns.sin()], dim=1), torch.nan)

    @staticmethod
    def win_table(v: torch.Tensor) -> np.ndarray:
        return torch.sigmoid(v[:, None, 0] * v[None, :, 1] - v[:, None, 1] * v[None, :, 0]).numpy()


JUDGE = {"prefer": "pairwise", "judge": {"name": "test_label_asked:Circle", "as": "circle"}}


def test_preferences_in_a_circle_become_pairs_by_their_own_probability(tmp_path: Path) -> None:
    folder = scored(tmp_path / "images", prompts=3)
    rows = rows_of(folder)
    (folder / "scores.jsonl").unlink()
    write_rows(folder, [{key: row[key] for key in row if key != "scores"} for row in rows])
    (folder / "scores.jsonl").rename(folder / "manifest.jsonl")  # pictures that nobody scored
    Circle.asked.clear()
    out = go(folder, rule="all-pairs", labels="soft", **JUDGE)
    made, facts = read(out), read_json(out / "label.json")
    assert Circle.asked == [4, 4, 1] and len(lines_of(folder / "circle.jsonl")) == 9
    ends = [tuple(file[2] for file in record.meta["files"]) for record in made]
    assert sorted(ends) == sorted([("0", "1"), ("1", "2"), ("2", "0")] * 3)
    for record in made:  # sigmoid(sin 120 degrees), up to the pictures' noise
        assert record.utility[0] == record.meta["probability"] == pytest.approx(0.7039, abs=0.03)
        assert sum(record.utility) == pytest.approx(1) and list(record.meta["scorers"]) == ["circle"]
        assert record.meta["label"] == "all-pairs by circle, soft"
    assert len(made[0].meta["scorers"]["circle"]) == 32 and facts["scorers"]["circle"]["ties"] == 0
    assert "circle" in (out / "contact_sheet.html").read_text()
    ranked = read(go(folder, "ranking", rule="ranking", **JUDGE))
    assert Circle.asked == [4, 4, 1]  # nothing is asked again
    for record in ranked:
        assert record.utility == tuple(sorted(record.utility, reverse=True))
        assert sum(record.utility) == pytest.approx(1.5) and max(record.utility) < 0.53  # shares of two comparisons
    tied = read_json(go(folder, "tied", rule="all-pairs", min_margin=0.5, humans=3, **JUDGE) / "label.json")
    assert tied["counts"]["queued"] == 3 and tied["counts"]["undecided"] == 9 and not tied["counts"]["records"]
    assert tied["scorers"]["circle"]["ties"] == 1


def test_a_random_head_labels_scored_pictures_as_it_compares_them(tmp_path: Path) -> None:
    folder = scored(tmp_path / "images", prompts=4, images=3)
    judge = {"name": "general_preference", "path": str(write_head(tmp_path / "head")), "device": "cpu"}
    made = read(go(folder, prefer="pairwise", judge=judge))
    scorer = build("scorer", judge)
    for number, record in enumerate(made):
        images = [_asked.read_picture(folder / f"{number}-{k}.png") for k in range(3)]
        table = scorer.compare_group(images, record.prompt)
        share = (table.sum(axis=1) - 0.5) / 2
        winner, loser = int(share.argmax()), int(share.argmin())
        assert record.meta["files"] == [f"{number}-{winner}.png", f"{number}-{loser}.png"]
        assert record.meta["probability"] == pytest.approx(table[winner, loser], abs=1e-5)
        assert set(record.scores) == set(NAMES) and set(record.meta["scorers"]) == {*NAMES, "general_preference"}
    assert len(made) == 4


def test_what_the_judge_cannot_embed_is_left_out_and_counted(folder: Path) -> None:
    facts = read_json(go(folder, **JUDGE) / "label.json")
    assert facts["counts"]["images_without_score"] == 2 and facts["counts"]["prompts_with_too_few_images"] == 1
    assert facts["counts"]["records"] == 3


def test_wrong_words_are_one_line_and_leave_no_folder(folder: Path, model: Path) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match) as error:
            go(folder, "wrong", **settings)
        assert "\n" not in str(error.value) and not (folder / "wrong").exists()

    refused("go together: give both or none", prefer="pairwise")
    refused("go together: give both or none", judge="circle")
    refused("label.judge labels alone", scorer="sharp", **JUDGE)
    refused("label.judge: vlm compares no pictures", prefer="pairwise", judge={"name": "vlm", "path": str(model)})
    refused(
        "label.captions: pixel answers no questions", scorer="sharp", captions={"name": "pixel", "of": "brightness"}
    )
    refused("label.captions is empty|name", scorer="sharp", captions={"path": str(model)})
    refused("no such folder", scorer="sharp", captions=captioner(model, path="nowhere"))
