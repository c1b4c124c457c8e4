"""`diffalign label` from end to end: what the records hold, resuming, bad rows, captions, the contact sheet."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from makers import picture

from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.data import RecordWriter, Report, good_records
from diffalign.recipes import label as recipe
from diffalign.recipes.label._survey import Survey
from diffalign.registry import build
from diffalign.sections import Label
from diffalign.types import Record, UserError

NAMES = ("sharp", "bright", "plain")


def scored(folder: Path, prompts: int = 6, images: int = 3, seed: int = 0, prompt: str = "thing") -> Path:
    """Pictures with three scorers' scores, as `diffalign score` writes them."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(prompts):
        truth = rng.normal(size=images)
        for k in range(images):
            file = f"{number}-{k}.png"
            (folder / file).write_bytes(picture(images * number + k, 60 + 40 * k, side=16))
            scores = {name: round(float(truth[k] + rng.normal() / 2), 3) for name in NAMES}
            rows.append(
                {"file": file, "prompt": f"{prompt} {number}", "prompt_id": number, "number": k, "scores": scores}
            )
    write_rows(folder, rows)
    facts = [{"key": name, "fingerprint": f"print of {name}", "name": name, "version": "1"} for name in NAMES]
    write_json(folder / "scores.json", {"images": str(folder), "scorers": facts})
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def go(folder: Path, out: str = "out", **settings: Any) -> Path:
    return recipe.label(Config(label=Label(scores=str(folder), out=str(folder / out), **settings)), quiet=True)


def read(out: Path) -> list[Record]:
    reader = build("data", {"name": "auto", "path": str(out), "ties": "keep", "min_size": 8})
    return [record for _, record in good_records(reader, Report())]


def files(out: Path) -> dict[str, bytes]:
    """Everything but the shards' count and the config, which names the folder."""
    paths = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "config.yaml")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scored(tmp_path_factory.mktemp("label") / "images")


def test_a_label_keeps_the_scores_and_whose_they_are(folder):
    out = go(folder, "single", scorer="bright")
    made = read(out)
    assert len(made) == 6
    by_file = {row["file"]: row["scores"] for row in rows_of(folder)}
    for record in made:
        winner, loser = record.meta["files"]
        assert record.utility == (1.0, 0.0) and by_file[winner]["bright"] > by_file[loser]["bright"]
        assert record.images == tuple((folder / file).read_bytes() for file in (winner, loser))
        for name in NAMES:
            assert record.scores[name] == (by_file[winner][name], by_file[loser][name])
            assert record.meta["scorers"][name] == f"print of {name}"
        assert record.meta["label"] == "best-worst by bright"
    facts = read_json(out / "label.json")
    assert facts["counts"]["records"] == 6 and facts["scorers"]["bright"]["info"]["fingerprint"] == "print of bright"
    assert list(facts["scorers"]) == ["bright"] and facts["agreement"] == []


@pytest.mark.parametrize("prefer", ["sum", "votes", "maximin", "pareto", "jury"])
def test_several_scorers_label_together(folder, prefer):
    settings = {"scorers": NAMES} if prefer == "sum" else {}
    out = go(folder, f"all-{prefer}", prefer=prefer, rule="all-pairs", **settings)
    made, facts = read(out), read_json(out / "label.json")
    assert made and facts["counts"]["considered"] == 18 == facts["image_pairs"]
    assert facts["counts"]["records"] == len(made) == 18 - facts["counts"]["undecided"]
    assert {row["kappa"] for row in facts["agreement"]} and len(facts["agreement"]) == 3
    majority = [sum(first > second for first, second in record.scores.values()) for record in made]
    if prefer == "jury":
        assert min(majority) >= 2
    if prefer == "pareto":
        assert min(majority) == 3
    if prefer == "sum":
        assert all(sum(a - b for a, b in record.scores.values()) > 0 for record in made)


def test_agreement_in_label_json_is_that_of_the_pairs(folder):
    facts = read_json(go(folder, "kappa", prefer="jury") / "label.json")
    rows = rows_of(folder)
    same = total = 0
    for start in range(0, 18, 3):
        group = [rows[start + k]["scores"] for k in range(3)]
        for i, k in ((0, 1), (0, 2), (1, 2)):
            total += 1
            same += np.sign(group[i]["sharp"] - group[k]["sharp"]) == np.sign(group[i]["bright"] - group[k]["bright"])
    row = next(row for row in facts["agreement"] if row["scorers"] == ["sharp", "bright"])
    assert row["same"] == pytest.approx(same / total)
    assert row["kappa"] == pytest.approx(2 * same / total - 1)  # no ties, and both orders count: p_e = 1/2
    told = recipe.summary(folder / "kappa")
    assert any("sharp and bright" in line and "kappa" in line for line in told)


