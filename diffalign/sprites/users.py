"""Simulated users: a taste, a temperature, and a share of careless answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffalign.sprites.judge import compare, find
from diffalign.sprites.scene import BACKGROUNDS, COLOURS, SIZES, parse


@dataclass(frozen=True)
class User:
    """Utility = gold_weight * gold score + the mean taste of the picture's objects and ground.

    taste: liking of colours, sizes and backgrounds by name, about -1 to 1; what is not named is 0.
    temperature: of the Bradley-Terry choice, P(first) = sigmoid((u_1 - u_2) / temperature); 0 always takes the better.
    flip_rate: share of answers that are then reversed, in [0, 1].
    """

    taste: Mapping[str, float] = field(default_factory=dict)
    gold_weight: float = 1.0
    temperature: float = 0.1
    flip_rate: float = 0.0

    def __post_init__(self) -> None:
        unknown = set(self.taste) - {*COLOURS, *SIZES, *BACKGROUNDS}
        if unknown:
            raise ValueError(
                f"a taste names {sorted(unknown)[0]!r}: choose colours, sizes and backgrounds of the world"
            )
        if self.temperature < 0 or not 0 <= self.flip_rate <= 1:
            raise ValueError("temperature must not be negative, flip_rate must lie in [0, 1]")

    def utility(self, image: Any, caption: str) -> float:
        """How much the user likes a picture for a caption."""
        items, ground = find(image)
        likes = [self.taste.get(str(item.colour), 0.0) + self.taste.get(item.size, 0.0) for item in items]
        liking = float(np.mean(likes)) if likes else 0.0
        gold = compare(parse(caption), items, ground).score
        return self.gold_weight * gold + liking + self.taste.get(str(ground), 0.0)

    def prefers_first(self, first: Any, second: Any, caption: str, rng: np.random.Generator) -> bool:
        """One vote between two pictures; a coin where nothing tells them apart."""
        gap = self.utility(first, caption) - self.utility(second, caption)
        if self.temperature == 0:
            choice = gap > 0 if gap else bool(rng.random() < 0.5)
        else:
            choice = bool(rng.random() < 1 / (1 + np.exp(-np.clip(gap / self.temperature, -50, 50))))
        return choice != bool(rng.random() < self.flip_rate)


def sample_user(rng: np.random.Generator, temperature: float = 0.1, flip_rate: float = 0.0) -> User:
    """A random taste over colours, sizes and backgrounds."""
    taste = {name: float(rng.uniform(-1, 1)) for name in (*COLOURS, *SIZES, *BACKGROUNDS)}
    return User(taste, temperature=temperature, flip_rate=flip_rate)
