"""The judge of a rollout: who wins by one scorer or several, and what becomes of scorers that fail."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.sources._judge import Judge, standardised
from diffalign.types import ScorerInfo, UserError

NAN = float("nan")
MAXIMIN = [[0.9, 0.2], [0.7, 0.6], [0.1, 0.8], [0.2, 0.3]]  # the published check: row 2 against row 4


@dataclass
class Scripted:
    """Gives `values`, after raising `errors` in turn and sleeping."""

    values: tuple[float, ...] = (1.0, 2.0)
    errors: int = 0
    kind: str = "ConnectionError"
    seconds: float = 0.0
    shape: str = "list"
    calls: ClassVar[list[str]] = []
    info: ClassVar[ScorerInfo] = ScorerInfo("scripted", "1", ("image",), "none", (0.0, 1.0))
    failed: int = field(default=0, init=False)

    def score(self, images: list[Any], prompts: list[str]) -> Any:
        self.calls.append(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.failed < self.errors:
            self.failed += 1
            raise {"ConnectionError": ConnectionError, "ValueError": ValueError, "TimeoutError": TimeoutError}[
                self.kind
            ]("the server\n  is away")
        return {
            "list": list(self.values),
            "tensor": torch.tensor(self.values, requires_grad=True),
            "bfloat16": torch.tensor(self.values, dtype=torch.bfloat16),
            "array": np.array(self.values),
            "column": np.array(self.values)[:, None],
        }[self.shape]


@pytest.fixture(autouse=True)
def no_calls():
    Scripted.calls.clear()


def scripted(**fields: Any) -> dict[str, Any]:
    return {"name": "test_judge:Scripted", **fields}


def judge(
    *scorers: Any, weights: Any = (), prefer: Any = "sum", timeout: float | None = 5.0, num: int | None = None
) -> Judge:
    """With `num` a judge of scores that are given: nothing is asked."""
    if num is not None:
        scorers = tuple(scripted(**{"as": f"scorer {index}"}) for index in range(num))
    return Judge(scorers, weights, prefer, timeout)


def array(rows: Any) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def ask(*scorers: Any, timeout: float | None = 5.0, num: int = 2) -> np.ndarray:
    pictures = [Image.new("RGB", (4, 4))] * num
    return judge(*scorers, timeout=timeout).score(pictures, ["a thing"] * num)


# What is preferred


def test_the_sum_is_weighted():
    scores = array([[1, 0], [0, 1], [0.6, 0.6]])
    assert judge(num=2).utility(scores) == pytest.approx([1, 1, 1.2])
    assert judge(num=2, weights=(3.0, -1.0)).utility(scores) == pytest.approx([3, -1, 1.2])
    assert judge(num=2).pairs(scores, "best-worst", 0.0) == [(2, 0)]
    assert judge(num=2, weights=(3.0, -1.0)).pairs(scores, "best-worst", 0.0) == [(0, 1)]


def test_all_pairs_differ_by_more_than_the_margin():
    scores = array([[0], [1], [1.5]])
    assert judge(num=1).pairs(scores, "all", 0.0) == [(1, 0), (2, 0), (2, 1)]
    assert judge(num=1).pairs(scores, "all", 0.5) == [(1, 0), (2, 0)]  # 0.5 itself is not more
    assert judge(num=1).pairs(scores, "best-worst", 1.5) == []
    assert judge(num=1).pairs(array([[1], [1], [1]]), "all", 0.0) == []


def test_pareto_takes_pairs_that_no_scorer_disputes():
    scores = array([[2, 1], [1, 2], [1, 1], [0, 0]])
    by = judge(num=2, prefer="pareto")
    assert by.pairs(scores, "all", 0.0) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert by.pairs(scores, "best-worst", 0.0) == [(0, 3)]
    assert by.pairs(scores, "all", 1.0) == [(0, 3), (1, 3)]  # somewhere better by more than that
    weighted = judge(num=2, weights=(1.0, 3.0), prefer="pareto")
    assert weighted.pairs(scores, "best-worst", 0.0) == [(1, 3)]
    # a negative weight turns a scorer round: less of it is better
    assert judge(num=2, weights=(1.0, -1.0), prefer="pareto").pairs(scores, "all", 0.0) == [(0, 1), (0, 2), (2, 1)]


def test_maximin_is_the_published_check():
    scores = array(MAXIMIN)
    by = judge(num=2, prefer="maximin")
    assert by.pairs(scores, "best-worst", 0.0) == [(1, 3)]
    assert int(by.utility(scores).argmax()) == 1
    assert by.pairs(5 * scores - 3, "best-worst", 0.0) == [(1, 3)]
    assert by.pairs(scores * [100, 1], "best-worst", 0.0) == [(1, 3)]  # units do not matter


def test_maximin_with_one_scorer_is_best_and_worst():
    scores = array([[0.3], [0.9], [0.1], [0.5]])
    assert judge(num=1, prefer="maximin").pairs(scores, "best-worst", 0.0) == [(1, 2)]
    assert judge(num=1, prefer="maximin").pairs(array([[1], [1]]), "best-worst", 0.0) == []
    every = judge(num=1, prefer="maximin").pairs(scores, "all", 0.0)
    assert every == judge(num=1).pairs(scores, "all", 0.0) and len(every) == 6


@dataclass(frozen=True)
class Circle:
    """Compares embeddings, given as grey levels: 40 levels are a third of a turn, and each third beats the next."""

    info: ClassVar[ScorerInfo] = ScorerInfo("circle", "1", ("image", "prompt"), "none", (0.0, 1.0))
    dim: ClassVar[int] = 2

    def represent(self, images: list[Any], prompts: list[str]) -> torch.Tensor:
        turns = torch.tensor([image.getpixel((0, 0))[0] / 120 for image in images]) * 2 * torch.pi
        return torch.stack([turns.cos(), turns.sin()], dim=1)

    @staticmethod
    def win_table(v: torch.Tensor) -> np.ndarray:
        return torch.sigmoid(3 * (v[:, None, 0] * v[None, :, 1] - v[:, None, 1] * v[None, :, 0])).numpy()


CIRCLE = {"name": "test_judge:Circle", "as": "circle"}


@pytest.mark.filterwarnings("error")
def test_pairwise_compares_the_embeddings_of_a_prompt():
    by = judge(CIRCLE, prefer="pairwise")
    pictures = [Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 40, 80, 10)]
    scores = by.score(pictures, ["a thing"] * 4)
    assert scores.shape == (4, 2) and by.names == ["circle_0", "circle_1"] and list(by.scorers) == ["circle"]
    assert by.pairs(scores[:3], "all", 0.0) == [(0, 1), (1, 2), (2, 0)]  # no order has these
    chance = 1 / (1 + math.exp(-3 * math.sin(2 * math.pi / 3)))
    assert by.pairs(scores[:3], "all", 2 * chance - 1 + 1e-4) == [] and by.pairs(scores[:3], "all", 2 * chance - 1.001)
    assert by.utility(scores[:3]) == pytest.approx([0.5] * 3, abs=1e-6)
    assert by.utility(scores[:2]) == pytest.approx([chance, 1 - chance], abs=1e-6)
    assert by.pairs(scores[:2], "best-worst", 0.0) == [(0, 1)]
    # candidates without an embedding are left out, of the others' win rates too
    scores[2] = NAN
    utility = by.utility(scores)
    assert np.isnan(utility[2]) and utility[[0, 1, 3]] == pytest.approx(by.utility(scores[[0, 1, 3]]))
    assert by.pairs(scores, "all", 0.0) == [(0, 1), (0, 3), (3, 1)] and by.pairs(scores[2:], "all", 0.0) == []
    assert by.utility(scores[2:])[1] == 0 and np.isnan(by.utility(scores[2:3])).all()


def test_who_compares_and_who_scores_are_not_mixed():
    for match, scorers, settings in (
        ("circle compares pictures and has no scores: source.prefer=pairwise", [CIRCLE], {}),
        ("circle compares pictures", [scripted(), CIRCLE], {"prefer": "maximin"}),
        ("scores pictures one by one", [scripted()], {"prefer": "pairwise"}),
        ("takes one scorer, and no weights", [CIRCLE, {**CIRCLE, "as": "other"}], {"prefer": "pairwise"}),
        ("takes one scorer, and no weights", [CIRCLE], {"prefer": "pairwise", "weights": (1.0,)}),
    ):
        with pytest.raises(UserError, match=match):
            judge(*scorers, **settings)


def test_standardised_columns():
    made = standardised(np.array([[1.0, 5], [2, 5], [3, 5]]))
    assert made.mean(axis=0) == pytest.approx([0, 0]) and made.std(axis=0) == pytest.approx([1, 0])


@pytest.mark.parametrize("prefer", ["sum", "pareto", "maximin"])
@pytest.mark.parametrize("rule", ["best-worst", "all"])
@pytest.mark.filterwarnings("error")
def test_candidates_without_a_score_are_left_out(prefer, rule):
    """With their rows put in between, the same pairs as without them."""
    by = judge(num=2, prefer=prefer)
    places = [1, 3, 4, 6]
    scores = np.full((7, 2), np.nan, dtype=np.float32)
    scores[places] = array(MAXIMIN)
    scores[2] = [NAN, 50.0]  # one scorer's word is not enough, and counts in no mean
    wanted = [(places[w], places[loser]) for w, loser in by.pairs(array(MAXIMIN), rule, 0.0)]
    assert by.pairs(scores, rule, 0.0) == wanted and wanted
    utility = by.utility(scores)
    assert np.flatnonzero(np.isfinite(utility)).tolist() == places
    assert utility[places] == pytest.approx(by.utility(array(MAXIMIN)))
    nobody = np.full((3, 2), np.nan, dtype=np.float32)
    assert by.pairs(nobody, rule, 0.0) == [] and np.isnan(by.utility(nobody)).all()
    assert by.pairs(scores[:2], rule, 0.0) == []  # one judged candidate makes no pair


# Scorers that fail


def test_scores_are_columns_in_the_scorers_order():
    scores = ask(scripted(), scripted(values=(3.0, 4.0), **{"as": "other-one"}))
    assert scores.tolist() == [[1, 3], [2, 4]] and scores.dtype == np.float32
    assert judge(scripted(), scripted(**{"as": "other-one"})).names == ["test_judge:Scripted", "other_one"]


@pytest.mark.parametrize("shape", ["list", "tensor", "bfloat16", "array"])
def test_what_a_scorer_may_give(shape):
    assert ask(scripted(shape=shape)).tolist() == [[1], [2]]


def test_no_finite_number_is_nan():
    scores = ask(scripted(values=(NAN, float("inf"))), scripted(**{"as": "other"}))
    assert np.isnan(scores[:, 0]).all() and scores[:, 1].tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["ConnectionError", "TimeoutError"])
@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_scorer_that_raises_is_asked_again(kind, timeout):
    assert ask(scripted(errors=1, kind=kind), timeout=timeout).tolist() == [[1], [2]]
    assert len(Scripted.calls) == 2


def test_twice_is_an_error_of_one_line_that_says_how_to_go_on():
    with pytest.raises(RuntimeError, match="ConnectionError: the server is away; the same command resumes") as error:
        ask(scripted(errors=2))
    assert "\n" not in str(error.value) and not isinstance(error.value, UserError) and len(Scripted.calls) == 2


def test_refused_input_is_the_users_and_is_not_asked_again():
    with pytest.raises(UserError, match="scorer test_judge:Scripted: the server is away") as error:
        ask(scripted(errors=1, kind="ValueError"))
    assert "\n" not in str(error.value) and len(Scripted.calls) == 1


def test_a_scorer_that_hangs_is_left_behind():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer within 0.2 s \(source.scorer_timeout\)"):
        ask(scripted(seconds=3), timeout=0.2)
    assert time.monotonic() - begun < 2 and len(Scripted.calls) == 1  # a second call would hang as well


def test_a_process_whose_scorer_hangs_can_exit():
    code = "import time; from diffalign.sources._judge import within; within(0.1, lambda: time.sleep(600), 'it')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "it gave no answer within 0.1 s" in ended.stderr


@pytest.mark.parametrize("values", [(1.0,), (1.0, 2.0, 3.0), ()])
def test_another_number_of_scores_is_an_error(values):
    with pytest.raises(RuntimeError, match="for 2 images"):
        ask(scripted(values=values))


def test_a_column_instead_of_a_row_is_an_error():
    with pytest.raises(RuntimeError, match=r"shape \(2, 1\) for 2 images"):
        ask(scripted(shape="column"))


# Settings


def test_two_of_a_kind_want_two_names():
    with pytest.raises(UserError, match="twice: give one of them another name with `as`"):
        judge("sprites_gold", {"name": "sprites-gold"})
    assert judge("sprites_gold", {"name": "sprites-gold", "as": "second"}).names == ["sprites_gold", "second"]


@pytest.mark.parametrize(
    "scorers,options,match",
    [
        ((), {}, "source.scorers is empty"),
        (("sprites_glod",), {}, "Did you mean 'sprites_gold'"),
        (({"as": "x"},), {}, "scorer.name is missing"),
        (({"name": "sprites_gold", "sharpness": 2},), {}, "unknown key scorer.sharpness"),
        (("sprites_gold",), {"weights": (1.0, 2.0)}, "source.weights has 2 numbers for 1 scorers"),
        (("sprites_gold",), {"prefer": "maximum"}, "source.prefer='maximum'"),
    ],
)
def test_bad_settings_are_one_line(scorers, options, match):
    with pytest.raises(UserError, match=match) as error:
        judge(*scorers, **options)
    assert "\n" not in str(error.value)