def test_soft_and_drawn_labels(folder):
    soft = read(go(folder, "soft", prefer="votes", labels="soft", temperature=0.5))
    for record in soft:
        assert record.utility[0] == pytest.approx(record.meta["probability"]) and sum(record.utility) == pytest.approx(
            1
        )
        assert 0.5 < record.utility[0] < 1
    drawn = read(go(folder, "drawn", prefer="votes", rule="all-pairs", labels="sampled", temperature=5.0, seed=1))
    assert {record.utility for record in drawn} == {(1.0, 0.0)}
    assert min(record.meta["probability"] for record in drawn) < 0.5  # the likelier image lost a draw


def test_singles_by_quantile(folder):
    out = go(folder, "singles", scorer="sharp", rule="singles", like_quantile=0.25)
    made = read(out)
    values = np.array([row["scores"]["sharp"] for row in rows_of(folder)])
    cut = np.quantile(values, 0.25)
    assert read_json(out / "label.json")["counts"]["liked_above"] == pytest.approx(cut)
    assert [record.utility for record in made] == [(float(value > cut),) for value in values]
    cut = float(values[0])
    above = read(go(folder, "above", scorer="sharp", rule="singles", like_above=cut, min_margin=0.1))
    assert [record.scores["sharp"][0] for record in above] == [value for value in values if abs(value - cut) > 0.1]


def test_a_ladder_ranks_corrupted_copies(folder):
    made = read(go(folder, "ladder", scorer="sharp", rule="ladder", degrade="noise", levels=2))
    assert len(made) == 6
    for record in made:
        assert record.utility == (1.0, 0.5, 0.0) and len(set(record.images)) == 3 and not record.scores
        assert record.images[0] == (folder / record.meta["files"][0]).read_bytes()


def test_captions_of_each_image(folder):
    rows = rows_of(folder)
    lines = [{"file": row["file"], "caption": f"caption of {row['file']} in full"} for row in rows if row["number"] < 2]
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = go(folder, "captions", prefer="votes", rule="all-pairs", captions=str(captions))
    made, counts = read(out), read_json(out / "label.json")["counts"]
    for record in made:
        assert record.captions == tuple(f"caption of {file} in full" for file in record.meta["files"])
    assert counts["records_without_caption"] > 0 and counts["records"] == len(made)
    hybrid = read(go(folder, "hybrid", prefer="votes", rule="all-pairs", captions=str(captions), perturb=0.5))
    for record, plain in zip(hybrid, made, strict=True):
        assert record.captions[0] == plain.captions[0] and record.captions[1] != plain.captions[1]
    perturbed = read(go(folder, "perturbed", scorer="sharp", perturb=0.5))
    assert all(r.captions[0] == r.prompt != r.captions[1] for r in perturbed)
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    with pytest.raises(UserError, match="in the order of the scores"):
        go(folder, "disorder", scorer="sharp", captions=str(captions))


def test_what_an_interruption_leaves_is_finished_to_the_same_bytes(folder, monkeypatch):
    settings = {"prefer": "jury", "rule": "all-pairs", "humans": 3, "labels": "sampled"}
    whole = go(folder, "whole", **settings)
    wrote, write = [], RecordWriter.write

    def small(self: RecordWriter, record: Record, state: Any = None) -> None:
        if len(wrote) == 6:
            raise KeyboardInterrupt
        wrote.append(record)
        write(self, record, state)

    start = RecordWriter.__init__
    monkeypatch.setattr(RecordWriter, "__init__", lambda self, out, **keys: start(self, out, shard_records=4, **keys))
    again = go(folder, "again", **settings)
    monkeypatch.setattr(RecordWriter, "write", small)
    with pytest.raises(KeyboardInterrupt):
        go(folder, "killed", **settings)
    assert len(list((folder / "killed").glob("records-*.parquet"))) == 1
    wrote.extend([None] * 100)  # type: ignore[list-item]
    go(folder, "killed", **settings)
    assert files(folder / "killed") == files(again)
    assert [record.id for record in read(again)] == [record.id for record in read(whole)]
    before = files(again)
    go(folder, "again", **settings)
    assert files(again) == before


def dies_at(event: int | None, patch: pytest.MonkeyPatch) -> list[int]:
    """Every file that lands and every record counts; in place of number `event` the process is killed."""
    counted = [0]

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            if counted[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)
            counted[0] += 1
            return original(*args, **keys)

        return call

    patch.setattr(os, "replace", counting(os.replace))
    patch.setattr(RecordWriter, "write", counting(RecordWriter.write))
    return counted


