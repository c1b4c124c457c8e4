"""Bradley-Terry standings: closed forms, planted strengths, coverage, and what the voters agree on."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.ranking import Outcome, Standings, fit, outcomes_of, standings


def quick(outcomes: list[Outcome], **options: object) -> Standings:
    return standings(outcomes, **{"num_resamples": 50, **options})  # type: ignore[arg-type]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def drawn(
    strength: np.ndarray, num: int, rng: np.random.Generator, prompts: int = 1, taste: float = 0.0
) -> list[Outcome]:
    """Votes of a Bradley-Terry world in which each prompt may favour some contestants."""
    favour = taste * rng.normal(size=(prompts, len(strength)))
    found = []
    for number in range(num):
        i, j = rng.choice(len(strength), 2, replace=False)
        prompt = int(rng.integers(prompts))
        gap = strength[i] - strength[j] + favour[prompt, i] - favour[prompt, j]
        won = float(rng.random() < sigmoid(gap))
        found.append(Outcome(f"m{i}", f"m{j}", won, f"prompt {prompt}", f"rater {number % 5}"))
    return found


@given(wins=st.integers(1, 40), losses=st.integers(1, 40), ties=st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_two_contestants_are_the_logit_of_the_win_rate(wins: int, losses: int, ties: int) -> None:
    points = np.array([[0, wins + ties / 2], [losses + ties / 2, 0]])
    assert np.diff(-fit(points))[0] == pytest.approx(math.log(points[0, 1] / points[1, 0]), abs=1e-6)
    votes = [Outcome("a", "b", 1.0)] * wins + [Outcome("b", "a", 1.0)] * losses + [Outcome("b", "a", 0.5)] * ties
    found = standings(votes, num_resamples=2)
    share = (points + [[0, 0.5], [0.5, 0]])[0, 1] / (points.sum() + 1)
    assert found.win_rate[found.names.index("a")] == pytest.approx(share, abs=1e-6)


def test_the_win_rate_of_two_is_their_share_and_the_stronger_comes_first() -> None:
    votes = [Outcome("b", "a", 1.0)] * 300 + [Outcome("a", "b", 1.0)] * 100 + [Outcome("a", "b", 0.5)] * 200
    found = quick(votes)
    assert found.names == ("b", "a") and found.win_rate[0] == pytest.approx(400 / 600, abs=1e-3)
    assert found.wins.tolist() == [[0, 400], [200, 0]] and found.win_rate.sum() == pytest.approx(1)
    assert found.probability[0, 1] == pytest.approx(sigmoid(found.strength[0] - found.strength[1]))
    assert found.points.mean() == pytest.approx(1000)
    assert np.diff(found.points)[0] == pytest.approx(-400 * math.log10(found.win_rate[0] / found.win_rate[1]))


def test_symmetric_votes_leave_all_equal() -> None:
    names = ("a", "b", "c")
    votes = [Outcome(left, right, 1.0) for left in names for right in names if left != right] * 10
    found = quick(votes, num_resamples=400)
    assert np.abs(found.strength).max() < 1e-6
    assert (found.rank_interval == [1, 3]).all()
    assert found.votes_needed(0, 1) == math.inf or found.votes_needed(0, 1) > 1e6
    assert (found.win_rate_interval[:, 0] < 0.5).all() and (found.win_rate_interval[:, 1] > 0.5).all()


def test_sides_do_not_matter() -> None:
    votes = drawn(np.array([1.0, 0.0, -1.0]), 200, np.random.default_rng(0))
    swapped = [vote._replace(left=vote.right, right=vote.left, share=1 - vote.share) for vote in votes]
    one, other = quick(votes), quick(swapped)
    np.testing.assert_allclose(one.strength, other.strength, atol=1e-6)
    np.testing.assert_allclose(one.wins, other.wins)
    assert one.design_effect == pytest.approx(other.design_effect)


def test_planted_strengths_are_recovered() -> None:
    planted = np.array([1.2, 0.4, 0.0, -0.5, -1.1])
    found = quick(drawn(planted, 6000, np.random.default_rng(1)), num_resamples=200)
    assert found.names == ("m0", "m1", "m2", "m3", "m4")
    np.testing.assert_allclose(found.strength, planted - planted.mean(), atol=0.12)
    assert found.rank_interval.tolist() == [[k, k] for k in range(1, 6)]
    assert found.design_effect == pytest.approx(1, abs=0.08) and found.num_ballots == 6000


def test_who_never_lost_is_finite_and_not_certain() -> None:
    """The interval is that of Jeffreys' prior."""
    from scipy.stats import beta

    for num in (10, 100):
        found = quick([Outcome("a", "b", 1.0)] * num, num_resamples=4000)
        assert found.win_rate[0] == pytest.approx((num + 0.5) / (num + 1))
        expected = beta(num + 0.5, 0.5).ppf([0.025, 0.975])
        np.testing.assert_allclose(1 - found.win_rate_interval[0], 1 - expected, rtol=0.3, atol=1e-3)


