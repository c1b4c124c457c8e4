"""What a stage sees: every pair in exactly one stage, monotone in the gap, the same whatever else happens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import picture

from diffalign.data import RecordWriter
from diffalign.data._gaps import signed_gap
from diffalign.registry import build
from diffalign.sources._part import Part, rows_of, stages_of
from diffalign.types import Record, Setting, UserError

EASES = st.lists(st.floats(-100, 100), min_size=1, max_size=60)


@settings(deadline=None)
@given(EASES, st.integers(1, 7))
def test_quantiles_divide_evenly_and_fall_in_ease(eases, num):
    ease = np.array(eases)
    stages = stages_of(ease, num)
    sizes = [int((stages == stage).sum()) for stage in range(1, num + 1)]
    assert sum(sizes) == len(ease) and max(sizes) - min(sizes) <= 1
    for stage in range(1, num):
        here, later = ease[stages == stage], ease[stages > stage]
        assert not len(here) or not len(later) or here.min() >= later.max()


@settings(deadline=None)
@given(EASES, st.integers(1, 7), st.integers(1, 5))
def test_prompts_divide_each_prompts_pairs(eases, num, num_prompts):
    ease = np.array(eases)
    prompts = np.arange(len(ease)) % num_prompts * 2**60
    stages = stages_of(ease, num, prompts)
    assert set(stages) <= set(range(1, num + 1))
    for prompt in np.unique(prompts):
        mine = prompts == prompt
        in_order = stages[mine][np.argsort(-ease[mine], kind="stable")]
        assert (np.diff(in_order) >= 0).all()  # within a prompt the ease falls from stage to stage
        if mine.sum() == num:
            assert in_order.tolist() == list(range(1, num + 1))  # Curry-DPO: the s-th largest gap in stage s


def test_gaps_have_the_labels_sign():
    utility = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    scores = np.array([[3.0, 1.0], [3.0, 1.0], [3.0, 1.0], [1.0, 3.0]])
    assert signed_gap(utility, scores).tolist() == [2.0, -2.0, 0.0, -2.0]


class Data:
    """What `rows_of` asks of a data set."""

    prompt_keys = np.arange(12) // 3

    def gaps(self, rows, by):
        assert by == "judge"
        return by, np.array([7.0, 3.0, 5.0] * 4)[rows]


@pytest.mark.parametrize("order", ["easy-to-hard", "hard-to-easy", "random"])
@pytest.mark.parametrize("split", ["quantiles", "prompts"])
def test_every_row_is_in_exactly_one_stage(order, split):
    rows = np.array([0, 1, 2, 3, 4, 5, 9, 10, 11])
    by = None if order == "random" else "judge"
    parts = [rows_of(Part(stage, 3, order, by, split), Data(), rows, seed=0) for stage in (1, 2, 3)]
    assert sorted(np.concatenate([part for part, _ in parts]).tolist()) == rows.tolist()
    if order != "random":
        gaps = [facts["part"]["gap"]["mean"] for _, facts in parts]
        assert gaps == ([7.0, 5.0, 3.0] if order == "easy-to-hard" else [3.0, 5.0, 7.0])
    again = rows_of(Part(2, 3, order, by, split), Data(), rows, seed=0)[0]
    assert again.tolist() == parts[1][0].tolist()


def test_more_stages_than_pairs():
    with pytest.raises(UserError, match="stage 2 of 3 has no pair"):
        rows_of(Part(2, 3, "easy-to-hard", "judge"), Data(), np.array([4]), seed=0)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("part")
    with RecordWriter(root / "pairs") as writer:
        for index in range(6):
            images, scores = (picture(2 * index, 200), picture(2 * index + 1, 60)), (0.1 * index, 1.0)
            utility = (0.0, 1.0) if index % 2 else (1.0, 0.0)
            graded = {"judge": scores, "other": (float(index), 0.0)}
            writer.write(Record(0, f"thing {index}", images, utility, scores=graded))
    return root


@pytest.fixture(scope="module", params=[True, False], ids=["cached", "fresh"])
def data(request, records, tiny_folders):
    model = build("model", {"name": "sd15", "path": str(tiny_folders["sd15"])}).load()
    spec = {"name": "offline", "data": {"path": str(records / "pairs")}, "cache_dir": str(records / "cache")}
    source = build("source", spec | {"holdout": 0.0, "cache": request.param})
    return source.prepare(model, None, Setting(0, 1, 1)).data


def test_gaps_come_from_the_records(data):
    expected = [(1 - 0.1 * index) * (1 if index % 2 else -1) for index in range(6)]
    column, gaps = data.gaps(np.arange(6), "judge")
    assert column == "judge" and gaps == pytest.approx(expected)
    assert data.gaps(np.array([5, 2]), "judge")[1] == pytest.approx([expected[5], expected[2]])
    for by, match in (
        (None, "several scorers"),
        ("jugde", "not every record has scores"),
        ("utility", "all pairs have the same gap"),
    ):
        with pytest.raises(UserError, match=match):
            data.gaps(np.arange(6), by)
