"""Candidates on their way through a sampler: which of them go on, and a denoiser that evaluates only those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from torch import Tensor

from diffalign.recipes.generate._select import Selection


class Paths:
    """A `Denoiser` over `num` rows, some of which have been given up: those are never evaluated again.

    The sampler moves all rows; a row that was given up is predicted as zeros, at no cost, and must not be looked at.
    `evaluations` [num] counts what each row took of the network: 1 a step, 2 with guidance.

    Args:
        model: the network, with its schedule.
        num: rows of the sampler's x_t.
        size: rows of one network call at most, twice as many with guidance.
    """

    def __init__(self, model: Any, num: int, size: int) -> None:
        self.model, self.schedule, self.size = model, model.schedule, size
        self.is_alive: Bool[Tensor, " num"] = torch.ones(num, dtype=torch.bool)
        self.evaluations = torch.zeros(num, dtype=torch.int64)

    def __call__(self, xt: Float[Tensor, "M C H W"], t: Float[Tensor, " M"], cond: Mapping[str, Tensor]) -> Tensor:
        """[M, C, H, W]; M is `num`, or twice that with the unconditional rows first."""
        num = len(self.is_alive)
        halves = len(xt) // num
        self.evaluations += self.is_alive * halves
        alive = self.is_alive.nonzero()[:, 0]
        if len(alive) == num <= self.size:
            return self.model(xt, t, cond)  # exactly the call that plain sampling makes
        pred: Tensor | None = None
        for part in alive.split(self.size):
            rows = torch.cat([part + half * num for half in range(halves)]).to(xt.device)
            made = self.model(xt[rows], t[rows], {name: value[rows] for name, value in cond.items()})
            if pred is None:
                pred = made.new_zeros(xt.shape)
            pred[rows] = made
        assert pred is not None, "one candidate of a picture always goes on"
        return pred


class Verdicts:
    """What is known of N candidates of each of G pictures. Scores that are NaN are worse than all others."""

    def __init__(self, selection: Selection, num_pictures: int, candidates: int) -> None:
        self.selection = selection
        shape = (num_pictures, candidates)
        self.is_alive: Bool[NDArray[np.bool_], "G N"] = np.ones(shape, dtype=bool)
        self.is_clear = np.full(shape, selection.clear_from is None)
        self.is_asked = np.zeros(shape, dtype=bool)
        self.clarity: Float[NDArray[np.float64], "G N"] = np.full(shape, -np.inf)
        self.potential: Float[NDArray[np.float64], "G N"] = np.full(shape, -np.inf)

    def to_clear(self) -> Bool[NDArray[np.bool_], "G N"]:
        """Whose preview the clarity question is for."""
        return self.is_alive & ~self.is_clear

    def to_ask(self) -> Bool[NDArray[np.bool_], "G N"]:
        """Whose preview the potential question is for."""
        return self.is_alive & self.is_clear & (~self.is_asked | self.selection.ask_again)

    def set_clarity(self, where: Bool[NDArray[np.bool_], "G N"], scores: Shaped[NDArray[Any], " R"]) -> None:
        """Answers to the clarity question; the last one counts."""
        assert self.selection.clear_from is not None
        self.clarity[where] = _ranked(scores)
        self.is_clear[where] = self.clarity[where] >= self.selection.clear_from

    def set_potential(self, where: Bool[NDArray[np.bool_], "G N"], scores: Shaped[NDArray[Any], " R"]) -> None:
        """Answers to the potential question."""
        self.potential[where] = _ranked(scores)
        self.is_asked |= where

    def prune(self, check: int) -> None:
        """Gives up what a check rejects. Of each picture, one candidate goes on at least.

        While none has passed, the rejected one of most potential stays: PARM takes it where none passes at all.
        """
        is_last = check == len(self.selection.checks) - 1
        limit = self.selection.limit(check, self.is_alive.shape[1])
        for alive, asked, clarity, potential in zip(
            self.is_alive, self.is_asked, self.clarity, self.potential, strict=True
        ):
            judged = alive & asked
            floor = self.selection.potential_from
            passed = judged & (potential > -np.inf if floor is None else potential >= floor)
            stay = best(potential, passed, limit) if passed.any() else best(potential, judged, 1)
            if not is_last:
                stay |= alive & ~asked
            elif not stay.any():
                stay = best(clarity, alive, 1)
            alive[:] = stay


def best(
    scores: Float[NDArray[np.float64], " N"], among: Bool[NDArray[np.bool_], " N"], limit: int
) -> Bool[NDArray[np.bool_], " N"]:
    """The `limit` highest of `among`, of equal ones those of lower number."""
    order = np.argsort(-scores, kind="stable")
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order[among[order]][:limit]] = True
    return chosen


def _ranked(scores: Shaped[NDArray[Any], " R"]) -> Float[NDArray[np.float64], " R"]:
    values = np.asarray(scores, dtype=np.float64)
    return np.where(np.isnan(values), -np.inf, values)