def test_the_fit_solves_its_equations_however_one_sided_the_votes() -> None:
    """Wins equal expected wins, for a chain in which nobody ever lost against a weaker one."""
    wins = np.triu(np.full((6, 6), 2000.0), 1) + np.where(np.eye(6), 0, 0.1)
    strength = fit(wins)
    expected = (wins + wins.T) / (1 + np.exp(strength - strength[:, None]))
    np.testing.assert_allclose(wins.sum(axis=1), expected.sum(axis=1), atol=1e-6)
    assert (np.diff(strength) < 0).all()


def test_contestants_that_nobody_connected_are_told_apart() -> None:
    votes = [Outcome("a", "b", 1.0)] * 5 + [Outcome("c", "d", 1.0)] * 5
    found = quick(votes)
    assert sorted(map(sorted, found.groups)) == [["a", "b"], ["c", "d"]]
    index = {name: k for k, name in enumerate(found.names)}
    assert found.strength[index["a"]] == pytest.approx(found.strength[index["c"]], abs=1e-6)
    assert found.wins[index["a"], index["c"]] == 0
    assert len(quick([*votes, Outcome("b", "c", 0.5)]).groups) == 1


def test_prompts_are_resampled_where_there_are_several() -> None:
    """Votes that only repeat their prompt say no more than the prompts do."""
    rng = np.random.default_rng(2)
    prompts = [(f"p{k}", float(rng.random() < 0.6)) for k in range(30)]
    votes = [Outcome("a", "b", won, prompt) for prompt, won in prompts for _ in range(20)]
    clustered = quick(votes, num_resamples=400)
    apart = quick([vote._replace(prompt="") for vote in votes], num_resamples=400)
    assert (clustered.resampled, clustered.num_clusters) == ("prompts", 30)
    assert (apart.resampled, apart.num_clusters) == ("ballots", 600)
    ratio = np.ptp(clustered.win_rate_interval[0]) / np.ptp(apart.win_rate_interval[0])
    assert ratio == pytest.approx(math.sqrt(20), rel=0.25)
    assert clustered.design_effect == pytest.approx(20, rel=0.1) and apart.design_effect == pytest.approx(1, rel=0.01)


