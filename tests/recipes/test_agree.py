"""Agreement of scorers with recorded rankings, from records to agree.json."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from makers import picture

from diffalign._json import read_json
from diffalign.config import Config
from diffalign.data import RecordWriter
from diffalign.recipes.agree import agree, summary
from diffalign.recipes.score import score
from diffalign.sections import Agree, Score
from diffalign.types import Record, ScorerInfo, UserError


@dataclass(frozen=True)
class Brightness:
    """Mean grey level, or the darker the better."""

    sign: float = 1.0

    info: ClassVar[ScorerInfo] = ScorerInfo("brightness", "1", ("image",), "level", (-255.0, 255.0))

    def score(self, images: list[Any], prompts: list[str]) -> np.ndarray:
        return np.array([self.sign * float(np.asarray(image, float).mean()) for image in images], np.float32)


BRIGHT, DARK = {"name": "test_agree:Brightness"}, {"name": "test_agree:Brightness", "as": "dark", "sign": -1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Lists of three images; people like bright ones, once not, and tie the darker two of every second list."""
    folder = tmp_path_factory.mktemp("agree")
    with RecordWriter(folder) as writer:
        for number in range(10):
            images = tuple(picture(3 * number + k, level, side=32) for k, level in enumerate((200, 120, 60)))
            utility = (2.0, 1.0, 1.0 if number % 2 else 0.0) if number else (0.0, 1.0, 2.0)
            writer.write(Record(0, f"thing {number}", images, utility))
    return {"path": str(folder)}


def go(out: Path, **settings: Any) -> dict[str, Any]:
    how = settings.pop("score", Score(cache=False))
    return read_json(agree(Config(agree=Agree(out=str(out), **settings), score=how), quiet=True))


def test_rules_over_records(data, tmp_path):
    scorers = ({**BRIGHT, "as": "bright"}, DARK)
    strict = go(tmp_path / "a", data=data, scorers=scorers)["scorers"]
    # 5 lists of 3 pairs, all wrong in one of them, and 5 of 2 pairs
    assert strict["bright"]["agreement"] == pytest.approx(22 / 25) and strict["bright"]["pairs"] == 25
    assert strict["dark"]["agreement"] == pytest.approx(3 / 25) and strict["bright"]["prompts"] == 10
    assert strict["bright"]["low"] < 22 / 25 < strict["bright"]["high"] <= 1
    by_prompt = go(tmp_path / "b", data=data, scorers=scorers, rule="hps-ir")["scorers"]
    assert by_prompt["bright"]["agreement"] == pytest.approx(0.9)
    inversions = go(tmp_path / "c", data=data, scorers=scorers, rule="hpdv2")["scorers"]
    assert inversions["dark"]["agreement"] == pytest.approx((1 + 5 / 3) / 10)  # ties count as right
    assert strict["bright"]["info"]["name"] == "brightness"
    assert "rule strict" in summary(tmp_path / "a" / "agree.json")[0]


def test_pickapic_fits_its_tie_gap_elsewhere(data, tmp_path):
    found = go(
        tmp_path / "fit", data=data, validation=data, scorers=(BRIGHT,), rule="pickapic", scale={BRIGHT["name"]: 0.01}
    )
    (of,) = found["scorers"].values()
    assert of["scale"] == 0.01 and 0 < of["tie_gap"] < 1 and of["pairs"] == 30
    fixed = go(tmp_path / "fixed", data=data, scorers=(BRIGHT,), rule="pickapic", tie_gap=1.0)
    assert next(iter(fixed["scorers"].values()))["agreement"] == pytest.approx(
        (5 * 1 + 25 * 0.5) / 30
    )  # ties everywhere
    with pytest.raises(UserError, match="give agree.tie_gap, or records in agree.validation"):
        Agree(data=data, rule="pickapic")


@dataclass(frozen=True)
class Choosy(Brightness):
    """Gives NaN for one prompt, refuses another."""

    info: ClassVar[ScorerInfo] = ScorerInfo("choosy", "1", ("image", "prompt"), "level", (-255.0, 255.0))

    def score(self, images: list[Any], prompts: list[str]) -> np.ndarray:
        if "thing 3" in prompts:
            raise ValueError("not this one")
        return np.where([prompt == "thing 5" for prompt in prompts], np.nan, super().score(images, prompts))


def test_what_a_scorer_cannot_judge_is_left_out_for_it_and_counted(data, tmp_path):
    choosy = {"name": "test_agree:Choosy", "as": "choosy"}
    found = go(tmp_path, data=data, scorers=({**BRIGHT, "as": "bright"}, choosy))["scorers"]
    assert found["bright"]["unjudged"] == 0 and found["bright"]["pairs"] == 25
    assert found["choosy"]["unjudged"] == 2 and found["choosy"]["prompts"] == 8
    assert found["choosy"]["pairs"] == 25 - 2 * 2 and found["choosy"]["agreement"] == pytest.approx(18 / 21)
    assert "choosy: 2 records not judged, left out" in summary(tmp_path / "agree.json")


@dataclass(frozen=True)
class Counted(Brightness):
    """Brightness, and how many pictures it was asked about."""

    asked: ClassVar[list[int]] = []

    def score(self, images: list[Any], prompts: list[str]) -> np.ndarray:
        self.asked.append(len(images))
        return super().score(images, prompts)


def test_nothing_is_scored_twice(data, tmp_path):
    """Not by a second run, not by a fit on the same records, and not after `score` of the same pictures and prompts."""
    counted, cache = {"name": "test_agree:Counted", "as": "counted"}, Score(cache_dir=str(tmp_path / "cache"))
    Counted.asked.clear()
    first = go(tmp_path / "a", data=data, scorers=(counted,), score=cache)
    again = go(tmp_path / "b", data=data, scorers=(counted,), rule="pickapic", validation=data, score=cache)
    assert sum(Counted.asked) == 30 and first["scorers"]["counted"]["pairs"] == 25
    assert again["scorers"]["counted"]["pairs"] == 30
    Counted.asked.clear()
    go(tmp_path / "c", data=data, scorers=(counted,), rule="pickapic", validation=data)  # without a cache of all runs
    assert sum(Counted.asked) == 30 and [path.name for path in (tmp_path / "c").iterdir()] == ["agree.json"]
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(picture(0, 250, side=32))
    (images / "manifest.jsonl").write_text('{"file": "0.png", "prompt": "x", "prompt_id": 0, "number": 0}\n')
    score(Config(score=replace(cache, images=str(images), scorers=(counted,))), quiet=True)
    with RecordWriter(tmp_path / "more") as writer:
        writer.write(Record(0, "x", (picture(0, 250, side=32), picture(1, 60, side=32)), (1.0, 0.0)))
    Counted.asked.clear()
    go(tmp_path / "d", data={"path": str(tmp_path / "more")}, scorers=(counted,), score=cache)
    assert Counted.asked == [1]


def test_refusals(data, tmp_path):
    with pytest.raises(UserError, match="agree.data.path is missing"):
        go(tmp_path, scorers=(BRIGHT,))
    with pytest.raises(UserError, match="agree.scale: nobody is none of agree.scorers"):
        go(tmp_path, data=data, scorers=(BRIGHT,), scale={"nobody": 1.0})
    with RecordWriter(tmp_path / "single") as writer:
        writer.write(Record(0, "thing", (picture(0, 100),), (1.0,)))
    with pytest.raises(UserError, match="no pair that the rule strict counts"):
        go(tmp_path, data={"path": str(tmp_path / "single")}, scorers=(BRIGHT,))
