"""`diffalign evaluate` on an embedded model: training rewards found and flagged, all models in one table and report."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from makers import run_cli
from PIL import Image

from diffalign import api
from diffalign.cli import main
from diffalign.distributed import World
from diffalign.recipes.evaluate import Evaluation, model_names, same_rows, score_folder
from diffalign.recipes.evaluate import _spread as spreads
from diffalign.recipes.evaluate._training import Judge, Seen, kinds, seen_by
from diffalign.score_cache import scorer_fingerprint
from diffalign.scorers._build import build_scorers, scorer_key
from diffalign.sections import Score
from diffalign.types import ScorerInfo, UserError

EVIL = "<script>alert('x')</script> | a *red* circle"
SMALL: dict[str, Any] = {"sampling": {"num_steps": 2, "cfg_scale": 1.0, "batch_size": 16}, "quiet": True}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run on pairs that sprites_proxy labelled."""
    root = tmp_path_factory.mktemp("evaluate")
    options: dict[str, Any] = {
        **SMALL,
        "configs": ["sprites-sdxl", "diffusion-dpo"],
        "generate": {"prompts": "sprites:train:6:two", "images_per_prompt": 3, "out": str(root / "images")},
        "score": {"images": str(root / "images"), "scorers": ["sprites_proxy"], "cache": False},
        "label": {"scores": str(root / "images"), "out": str(root / "pairs"), "sheet": 0},
        "source": {"data": {"name": "auto", "path": str(root / "pairs")}, "cache_dir": str(root / "cache")},
        "train": {
            "steps": 1,
            "batch_size": 2,
            "lr": 1e-2,
            "out": str(root / "run"),
            "validate_every": 0,
            "device": "cpu",
        },
        "log": {"trackers": []},
    }
    for verb in (api.generate, api.score, api.label, api.train):
        verb(**options)
    return root / "run" / "export"


def judged(adapter: Path, out: Path, **settings: Any) -> tuple[Evaluation, dict[str, Any]]:
    settings = {"adapters": [str(adapter)], "prompts": "sprites:heldout:4:two", "out": str(out), **settings}
    result = api.evaluate(configs=["sprites-sdxl"], evaluate=settings, **SMALL)
    return result, json.loads((out / "results.json").read_text())


def test_a_training_reward_is_found_flagged_and_not_concluded_from(adapter: Path, tmp_path: Path) -> None:
    settings = {"scorers": ["sprites_proxy", {"name": "pixel", "of": "brightness", "as": "light"}]}
    result, found = judged(adapter, tmp_path / "e", seeds=2, **settings)
    assert found["scorers"]["sprites_proxy"]["kind"] == "train" and found["scorers"]["light"]["kind"] == "held-out"
    assert found["scorers"]["sprites_proxy"]["trained"] == [f"run: labelled {adapter.parents[1] / 'pairs'}"]
    assert found["headline"]["scorer"] == "light" and found["headline"]["num_comparisons"] == 1
    verdicts = {row["scorer"]: row["verdict"] for row in found["comparison"]["rows"] if row["win"]}
    assert verdicts["sprites_proxy"] == "training reward" and verdicts["light"] != "training reward"
    for name in ("report.html", "report.md"):
        text = (tmp_path / "e" / name).read_text()
        assert "was a training reward (run: labelled" in text.replace("\\_", "_")
    assert result.summary == found["headline"]["text"]


def test_with_training_rewards_alone_there_is_no_verdict(adapter: Path, tmp_path: Path) -> None:
    result, found = judged(adapter, tmp_path / "e", scorers=["sprites_proxy"])
    assert result.summary == "No verdict: sprites_proxy was a training reward"
    assert found["headline"]["verdict"] is None and found["comparison"]["num_comparisons"] == 0
    assert "No verdict: sprites_proxy was a training reward" in (tmp_path / "e" / "report.html").read_text()
    assert r"**No verdict: sprites\_proxy was a training reward**" in (tmp_path / "e" / "report.md").read_text()


def test_unknown_training_is_told(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "somewhere" / "else")
    _, found = judged(tmp_path / "somewhere" / "else", tmp_path / "e", scorers=["sprites_proxy"])
    assert found["headline"]["verdict"] is not None
    assert "What training saw is not fully known. else: no run folder beside" in found["warnings"][0]