def test_pairs_of_one_ranking_stay_together() -> None:
    votes = [Outcome("a", "b", 1.0, ballot=str(number // 4)) for number in range(40)]
    found = quick(votes)
    assert found.num_ballots == 10 and found.num_clusters == 10 and found.num_outcomes == 40


def test_more_votes_are_needed_until_they_are_there() -> None:
    """The formula's number of votes makes the interval leave out one half about as often as the power says."""
    planted = np.array([0.25, -0.25])
    rng = np.random.default_rng(3)
    few = quick(drawn(planted, 40, rng), num_resamples=200)
    exact = Standings(**{**vars(few), "probability": np.array([[0.5, sigmoid(0.5)], [sigmoid(-0.5), 0.5]])})
    decided = few.votes_needed(0, 1) == 0
    needed = 0.0 if decided else exact.votes_needed(0, 1)
    p = sigmoid(0.5)
    in_all = p * (1 - p) * few.design_effect * ((1.95996 + 0.84162) / (p - 0.5)) ** 2
    so_far = p * (1 - p) * few.design_effect / few.spread[0, 1] ** 2
    assert decided or needed == math.ceil(in_all - so_far)
    found = [quick(drawn(planted, math.ceil(in_all), rng), num_resamples=200) for _ in range(40)]
    share = np.mean([standing.votes_needed(0, 1) == 0 for standing in found])
    assert 0.6 < share <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("votes", "prompts", "taste"), [(60, 1, 0.0), (200, 40, 1.0)])
def test_intervals_cover_the_truth(votes: int, prompts: int, taste: float) -> None:
    """95 % intervals of 200 simulated votings; a binomial standard error is below 0.02."""
    planted, rng = np.array([0.5, 0.0, -0.5]), np.random.default_rng(4)
    favours = taste * math.sqrt(2) * rng.normal(size=20_000)  # of one prompt, between two contestants
    inside = []
    for _ in range(200):
        found = standings(drawn(planted, votes, rng, prompts, taste), num_resamples=200)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            gap = planted[int(found.names[i][1])] - planted[int(found.names[j][1])]
            truth = float(np.mean(1 / (1 + np.exp(-(gap + favours)))))
            low, high = found.probability_interval[i, j]
            inside.append(low <= truth <= high)
    assert 0.90 <= np.mean(inside) <= 0.98


def test_the_seed_makes_the_intervals() -> None:
    votes = drawn(np.array([0.5, 0.0, -0.5]), 60, np.random.default_rng(5))
    one, again, other = (quick(votes, seed=seed).strength_interval for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_agreement_by_prompt_and_rater() -> None:
    votes = [
        *(Outcome("a", "b", 1.0, "easy", rater) for rater in ("ann", "bob", "cat")),
        *(Outcome("b", "a", 1.0, "hard", rater) for rater in ("ann", "bob")),
        Outcome("a", "b", 1.0, "hard", "cat"),
        Outcome("a", "b", 1.0, "alone", "ann"),
    ]
    found = quick(votes).consensus
    assert found.num_shared == 2
    assert [(share.name, share.num_verdicts) for share in found.prompts] == [("hard", 3), ("easy", 3)]
    assert found.prompts[0].share == pytest.approx(2 / 3) and found.prompts[1].share == 1
    # On "hard", ann's others (bob and cat) are split, so only cat is judged there, against ann and bob.
    assert {share.name: (share.share, share.num_verdicts) for share in found.raters} == {
        "cat": (0.5, 2),
        "ann": (1.0, 1),
        "bob": (1.0, 1),
    }
    # Of 12 verdicts, both orders counted, 6 are for each side; on "hard" 4 of 6 ordered pairs disagree, in both orders.
    observed, expected = 2 * 4 * 4 / (3 - 1) / 12, 2 * 6 * 6 * 4 / (12 * 11)
    assert found.alpha == pytest.approx(1 - observed / expected)
    renamed = [
        vote._replace(left={"a": "z"}.get(vote.left, "b"), right={"a": "z"}.get(vote.right, "b")) for vote in votes
    ]
    assert quick(renamed).consensus.alpha == pytest.approx(found.alpha)


def test_one_rater_twice_is_one_verdict_and_other_pictures_are_another_item() -> None:
    twice = quick([Outcome("a", "b", 1.0, "p", "ann"), Outcome("b", "a", 1.0, "p", "ann")]).consensus
    assert twice.num_shared == 0 and math.isnan(twice.alpha)
    apart = quick([Outcome("a", "b", 1.0, "p", r, item=r) for r in ("ann", "bob")]).consensus
    assert apart.num_shared == 0


def test_votes_become_outcomes() -> None:
    vote = SimpleNamespace(
        contestants=("a", "b", "a"), prompt="p", rater="ann", ballot="x", task=1, place="0", verdict=None
    )

    def of(*ranks: int) -> list[tuple[str, str, float]]:
        return [tuple(o[:3]) for o in outcomes_of([SimpleNamespace(**{**vars(vote), "verdict": _ranks(ranks)})])]

    assert of(0, 1, 2) == [("a", "b", 1.0), ("b", "a", 1.0)]  # the two pictures of a say nothing
    assert of(1, 0, 0) == [("a", "b", 0.0), ("b", "a", 0.5)]
    [first, second] = outcomes_of([SimpleNamespace(**{**vars(vote), "verdict": _ranks((0, 0, 0))})])
    assert (first.ballot, first.item, first.share) == (second.ballot, "1 0", 0.5)


def _ranks(ranks: tuple[int, ...]) -> SimpleNamespace:
    return SimpleNamespace(ranks=ranks)


@pytest.mark.parametrize(
    ("votes", "says"),
    [
        ([], "no votes"),
        ([Outcome("a", "a", 1.0)], "itself"),
        ([Outcome("a", "b", 1.5)], "not in"),
        ([Outcome("a", "b", math.nan)], "not in"),
    ],
)
def test_what_cannot_be_ranked_is_refused(votes: list[Outcome], says: str) -> None:
    with pytest.raises(UserError, match=says):
        standings(votes)
