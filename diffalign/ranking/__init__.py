"""Who is preferred: Bradley-Terry strengths of pairwise votes with intervals, and how far the voters agree.

    P(i beats j) = sigmoid(s_i - s_j)          Bradley and Terry 1952; a tie is half a win for each

fitted by evalica. A ranking of K pictures counts as its K (K - 1) / 2 pairs, which stay together as one ballot.

**The prior.** Every contestant has one virtual draw, shared out evenly over all others: for two contestants half a win
more for each. Without it a contestant that never lost is infinitely strong, and contestants that nobody compared,
directly or through others, have no order at all. `groups` says whose order rests on it alone.

**The intervals** are percentiles of Rubin's Bayesian bootstrap (1981) over prompts where there are several, else over
ballots: instead of drawing some twice and some not at all, each of the n gets a random weight, so that no resample
loses the only votes that connect two contestants. Weights are Gamma((n - 2) / n), not Rubin's Gamma(1): a mean then
varies by the unbiased s^2 / n. The virtual draws vary as well; for two contestants the interval becomes that of
Jeffreys' prior, Beta(wins + 1/2, losses + 1/2): ten wins of ten are not taken for certainty.

Pure functions of outcomes: time and memory are linear in them, and quadratic in the few contestants.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from diffalign.errors import UserError
from diffalign.ranking._consensus import Consensus, consensus

NUM_RESAMPLES = 1000
PRIOR = 1.0  # virtual draws of every contestant
_CHUNK = 1 << 22  # weights held at once


class Outcome(NamedTuple):
    """One comparison of two contestants; `share` is what `left` gets of the win: 1, 0, or 0.5 for a tie.

    Pairs of one ranking share their `ballot`; an empty one stands for itself.
    """

    left: str
    right: str
    share: float
    prompt: str = ""
    rater: str = ""
    ballot: str = ""
    item: str = ""  # which pictures were judged, where a prompt has several


@dataclass(frozen=True)
class Standings:
    """K contestants, the strongest first; intervals at confidence `level`.

    `strength` is in log-odds with mean 0. `win_rate` is the chance to beat another of the contestants drawn at random:
    with two contestants, their share of the votes.
    """

    names: tuple[str, ...]
    strength: Float[NDArray[np.float64], " K"]
    strength_interval: Float[NDArray[np.float64], "K 2"]
    win_rate: Float[NDArray[np.float64], " K"]
    win_rate_interval: Float[NDArray[np.float64], "K 2"]
    rank_interval: Int[NDArray[np.int64], "K 2"]  # from 1
    wins: Float[NDArray[np.float64], "K K"]  # votes of the row against the column, a tie half
    probability: Float[NDArray[np.float64], "K K"]  # the model's, that the row beats the column
    probability_interval: Float[NDArray[np.float64], "K K 2"]
    spread: Float[NDArray[np.float64], "K K"]  # standard error of `probability`
    groups: tuple[tuple[str, ...], ...]  # contestants compared with each other, directly or through others
    num_outcomes: int
    num_ballots: int
    resampled: str  # "prompts" or "ballots"
    num_clusters: int  # how many of them
    design_effect: float  # variance of a pair's votes within a cluster, over that of independent coins
    level: float
    consensus: Consensus

    @property
    def points(self) -> Float[NDArray[np.float64], " K"]:
        """Strengths on Elo's scale: 1000 on average, 400 more for odds of ten to one."""
        return 1000 + 400 / math.log(10) * self.strength

    def votes_needed(self, first: int, second: int, power: float = 0.8) -> float:
        """How many more votes between two contestants until their interval leaves out one half; 0 where it does.

        With p the model's probability, D the design effect and s the standard error of p so far,

            n = p (1 - p) D (z_level + z_power)^2 / (p - 1/2)^2     direct votes in all (normal approximation)
            m = p (1 - p) D / s^2                                   what all votes so far are worth

        n - m more are needed, if the difference is what it looks like now; infinitely many if they look equal.
        """
        p, (low, high) = self.probability[first, second], self.probability_interval[first, second]
        if low > 0.5 or high < 0.5:
            return 0
        if p == 0.5:
            return math.inf
        normal = NormalDist()
        z = normal.inv_cdf((1 + self.level) / 2) + normal.inv_cdf(power)
        vote = p * (1 - p) * self.design_effect
        return max(1, math.ceil(vote * (z / (p - 0.5)) ** 2 - vote / self.spread[first, second] ** 2))