def run_folder(root: Path, config: dict[str, Any], name: str = "run") -> Path:
    """A run as `train` leaves it, as far as the search for its judges looks."""
    (root / name / "export").mkdir(parents=True)
    (root / name / "config.yaml").write_text(yaml.safe_dump(config))
    (root / name / "run.json").write_text("{}")
    return root / name


def kinds_of(scorers: list[Any], seen: Seen, **named: Any) -> dict[str, str]:
    found = kinds(scorers, build_scorers(scorers), {"m": seen}, named.get("named", ()), named.get("ground_truth", ()))
    return {name: of["kind"] for name, of in found.items()}


def test_judges_are_found_wherever_training_met_them(tmp_path: Path) -> None:
    config = {
        "source": {"scorers": ["sprites_gold", {"name": "pixel", "of": "brightness"}]},
        "objective": {"name": "sum", "terms": [{"objective": {"score_weights": {"sprites_sparse": 0.5}}}]},
        "stop": {"metric": "samples/sprites_clip", "restore_best": True, "train_scorer": "sprites-proxy"},
    }
    run = run_folder(tmp_path, config)
    seen = seen_by(run / "export")
    assert [judge.name for judge in seen.judges] == [
        *("sprites_gold", "pixel", "sprites_sparse", "sprites_proxy", "sprites_clip")
    ]
    assert seen.gaps == [] and "chose the weights" in seen.judges[-1].why
    # a run that began where this one ended, and the stages of another
    later = run_folder(tmp_path, {"model": {"path": "hub/id", "lora": {"init": str(run / "export")}}}, "later")
    assert [judge.name for judge in seen_by(later / "export").judges] == [judge.name for judge in seen.judges]
    run_folder(tmp_path / "stages", {"stop": {"train_scorer": "a"}}, "stage-1")
    run_folder(tmp_path / "stages", {"stop": {"train_scorer": "b"}}, "stage-2")
    (tmp_path / "stages" / "export").mkdir()
    assert [judge.name for judge in seen_by(tmp_path / "stages" / "export").judges] == ["a", "b"]


def test_a_judge_is_found_however_its_name_is_spelled(tmp_path: Path) -> None:
    config = {"objective": {"score_weights": {"clip": 1.0, "hpsv2.1": 1.0, "sprites-gold": 1.0}}}
    names = [judge.name for judge in seen_by(run_folder(tmp_path, config) / "export").judges]
    assert names == ["clip_score", "hpsv2_1", "sprites_gold"]
    spelled = ("hpsv2.1", {"name": "imagereward"}, {"name": "x", "as": "v-1.0"}, "my.pkg-x:Thing")
    assert [scorer_key(spec) for spec in spelled] == ["hpsv2_1", "image_reward", "v_1_0", "my.pkg_x:Thing"]


def test_another_scorer_of_the_same_name_is_told_apart_where_it_can_be_built() -> None:
    bright, dark = ({"name": "pixel", "of": of} for of in ("brightness", "saturation"))
    seen = Seen([Judge("pixel", "source.scorers", bright)])
    assert kinds_of([{**bright, "as": "mine"}], seen) == {"mine": "train"}
    assert kinds_of([dark], seen) == {"pixel": "held-out"}
    assert kinds_of([dark], Seen([Judge("pixel", "labelled", None)])) == {"pixel": "train"}  # not known to be another
    gone = Judge("pixel", "source.scorers", {"name": "pixel", "of": "gone"})  # cannot be built here
    assert kinds_of([dark], Seen([gone])) == {"pixel": "train"}
    assert kinds_of([{"name": "weighted", "scorers": ["sprites_gold", bright]}], seen) == {"weighted": "train"}
    # renamed in the labels: its fingerprint gives it away
    print_of = scorer_fingerprint(build_scorers([bright])["pixel"])
    assert kinds_of([bright], Seen([Judge("favourite", "labelled", None, print_of)])) == {"pixel": "train"}


def test_who_is_named_is_a_training_reward_and_ground_truth_stays_a_judge() -> None:
    seen = Seen([Judge("sprites_gold", "labelled pairs")])
    assert kinds_of(["sprites_gold"], seen, ground_truth=["sprites_gold"]) == {"sprites_gold": "ground truth"}
    named = {"ground_truth": ["sprites_gold"], "named": ["sprites-gold"]}
    assert kinds_of(["sprites_gold"], seen, **named) == {"sprites_gold": "train"}
    assert kinds_of(["sprites_gold"], Seen(), ground_truth=["sprites_gold"]) == {"sprites_gold": "held-out"}


