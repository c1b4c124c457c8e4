"""Labelling rules on their own: closed forms of each, ties, disagreement, drawn and soft labels."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from makers import picture
from PIL import Image

from diffalign.preference_rules import chosen_pairs, compare, is_decided, utility, vote_shares, win_probability
from diffalign.recipes.label._captions import perturbed
from diffalign.recipes.label._degrade import degrade, ladder
from diffalign.recipes.label._rules import choices, labelled
from diffalign.sections import Label
from diffalign.types import UserError

# Syn-Pic's worked example, scorers by rows
VOTES = [
    [0.31, 0.28, 0.25, 0.27],
    [11, 12, 9, 8],
    [22.1, 21.7, 21.9, 20.5],
    [0.9, 0.8, 0.85, 0.4],
    [1.2, 0.3, 0.5, -0.2],
]
MAXIMIN = [[0.9, 0.2], [0.7, 0.6], [0.1, 0.8], [0.2, 0.3]]
JURY = [[3, 3, 0], [2, 1, 1], [1, 2, 2]]  # by rows: 0 beats 1, 0 beats 2 and 2 beats 1, each by 2 votes to 1


def array(rows: object) -> np.ndarray:
    return np.array(rows, dtype=float)


def decided(values: np.ndarray, **settings: object) -> list[tuple[int, ...]]:
    made = choices(values, Label(**settings), (1.0,) * values.shape[1])
    return [choice.places for choice in made if choice.is_decided]


def of_one(*scores: float, **settings: object) -> list[tuple[int, ...]]:
    return decided(array([[score] for score in scores]), **settings)


def test_best_against_worst():
    assert of_one(0.2, 0.9, 0.1, 0.9) == [(1, 2)]
    assert of_one(0.5, 0.5) == []  # a tie is no pair
    assert of_one(0.5, 0.6, min_margin=0.2) == []


def test_all_pairs_put_the_winner_first():
    assert of_one(0.2, 0.9, 0.2, rule="all-pairs") == [(1, 0), (1, 2)]
    assert of_one(3.0, 2.0, 1.0, rule="all-pairs", min_margin=1.5) == [(0, 2)]


def test_the_best_against_each_other_one_largest_gap_first():
    assert of_one(0.2, 0.9, 0.1, 0.4, rule="best-vs-rest") == [(1, 2), (1, 0), (1, 3)]
    assert of_one(0.9, 0.9, 0.1, rule="best-vs-rest") == [(0, 2)]  # the second best is as good
    assert of_one(0.2, 0.9, 0.5, rule="best-vs-rest", min_margin=0.5) == [(1, 0)]
    assert of_one(0.5, 0.5, rule="best-vs-rest") == []


def test_a_ranking_is_one_record_best_first():
    (made,) = choices(array([[0.2], [0.9], [0.1], [0.9]]), Label(rule="ranking"), (1.0,))
    assert made.places == (1, 3, 0, 2) and made.utility == (0.9, 0.9, 0.2, 0.1)
    assert of_one(0.5, 0.5, rule="ranking") == []


def test_votes_are_shares_of_comparisons_won():
    assert vote_shares(array(VOTES).T) == pytest.approx(np.array([14, 8, 7, 1]) / 15)
    assert vote_shares(array([[0.9, 0.2], [0.5, 0.6], [0.1, 0.4]])) == pytest.approx([0.5, 0.75, 0.25])
    assert vote_shares(array([[1, 1], [1, 0]])) == pytest.approx([0.5, 0])  # a tie gives neither a point
    scaled = array(VOTES).T * [1, 100, 0.1, 7, 3] + 5
    assert np.array_equal(vote_shares(scaled), vote_shares(array(VOTES).T))


def test_pairwise_takes_the_judges_own_probabilities():
    table = array([[0.5, 0.9, 0.6], [0.1, 0.5, 0.8], [0.4, 0.2, 0.5]])  # 0 beats 1 and 2, 1 beats 2
    verdict = compare(table, "pairwise", ())
    assert verdict.size[0, 1] == pytest.approx(0.8) and np.array_equal(verdict.size, -verdict.size.T)
    assert utility(table, "pairwise", ()) == pytest.approx([0.75, 0.45, 0.3])
    assert verdict.extremes == (0, 2) and verdict.extremes_differ  # though 0 beats 1 by more
    made = choices(table, Label(prefer="pairwise", judge="x", rule="all-pairs"), ())
    assert [choice.places for choice in made] == [(0, 1), (0, 2), (1, 2)]
    assert [choice.probability for choice in made] == pytest.approx([0.9, 0.6, 0.8])
    (best,) = choices(table, Label(prefer="pairwise", judge="x", labels="soft"), ())
    assert labelled(best, Label(prefer="pairwise", judge="x", labels="soft"), ["a", "b"]).utility == pytest.approx(
        (0.6, 0.4)
    )


def test_a_perfect_circle_has_no_best_and_a_losing_best_is_no_pair():
    circle = array([[0.5, 0.7, 0.3], [0.3, 0.5, 0.7], [0.7, 0.3, 0.5]])
    assert compare(circle, "pairwise", ()).wins.sum() == 3
    assert not compare(circle, "pairwise", ()).extremes_differ
    # 0 wins most on the mean, 2 least, and yet 2 beats 0: undecided
    odd = array([[0.5, 1.0, 0.4, 1.0], [0.0, 0.5, 1.0, 0.5], [0.6, 0.0, 0.5, 0.0], [0.0, 0.5, 1.0, 0.5]])
    verdict = compare(odd, "pairwise", ())
    assert verdict.extremes == (0, 2) and not verdict.extremes_differ


def test_a_ranking_by_votes_is_rankdpos_sample():
    (made,) = choices(array(VOTES).T, Label(rule="ranking", prefer="votes"), ())
    assert made.places == (0, 1, 2, 3)
    assert made.utility == pytest.approx((14 / 15, 8 / 15, 7 / 15, 1 / 15))


def test_maximin_is_the_published_check():
    values = array(MAXIMIN)
    assert decided(values, prefer="maximin") == [(1, 3)]
    assert decided(values * [100, 1], prefer="maximin") == [(1, 3)]
    assert decided(array([[0.3], [0.9], [0.1]]), prefer="maximin") == [(1, 2)]
    assert decided(array([[1, 1], [1, 1]]), prefer="maximin") == []


def test_pareto_takes_what_nobody_disputes():
    values = array([[2, 1], [1, 2], [0, 0]])
    assert decided(values, prefer="pareto", rule="all-pairs") == [(0, 2), (1, 2)]
    assert decided(array([[1, 0], [0, 1]]), prefer="pareto") == []


def test_a_jury_needs_its_share_of_votes():
    values = array(JURY)
    every = {"prefer": "jury", "rule": "all-pairs"}
    assert decided(values, **every) == [(0, 1), (0, 2), (2, 1)]
    assert decided(values, **every, min_agreement=2 / 3) == [(0, 1), (0, 2), (2, 1)]
    assert decided(values, **every, min_agreement=0.7) == []
    assert (
        decided(array([[1, 1, 0], [0, 0, 0]]), prefer="jury", min_agreement=0.7) == []
    )  # who abstains agrees with nobody
    assert decided(array([[1, 0], [0, 1]]), prefer="jury") == []  # one to one
    verdict = compare(values, "jury", ())
    assert win_probability(float(verdict.size[0, 1]), "jury", 1.0) == pytest.approx(2 / 3)
    five = array([[1] * 4 + [0], [0] * 5])
    assert decided(five, prefer="jury", min_agreement=0.8) == [(0, 1)]  # four fifths reach 0.8


def test_unanimity_of_a_jury_is_pareto_without_ties():
    values = np.random.default_rng(0).normal(size=(8, 3))
    jury = decided(values, prefer="jury", rule="all-pairs", min_agreement=1.0)
    assert jury and set(jury) == set(decided(values, prefer="pareto", rule="all-pairs"))


def test_probabilities_are_bradley_terry():
    (made,) = choices(array([[1.0], [3.0]]), Label(temperature=0.5), (1.0,))
    assert made.places == (1, 0) and made.probability == pytest.approx(1 / (1 + math.exp(-4)))
    assert made.certainty == pytest.approx(made.probability - 0.5)
    soft = labelled(made, Label(temperature=0.5, labels="soft"), ["a", "b"])
    assert soft.utility == pytest.approx((made.probability, 1 - made.probability)) and soft.places == (1, 0)
    assert win_probability(1e6, "sum", 1e-3) == 1  # without overflow


def test_drawn_labels_follow_their_probability_and_their_address():
    settings = Label(temperature=1.0, labels="sampled", seed=3)
    (made,) = choices(array([[0.0], [1.0]]), settings, (1.0,))
    drawn = [labelled(made, settings, [f"{n}-0", f"{n}-1"]) for n in range(4000)]
    won = [choice.places == (1, 0) for choice in drawn]
    p = 1 / (1 + math.exp(-1))
    assert np.mean(won) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))
    assert all(
        choice.probability == pytest.approx(p if right else 1 - p) for choice, right in zip(drawn, won, strict=True)
    )
    assert drawn[::-1] == [labelled(made, settings, [f"{n}-0", f"{n}-1"]) for n in reversed(range(4000))]
    other = Label(temperature=1.0, labels="sampled", seed=4)
    assert [labelled(made, other, [f"{n}-0", f"{n}-1"]).places for n in range(50)] != [c.places for c in drawn[:50]]


def test_sums_are_weighted():
    values = array([[1, 0], [0, 1], [0.6, 0.6]])
    made = choices(values, Label(scorers=("a", "b"), weights=(3.0, -1.0)), (3.0, -1.0))
    assert [choice.places for choice in made] == [(0, 1)]
    assert decided(values) == [(2, 1)]


def test_what_is_tied_is_looked_at_but_not_decided():
    (made,) = choices(array([[1.0], [1.0], [1.0]]), Label(), (1.0,))
    assert not made.is_decided and made.certainty == 0
    verdict = compare(array([[2.0], [1.0]]), "sum", (1.0,), min_margin=1.0)
    assert chosen_pairs(verdict, "best-worst") == [(0, 1)] and not is_decided(verdict, (0, 1), "best-worst")


def test_singles_are_liked_above_the_cut():
    values = array([[0.1], [0.5], [0.9]])
    made = choices(values, Label(rule="singles"), (1.0,), cut=0.5)
    assert [(choice.places, choice.utility) for choice in made] == [((0,), (0.0,)), ((1,), (0.0,)), ((2,), (1.0,))]
    far = choices(values, Label(rule="singles", min_margin=0.2), (1.0,), cut=0.5)
    assert [choice.places for choice in far] == [(0,), (2,)]
    assert choices(values[:1], Label(rule="singles", prefer="votes"), (1.0,), cut=0.5) == []  # nobody to compare with


@pytest.mark.parametrize("kind", ["blur", "jpeg", "noise", "downscale", "fade"])
def test_each_rung_is_further_from_the_image(kind):
    image = Image.open(io.BytesIO(picture(0, 128, side=64)))
    exact = np.asarray(image.convert("RGB"), float)
    errors = [np.square(np.asarray(degrade(image, kind, level, 4, "key"), float) - exact).mean() for level in range(5)]
    assert errors[0] == 0 and all(np.diff(errors) > 0)


def test_a_ladder_begins_with_the_file_itself():
    data = picture(0, 128)
    made = ladder(data, "noise", 2, 0, "file")
    assert made[0] == data and len(made) == 3 and made == ladder(data, "noise", 2, 0, "file")
    assert made[1:] != ladder(data, "noise", 2, 1, "file")[1:]


def test_perturbed_captions():
    caption = "a red circle left of a big blue square"
    assert perturbed(caption, 0.0, 1) == caption and perturbed("circle", 1.0, 1) == "circle"
    for seed in range(50):
        made = perturbed(caption, 0.3, seed)
        assert made != caption and made == perturbed(caption, 0.3, seed)
        assert not set(made.split()) - set(caption.split()) and len(made.split()) >= len(caption.split()) - 3
    assert len({perturbed(caption, 0.3, seed) for seed in range(50)}) > 10


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"scorer": "a", "scorers": ("b",)}, "both name who labels"),
        ({"prefer": "votes", "weights": (1.0,)}, "label.weights are for sum and pareto"),
        ({"prefer": "jury", "rule": "ranking"}, "orders none"),
        ({"rule": "singles", "labels": "soft"}, "label.labels is for pairs"),
        ({"rule": "ranking", "humans": 3}, "label.humans is for pairs"),
        ({"like_quantile": 0.5}, "are for label.rule=singles"),
        ({"rule": "singles", "like_quantile": 1.0}, r"must lie in \(0, 1\)"),
        ({"rule": "singles", "like_quantile": 0.5, "like_above": 1.0}, "both say what is liked"),
        ({"temperature": 0.0}, "label.temperature must be above 0"),
        ({"min_margin": -1.0}, "label.min_margin"),
        ({"min_agreement": 2.0}, "label.min_agreement"),
        ({"humans": -1}, "label.humans must be at least 0"),
        ({"by_users": True, "prefer": "votes"}, "label.by_users keeps scorers apart"),
    ],
)
def test_settings_that_contradict_themselves(settings, match):
    with pytest.raises(UserError, match=match):
        Label(**settings)