def fit(wins: Float[NDArray[np.float64], "K K"]) -> Float[NDArray[np.float64], " K"]:
    """Log-odds strengths with mean 0, of `wins` of the row against the column, all above 0 but the diagonal."""
    import evalica
    import pandas as pd

    left, right = np.nonzero(wins)
    found = evalica.bradley_terry(
        left.tolist(),
        right.tolist(),
        [evalica.Winner.X] * len(left),
        index=pd.RangeIndex(len(wins)),
        weights=wins[left, right].tolist(),
        tolerance=1e-9,
        limit=10_000,
    )
    strength = np.log(found.scores.reindex(range(len(wins))).to_numpy())
    return strength - strength.mean()


def _with_prior(
    wins: Float[NDArray[np.float64], "K K"], draws: NDArray[np.float64] | float = PRIOR / 4
) -> Float[NDArray[np.float64], "K K"]:
    """Adds the virtual draws. A contestant's [win, loss] in `draws` [K, 2] is half of its share: the others' losses and
    wins against it are the other half."""
    num = len(wins)
    win, loss = np.broadcast_to(draws, (num, 2)).T
    return (wins + (win[:, None] + loss) / (num - 1)) * (1 - np.eye(num))


def standings(
    outcomes: Iterable[Outcome], *, level: float = 0.95, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Standings:
    """Strengths, intervals, win matrix and agreement of the outcomes.

    Raises:
        UserError: no outcomes, a contestant against itself, or a share outside [0, 1].
    """
    votes = list(outcomes)
    names, left, right, share, prompts, ballots = _columns(votes)
    num, num_prompts = len(names), int(prompts.max()) + 1
    clusters, resampled = (prompts, "prompts") if num_prompts > 1 else (ballots, "ballots")
    wins = np.zeros((num, num))
    np.add.at(wins, (left, right), share)
    np.add.at(wins, (right, left), 1 - share)
    order = np.argsort(-fit(_with_prior(wins)), kind="stable")
    place = np.argsort(order)
    names, left, right, wins = [names[k] for k in order], place[left], place[right], wins[order][:, order]
    strength = fit(_with_prior(wins))
    drawn = _resampled(num, left, right, share, clusters, num_resamples, seed)  # [R, K]
    pairs = _sigmoid(drawn[:, :, None] - drawn[:, None])  # [R, K, K]
    rank = 1 + (drawn[:, :, None] < drawn[:, None]).sum(2)
    tails = low, high = (1 - level) / 2, (1 + level) / 2
    probability = _sigmoid(strength[:, None] - strength)
    return Standings(
        names=tuple(names),
        strength=strength,
        strength_interval=np.quantile(drawn, tails, axis=0).T,
        win_rate=_against_others(probability),
        win_rate_interval=np.quantile(_against_others(pairs), tails, axis=0).T,
        rank_interval=np.stack(
            [np.quantile(rank, low, axis=0, method="lower"), np.quantile(rank, high, axis=0, method="higher")], axis=1
        ).astype(int),
        wins=wins,
        probability=probability,
        probability_interval=np.moveaxis(np.quantile(pairs, tails, axis=0), 0, -1),
        spread=pairs.std(axis=0),
        groups=_groups(names, wins),
        num_outcomes=len(votes),
        num_ballots=int(ballots.max()) + 1,
        resampled=resampled,
        num_clusters=int(clusters.max()) + 1,
        design_effect=_design_effect(probability, left, right, share, clusters),
        level=level,
        consensus=consensus(votes),
    )


def outcomes_of(votes: Iterable[Any]) -> Iterator[Outcome]:
    """The pairs of different contestants in each vote of a `VoteBook`; of two pictures called bad neither wins."""
    for vote in votes:
        for first, second in combinations(range(len(vote.contestants)), 2):
            left, right = vote.contestants[first], vote.contestants[second]
            if left != right:
                gap = vote.verdict.ranks[second] - vote.verdict.ranks[first]
                share = 0.5 + 0.5 * ((gap > 0) - (gap < 0))
                item = f"{vote.task} {vote.place}"
                yield Outcome(left, right, share, vote.prompt, vote.rater, vote.ballot, item)


def _codes(labels: Iterable[Hashable]) -> NDArray[np.int64]:
    """Labels as 0, 1, ... by first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels])


def _columns(votes: Sequence[Outcome]) -> tuple[list[str], NDArray, NDArray, NDArray, NDArray, NDArray]:
    """Names, then per vote: left and right as positions in them, share, prompt and ballot as codes."""
    if not votes:
        raise UserError("no votes to rank by yet")
    for vote in votes:
        if vote.left == vote.right:
            raise UserError(f"a vote compares {vote.left!r} with itself")
        if not 0 <= vote.share <= 1:
            raise UserError(f"{vote.left!r} against {vote.right!r}: a share of {vote.share} is not in [0, 1]")
    names = sorted({name for vote in votes for name in (vote.left, vote.right)})
    position = {name: k for k, name in enumerate(names)}
    left = np.array([position[vote.left] for vote in votes])
    right = np.array([position[vote.right] for vote in votes])
    share = np.array([vote.share for vote in votes], float)
    ballots = _codes(vote.ballot or number for number, vote in enumerate(votes))
    return names, left, right, share, _codes(vote.prompt for vote in votes), ballots


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-x))


def _against_others(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means [..., K] over the other contestants; one's chance against itself is a half, which is left out."""
    return (probability.sum(axis=-1) - 0.5) / (probability.shape[-1] - 1)


def _resampled(
    num: int, left: NDArray, right: NDArray, share: NDArray, clusters: NDArray, num_resamples: int, seed: int
) -> NDArray[np.float64]:
    """Strengths [R, K] under random weights of the clusters and of the prior."""
    from scipy.sparse import coo_array

    size = (int(clusters.max()) + 1, num * num)
    won = coo_array(  # [clusters, pairs]; entries of the same place add up
        (
            np.concatenate([share, 1 - share]),
            (np.concatenate([clusters, clusters]), np.concatenate([left * num + right, right * num + left])),
        ),
        shape=size,
    ).tocsr()
    rng = np.random.default_rng(seed)
    found, rows = [], max(1, _CHUNK // size[0])
    for start in range(0, num_resamples, rows):
        weights = rng.gamma(max(size[0] - 2, 1) / size[0], size=(min(rows, num_resamples - start), size[0]))
        weights /= weights.mean(axis=1, keepdims=True)
        prior = rng.gamma(PRIOR / 4, size=(len(weights), num, 2))
        tables = (won.T @ weights.T).T.reshape(-1, num, num)
        found += [fit(_with_prior(table, virtual)) for table, virtual in zip(tables, prior, strict=True)]
    return np.array(found)


def _design_effect(
    probability: NDArray[np.float64], left: NDArray, right: NDArray, share: NDArray, clusters: NDArray
) -> float:
    """Squared sums of a pair's residuals within a cluster, over the p (1 - p) of independent votes without ties."""
    p = probability[left, right]
    residual = np.where(left < right, share - p, p - share)
    num = len(probability)
    pair = clusters * num * num + np.minimum(left, right) * num + np.maximum(left, right)
    sums = np.bincount(np.unique(pair, return_inverse=True)[1], weights=residual)
    return float((sums**2).sum() / (p * (1 - p)).sum())


def _groups(names: Sequence[str], wins: NDArray[np.float64]) -> tuple[tuple[str, ...], ...]:
    """Connected components of who was compared with whom."""
    from scipy.sparse.csgraph import connected_components

    members = defaultdict(list)
    for name, label in zip(names, connected_components(wins + wins.T, directed=False)[1], strict=True):
        members[label].append(name)
    return tuple(tuple(group) for group in members.values())
