"""The rules of a selection: thresholds, shares, ties and reserves; and what is refused, by its key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffalign.config import resolve
from diffalign.recipes.generate._select import Selection, selection_of
from diffalign.recipes.generate._select_paths import Verdicts
from diffalign.sections import Generate
from diffalign.types import UserError

NAN = float("nan")
BRIGHT = {"name": "sprites_gold"}  # never called here


def verdicts(n: int, rows: int = 1, **how: Any) -> Verdicts:
    return Verdicts(Selection(**{"checks": (0.3, 0.6), **how}), rows, n)


def alive(found: Verdicts) -> list[int]:
    return np.flatnonzero(found.is_alive[0]).tolist()


def test_a_threshold_drops_and_the_best_rejected_one_stays_until_another_passes():
    found = verdicts(4, clarity=(BRIGHT,), clear_from=0.5, potential_from=0.8)
    found.set_clarity(found.to_clear(), np.array([0.6, 0.7, 0.1, NAN]))
    assert np.flatnonzero(found.to_ask()[0]).tolist() == [0, 1]
    found.set_potential(found.to_ask(), np.array([0.3, 0.4]))
    found.prune(0)
    assert alive(found) == [1, 2, 3]  # 1 is in reserve, 2 and 3 are not clear yet
    found.set_clarity(found.to_clear(), np.array([0.9, 0.2]))
    assert np.flatnonzero(found.to_ask()[0]).tolist() == [2]  # the verdict on 1 stays
    found.set_potential(found.to_ask(), np.array([0.35]))
    found.prune(1)
    assert alive(found) == [1]  # nobody passed: most potential; 3 was never clear


def test_one_that_passes_ends_the_reserve():
    found = verdicts(3, clarity=(BRIGHT,), clear_from=0.5, potential_from=0.8)
    found.set_clarity(found.to_clear(), np.array([0.6, 0.1, 0.1]))
    found.set_potential(found.to_ask(), np.array([0.7]))
    found.prune(0)
    found.set_clarity(found.to_clear(), np.array([0.6, 0.6]))
    found.set_potential(found.to_ask(), np.array([0.8, 0.1]))
    found.prune(1)
    assert alive(found) == [1]


def test_where_nothing_was_ever_clear_the_clearest_goes_on():
    found = verdicts(3, clarity=(BRIGHT,), clear_from=0.5)
    for check, scores in enumerate([[0.1, 0.4, NAN], [0.2, 0.1, NAN]]):
        found.set_clarity(found.to_clear(), np.array(scores))
        assert not found.to_ask().any()
        found.prune(check)
    assert alive(found) == [0]


def test_keep_is_a_share_of_all_candidates_and_nan_potential_goes_first():
    found = verdicts(5, keep=(0.4, 0.2))
    found.set_potential(found.to_ask(), np.array([0.1, NAN, 0.5, 0.5, 0.5]))
    found.prune(0)
    assert alive(found) == [2, 3]
    assert not found.to_ask().any()
    found.prune(1)
    assert alive(found) == [2]
    nothing = verdicts(3)
    nothing.set_potential(nothing.to_ask(), np.array([NAN, NAN, NAN]))
    nothing.prune(0)
    assert alive(nothing) == [0]


# What is refused


@pytest.mark.parametrize(
    "settings,match",
    [
        (["generate.select=best-of-n"], r"generate\.scorers is missing"),
        (["generate.scorers=[sprites_gold]"], r"generate\.scorers select nothing"),
        (["generate.candidates=0"], r"generate\.candidates must be at least 1"),
        (["generate.select=best-of-n", "generate.scorers=[sprites_gold]", "generate.weights=[1, 2]"], "weights has 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_they_are_read(settings, match):
    with pytest.raises(UserError, match=match):
        resolve(settings)


@pytest.mark.parametrize(
    "select,match",
    [
        ("best", r"generate\.select\.name='best'.*Legal: best-of-n, parm"),
        ({"name": "parm", "chekcs": [0.5]}, r"generate\.select\.chekcs.*Did you mean 'checks'"),
        ({"name": "parm", "checks": [0.5, 0.2]}, r"generate\.select\.checks must be rising"),
        ({"name": "parm", "checks": [1.0]}, r"generate\.select\.checks must be rising"),
        ({"name": "parm", "keep": [0.0]}, r"generate\.select\.keep must be a share"),
        ({"name": "parm", "keep": [0.5, 0.2]}, r"generate\.select\.keep must be a share"),
        ({"name": "parm", "clear_from": 0.5}, r"generate\.select\.clarity is missing"),
        ({"name": "parm", "clarity": ["sprites_gold"]}, r"generate\.select\.clear_from is missing"),
        ({"name": "parm", "potential": ["sprite_gold"]}, r"generate\.select\.potential: unknown scorer 'sprite_gold'"),
        ({"name": "parm", "reflect": "nowhere:it"}, r"generate\.select\.reflect=nowhere:it: cannot import"),
        ({"name": "parm", "reflect": "test_select_rules:NAN"}, "is not callable"),
        ({"name": "parm", "reflections": 0}, r"generate\.select\.reflections"),
        ({"name": "best-of-n", "checks": [0.5]}, r"generate\.select\.checks prunes"),
        ({"name": "best-of-n", "keep": [0.5]}, r"generate\.select\.checks is empty"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused_by_its_key(select, match):
    with pytest.raises(UserError, match=match):
        selection_of(Generate(select=select, scorers=("sprites_gold",)))


def test_scorers_of_one_name_and_steps_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"generate\.scorers names 'sprites_gold' twice"):
        selection_of(Generate(select="best-of-n", scorers=("sprites_gold", "sprites_gold")))
    for checks, num_steps in (((0.5,), 1), ((0.9,), 2), ((0.5, 0.6), 5)):
        with pytest.raises(UserError, match=rf"generate\.select\.checks=.*sampling\.num_steps={num_steps}"):
            Selection(checks=checks).steps(num_steps)
    assert Selection(checks=(0.1, 0.3, 0.5)).steps(30) == [2, 8, 14]  # 0.1 * 30 is above 3 in floats
