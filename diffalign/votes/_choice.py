"""Which pictures are compared next: those whose verdict is expected to teach most about the order of the contestants.

Strengths s follow Bradley and Terry's model, P(i beats j) = p_ij = sigmoid(s_i - s_j), with a standard normal prior on
each strength. Of the sums of all duels so far, the posterior's mode is found by Newton's method and its covariance S
by Laplace's approximation; a comparison of i and j then lowers the posterior's entropy by

    gain_ij = 1/2 ln(1 + p_ij (1 - p_ij) (S_ii + S_jj - 2 S_ij)),

high where the outcome is open (p near 1/2) and where the pair's difference is still uncertain: D-optimal design, with
rivals compared through others, too. The sums are few numbers whatever was voted, so a choice costs O(contestants^3).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Duels = Mapping[tuple[str, str], tuple[float, int]]  # (first, second) -> (wins of first with ties half, comparisons)
DIGITS = 10  # gains equal up to rounding are ties


def expected_gain(slots: Sequence[str], duels: Duels) -> Float[NDArray[np.float64], "S S"]:
    """Nats that one more comparison of each two is expected to teach."""
    size, place = len(slots), {slot: index for index, slot in enumerate(slots)}
    wins = np.zeros((size, size))
    for (first, second), (won, num) in duels.items():
        wins[place[first], place[second]] += won
        wins[place[second], place[first]] += num - won
    num_of, strength = wins + wins.T, np.zeros(size)
    for _ in range(50):
        chance = 0.5 * (1 + np.tanh((strength[:, None] - strength[None]) / 2))
        curvature = num_of * chance * (1 - chance)
        precision = np.diag(1 + curvature.sum(1)) - curvature
        step = np.linalg.solve(precision, (wins - num_of * chance).sum(1) - strength)
        if np.abs(step).max() < 1e-9:
            break
        strength = strength + np.clip(step, -1, 1)  # the likelihood is concave, its curvature vanishes far out
    spread = np.linalg.inv(precision)
    variance = spread.diagonal()[:, None] + spread.diagonal()[None] - 2 * spread
    return 0.5 * np.log1p(chance * (1 - chance) * variance)


def with_ties(duels: Duels, pending: Iterable[Sequence[str]]) -> dict[tuple[str, str], tuple[float, int]]:
    """The sums as if each set of slots that waits for its verdict had ended in a tie."""
    found = dict(duels)
    for slots in pending:
        for pair in combinations(sorted(slots), 2):
            wins, num = found.get(pair, (0.0, 0))
            found[pair] = (wins + 0.5, num + 1)
    return found


def choices(slots: Sequence[str], duels: Duels, size: int, rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Sets of `size` slots, the most informative first, equal ones in random order; each once.

    A set of more than two begins with a pair and takes in, one by one, who adds most to its pairs' summed gain; so not
    every set is reached. Fewer slots than `size` give nothing.
    """
    if len(slots) <= size:
        if len(slots) == size:
            yield tuple(sorted(slots))
        return
    gain = np.round(expected_gain(slots, duels), DIGITS)
    pairs = list(combinations(range(len(slots)), 2))
    rng.shuffle(pairs)
    seen: set[tuple[str, ...]] = set()
    for pair in sorted(pairs, key=lambda pair: -gain[pair]):
        chosen = list(pair)
        while len(chosen) < size:
            rest = [index for index in range(len(slots)) if index not in chosen]
            rng.shuffle(rest)
            chosen.append(max(rest, key=lambda index: float(gain[index, chosen].sum())))
        found = tuple(sorted(slots[index] for index in chosen))
        if found not in seen:
            seen.add(found)
            yield found