def test_sigkill_anywhere_then_the_same_command_gives_the_same_bytes(tmp_path, monkeypatch):
    """In place of any file or record, the first and the last among them; with pairs for people, and their votes."""
    folder = scored(tmp_path / "images", prompts=4)
    votes = "".join(json.dumps({"id": f"00000-00{n}", "winner": n}) + "\n" for n in range(2))
    start = RecordWriter.__init__
    monkeypatch.setattr(RecordWriter, "__init__", lambda self, out, **keys: start(self, out, shard_records=4, **keys))

    def run(out: str) -> Path:
        settings = {"prefer": "jury", "rule": "all-pairs", "humans": 2, "sheet": 2}
        go(folder, out, **settings)
        (folder / out / "queue" / "votes.jsonl").write_text(votes)
        return go(folder, out, **settings)

    with monkeypatch.context() as patch:
        counted = dies_at(None, patch)
        expected = files(run("whole"))
    assert counted[0] > 20 and {"voted/records-00000.parquet", "records-00001.parquet"} < set(expected)
    for event in range(counted[0]):
        child = os.fork()
        if child == 0:
            dies_at(event, monkeypatch)
            try:
                run("killed")
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert files(run("killed")) == expected, event
        shutil.rmtree(folder / "killed")


def test_images_without_a_score_are_left_out_and_counted(tmp_path):
    folder = scored(tmp_path / "images")
    rows = rows_of(folder)
    rows[0]["scores"] = {}  # the first row too
    rows[4]["scores"]["sharp"] = None
    rows[5]["scores"]["sharp"] = float("nan")
    rows = [row for row in rows if row["file"] not in ("2-1.png", "2-2.png")]  # skipped by `score`: not there at all
    write_rows(folder, rows)
    with pytest.raises(UserError, match="holds several scorers"):
        go(folder)
    out = go(folder, scorer="sharp")
    counts = read_json(out / "label.json")["counts"]
    assert counts["images_without_score"] == 3 and counts["images"] == 13
    assert counts["prompts_with_too_few_images"] == 2 == counts["prompts_without_record"]
    assert counts["prompts"] == 6 and len(read(out)) == 4
    told = recipe.summary(out)
    assert "3 images lack a score and are left out" in told


def test_the_contact_sheet_escapes_and_stands_alone(tmp_path):
    folder = scored(tmp_path / "images", prompts=2, prompt="<script>alert(1)</script> & co")
    page = (go(folder, prefer="jury", rule="all-pairs", sheet=2) / "contact_sheet.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page
    assert 'src="data:image/png;base64,' in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 8 and "Least certain" in page and "kappa" in page
    assert not (go(folder, "none", prefer="jury", sheet=0) / "contact_sheet.html").exists()


def test_refusals(folder, tmp_path):
    with pytest.raises(UserError, match="label.scores is missing"):
        recipe.label(Config())
    with pytest.raises(UserError, match="has no scores of hpsv2"):
        go(folder, "x", scorer="hpsv2")
    with pytest.raises(UserError, match="names a scorer twice"):
        go(folder, "x", scorers=("sharp", "sharp"))
    with pytest.raises(UserError, match="label.weights has 2 numbers for 3 scorers"):
        go(folder, "x", scorers=NAMES, weights=(1.0, 2.0))
    with pytest.raises(UserError, match="is no file"):
        go(folder, "x", scorer="sharp", captions="nowhere.jsonl")
    with pytest.raises(UserError, match="no pair was made"):
        go(folder, "y", scorer="sharp", min_margin=100.0)
    other = scored(tmp_path / "images")
    go(other, scorer="sharp")
    write_rows(other, rows_of(other)[:-1])
    with pytest.raises(UserError, match="changed since"):
        go(other, scorer="sharp")
    (other / "0-0.png").unlink()
    (other / "0-1.png").unlink()
    with pytest.raises(UserError, match="generate it again"):
        go(other, "gone", scorer="sharp")


def test_memory_does_not_grow_with_the_images(tmp_path):
    """The survey of ten times the prompts keeps no more: what it holds is the fewest and the counts."""
    folder, peaks = scored(tmp_path, prompts=1), []
    (row, *_) = rows_of(folder)
    rng = np.random.default_rng(0)
    for prompts in (100, 1000):
        with (folder / "scores.jsonl").open("w") as out:
            for number in range(prompts):
                for k in range(3):
                    scores = {name: float(rng.normal()) for name in NAMES}
                    out.write(json.dumps(row | {"prompt_id": number, "number": k, "scores": scores}) + "\n")
        settings = Label(scores=str(folder), prefer="jury", rule="all-pairs", humans=20)
        survey = Survey(recipe.open_scores(settings), settings)
        tracemalloc.start()
        survey.take()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert survey.counts["images"] == 3 * prompts and len(survey.for_people.entries()) == 20
    assert peaks[1] < 1.5 * peaks[0]