def test_labels_of_nobody_and_data_that_is_gone_are_gaps(tmp_path: Path) -> None:
    lines: dict[str, Any] = {
        "people": {"prompt": "p", "meta": {"label": "votes"}},
        "jury": {"prompt": "p", "meta": '{"label": "singles by a, b (jury)"}'},
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    for name in ("people", "gone", "jury"):
        run_folder(tmp_path, {"source": {"data": {"path": str(tmp_path / f"{name}.jsonl")}}}, name)
    assert "name no scorer as their judge" in seen_by(tmp_path / "people" / "export").gaps[0]
    assert "is not here" in seen_by(tmp_path / "gone" / "export").gaps[0]
    jury = seen_by(tmp_path / "jury")
    assert [judge.name for judge in jury.judges] == ["a", "b"] and jury.gaps == []


def test_several_models_share_prompts_and_one_correction(adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [(EVIL, "odd"), ("a red circle", "plain"), ("a blue square", "plain")]
    prompts.write_text("".join(json.dumps({"prompt": text, "category": kind}) + "\n" for text, kind in rows))
    light, dark = ({"name": "pixel", "of": of, "as": of} for of in ("brightness", "saturation"))
    settings: dict[str, Any] = {
        "prompts": str(prompts),
        "scorers": [light, dark],
        "seeds": 4,
        "models": ["sprites-sd3"],
    }
    result, found = judged(adapter, tmp_path / "e", **settings)
    assert result.comparison.models == ("base", "run", "sprites-sd3")
    assert found["headline"]["num_comparisons"] == 4 and len(found["comparison"]["pairs"]) == 3 * 2
    assert result.comparison.num_images == 12 and result.comparison.num_prompts == 3  # one prompt, four pictures
    assert found["comparison"]["categories"] == ["odd", "plain"]
    assert found["facts"]["prompts"]["num"] == 3 and len(found["facts"]["prompts"]["sha256"]) == 64
    assert found["facts"]["sampling"] == {"sampler": "default", "steps": 2, "CFG": 1.0, "eta": 0.0}
    assert found["facts"]["resolution"] == "64 x 64" and found["facts"]["seed"] == 1000
    base, own, other = found["spread"]["rows"]
    assert base["drift"] is None and base["vendi_change"] is None and 1 <= base["vendi"]["mean"] <= 4
    assert 0 < own["drift"]["mean"] < other["drift"]["mean"] and own["pixel_drift"]["num"] == 3
    page, text = ((tmp_path / "e" / name).read_text() for name in ("report.html", "report.md"))
    assert "<script" not in page + text and "&lt;script&gt;" in page
    assert "Every model against every other" in page and "By category" in page and "Diversity and drift" in page
    assert "row against column" in text and all(line.count("|") >= 4 for line in text.splitlines() if line[:1] == "|")


def test_a_picture_that_is_not_of_these_prompts_is_refused(tmp_path: Path) -> None:
    row = {"file": "f.png", "prompt": "a", "prompt_id": 0, "number": 0, "seed": 0}
    for name, numbers in (("base", (0, 1)), ("other", (0,))):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps({**row, "number": number}) + "\n" for number in numbers)
        (tmp_path / name / "manifest.jsonl").write_text(lines)
    folders = {name: tmp_path / name for name in ("base", "other")}
    with pytest.raises(UserError, match="other holds 1 pictures, and not those of 1 prompts x 2 seeds"):
        same_rows(folders, ["a"], 2)
    assert len(same_rows({"base": tmp_path / "base"}, ["a"], 2)) == 2


@dataclass
class Counting:
    """Brightness, and how often it was asked; `dies_after` so many pictures it is killed."""

    info: ClassVar[ScorerInfo] = ScorerInfo("counting", "1", ("image",), "grey levels", (0.0, 255.0))
    asked: int = field(default=0, init=False)
    dies_after: int = field(default=10**9, init=False)

    def score(self, images: Any, prompts: Any) -> np.ndarray:
        if self.asked >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += len(images)
        return np.array([np.asarray(image.convert("L")).mean() for image in images], np.float32)


@pytest.mark.parametrize("cache", [True, False])
def test_a_killed_evaluation_does_not_score_again(cache: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", [[grey(10 * p + k, 16 + p) for k in range(2)] for p in range(3)])
    scorer, settings = Counting(), Score(cache=cache, cache_dir=str(tmp_path / "cache"), batch_size=2, workers=1)
    scorer.dies_after = 4
    with pytest.raises(KeyboardInterrupt):
        score_folder(folder, {"c": scorer}, settings, World(), "m", True)
    assert scorer.asked == 4
    scorer.dies_after = 10**9
    found = score_folder(folder, {"c": scorer}, settings, World(), "m", True)
    assert found["c"].tolist() == [0, 1, 10, 11, 20, 21] and scorer.asked == 6
    again = score_folder(folder, {"c": scorer}, settings, World(), "m", True)
    assert again["c"].tolist() == found["c"].tolist() and scorer.asked == (6 if cache else 12)
    assert not list(folder.glob("*.sqlite*")) and (tmp_path / "cache").exists() == cache


@pytest.mark.slow
def test_two_processes_come_to_what_one_does(adapter: Path, tmp_path: Path) -> None:
    """Pictures, scores, win rates, diversity and report; what differs is where it ran and for how long."""
    settings = {
        "evaluate.prompts": "sprites:heldout:5:two",
        "evaluate.adapters": f"[{adapter}]",
        "evaluate.scorers": "[sprites_gold,sprites_sparse]",
        "evaluate.features": "sprites_clip",
        "evaluate.seeds": 2,
        "sampling.num_steps": 2,
        "sampling.cfg_scale": 1.0,
        "sampling.batch_size": 3,
        "score.batch_size": 2,
        "score.cache": "false",  # so that both must also part from the file that they share
    }
    found: list[dict[str, Any]] = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = [f"{key}={value}" for key, value in settings.items()]
        result = run_cli("evaluate", "--quiet", "sprites-sdxl", *words, f"evaluate.out={out}", processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("report: ") == 1  # said once
        found.append(json.loads((out / "results.json").read_text()))
        assert (out / "report.html").is_file() and (out / "grid.png").is_file()
        assert not list(out.rglob("*.sqlite*")) and not list(out.rglob("*.tmp"))
    one, two = found
    for name in ("comparison", "spread", "scorers", "warnings", "headline"):
        assert one[name] == two[name], name
    pictures = sorted((tmp_path / "1" / "images").rglob("*.png"))
    assert len(pictures) == 20
    for file in pictures:
        assert file.read_bytes() == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()


def test_what_cannot_be_read_or_judged_is_one_line_every_time(tmp_path: Path) -> None:
    folder, settings = folder_of(tmp_path / "images", [[grey(1)], [grey(2)]]), Score(cache_dir=str(tmp_path / "cache"))
    gold = build_scorers(["sprites_gold"])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match="scorer sprites_gold, 0-0.png: .*prompt 0"):
            score_folder(folder, gold, settings, World(), "m", True)
    (folder / "1-0.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(UserError, match="1-0.png: .*; make the picture again or leave it out"):
            score_folder(folder, {"c": Counting()}, settings, World(), "m", True)


def test_a_prompt_that_cannot_be_judged_is_no_fault_of_the_picture(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", [[grey(1)]])
    gold, settings = build_scorers(["sprites_gold"]), Score(cache_dir=str(tmp_path / "cache"))
    row = json.loads((folder / "manifest.jsonl").read_text())
    for prompt, why in ((" ", "sprites_gold: the prompt is empty$"), ("a red circle " * 800, "not a sprites caption")):
        (folder / "manifest.jsonl").write_text(json.dumps(row | {"prompt": prompt}) + "\n")
        with pytest.raises(UserError, match=why) as error:
            score_folder(folder, gold, settings, World(), "m", True)
        assert "make the picture again" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "more, message",
    [
        ("evaluate.prompts=partiprompts", "evaluate.prompts: partiprompts needs a path"),
        ("evaluate.features=sprites_gold", "evaluate.features: sprites_gold has no picture features"),
        ("evaluate.models=[sprites-sd4]", "no config named 'sprites-sd4'"),
        ("evaluate.names=[a]", "evaluate.names holds 1 names for 0 adapters"),
        ("evaluate.seeds=0", "evaluate.seeds must be at least 1"),
        ("evaluate.scorers=[]", "evaluate.scorers is empty"),
    ],
)
def test_bad_settings_are_one_line_before_anything_is_made(
    more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sprites-sdxl", "evaluate.prompts=smoke", f"evaluate.out={tmp_path / 'e'}", more]
    assert main(["evaluate", "--quiet", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "e").exists()


def test_names_of_models() -> None:
    assert model_names(("runs/a/export",), (), ("sprites-sd3", "x/mine.yaml")) == ["base", "a", "sprites-sd3", "mine"]
    with pytest.raises(UserError, match="1 names for 1 adapters and 1 models"):
        model_names(("a",), ("x",), ("b",))


def grey(value: int, side: int = 16) -> Image.Image:
    return Image.new("RGB", (side, side), (value, value, value))


def folder_of(path: Path, images: list[list[Image.Image]]) -> Path:
    """A manifest with these pictures per prompt."""
    path.mkdir()
    rows = []
    for p, pictures in enumerate(images):
        for k, image in enumerate(pictures):
            image.save(path / f"{p}-{k}.png")
            rows.append({"file": f"{p}-{k}.png", "prompt": f"prompt {p}", "prompt_id": p, "number": k, "seed": 0})
    (path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Directions:
    """Picture features whose closed forms are known: one axis per grey value."""

    about = {"name": "axes"}

    def embed(self, images: Any) -> torch.Tensor:
        return torch.eye(8, dtype=torch.float64)[[image.getpixel((0, 0))[0] for image in images]]

    kernel, distance = spreads.TowerLooks.kernel, spreads.TowerLooks.distance


def test_diversity_and_drift_have_their_closed_forms(tmp_path: Path) -> None:
    same = folder_of(tmp_path / "same", [[grey(p)] * 4 for p in range(3)])
    other = folder_of(tmp_path / "other", [[grey(k) for k in range(4)] for _ in range(3)])
    found = spreads.spread({"same": same, "other": other}, "same", Directions(), level=0.95, seed=0, quiet=True)
    base, row = found.rows
    assert base.vendi is not None and base.vendi.mean == pytest.approx(1)  # four equal pictures
    assert row.vendi is not None and row.vendi.mean == pytest.approx(4)  # four orthogonal ones
    assert base.vendi_over_prompts == pytest.approx(3) and row.vendi_over_prompts == pytest.approx(1)
    assert row.vendi_change is not None and row.vendi_change.mean == pytest.approx(3)
    assert base.distance is not None and base.distance.mean == pytest.approx(0)
    assert row.distance is not None and row.distance.mean == pytest.approx(1)
    assert row.drift is not None and row.drift.mean == pytest.approx(0.75)  # one picture of four is the baseline's
    expected = np.mean([abs(p - k) for p in range(3) for k in range(4)])
    assert row.pixel_drift is not None and row.pixel_drift.mean == pytest.approx(expected)
    assert base.drift is None and found.num_prompts == 3


def test_one_picture_per_prompt_has_diversity_over_prompts_only(tmp_path: Path) -> None:
    small = folder_of(tmp_path / "small", [[grey(10)], [grey(200)]])
    large = folder_of(tmp_path / "large", [[grey(10, 32)], [grey(200, 32)]])
    looks = spreads.PixelLooks()
    base, row = spreads.spread({"a": small, "b": large}, "a", looks, level=0.95, seed=0, quiet=True).rows
    assert base.vendi is None and base.distance is None and 1 < base.vendi_over_prompts < 2
    assert row.drift is not None and row.drift.mean == pytest.approx(0) and row.pixel_drift is None  # other sizes


def test_pixel_looks_are_the_diagnostics_kernel() -> None:
    from diffalign.diagnostics import pixel_kernel

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    looks = spreads.PixelLooks()
    x = looks.embed([Image.fromarray(array) for array in pixels])
    assert torch.allclose(looks.kernel(x), pixel_kernel(pixels), atol=1e-12)
    assert torch.allclose(looks.distance(x[:1], x), (-torch.log(looks.kernel(x)[0]) * 2 * 0.25**2).sqrt(), atol=1e-9)


def test_tower_looks_are_unit_features_of_a_clip_scorer() -> None:
    looks = spreads.looks_of({"name": "sprites_clip", "device": "cpu", "batch_size": 2}, {})
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]
    x = looks.embed(pictures)
    assert x.shape[0] == 3 and torch.allclose(x.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert looks.about["name"] == "sprites_clip" and looks.about["version"]
    assert torch.allclose(looks.distance(x, x), torch.zeros(3, dtype=torch.float64), atol=1e-9)
