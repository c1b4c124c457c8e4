"""Scorers as the judge of a rollout: every score kept, a failure counted, and what several scorers prefer together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffalign import preference_rules
from diffalign.preference_rules import standardised as standardised
from diffalign.scorers._build import build_scorers
from diffalign.types import UserError

Prefer = Literal["sum", "pareto", "maximin", "pairwise"]
Pairs = Literal["best-worst", "all"]


class NoAnswer(RuntimeError):
    """A call that has not come back in time, and perhaps never will."""


def within(seconds: float | None, call: Callable[[], Any], what: str) -> Any:
    """What `call` returns, or an error once it has taken longer.

    In a thread of its own that nobody waits for: a call that hangs cannot be ended, but the run can.

    Raises:
        NoAnswer: none within `seconds`.
    """
    if seconds is None:
        return call()
    found: list[Any] = []
    failed: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # is the thread's own

    def work() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            found.append(call())
        except BaseException as error:  # handed on below, whatever it is
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise NoAnswer(f"{what} gave no answer within {seconds:g} s (source.scorer_timeout); the same command resumes")
    if failed:
        raise failed[0]
    return found[0]


class Judge:
    """Scores by named scorers, weighed into one utility or compared one by one.

    Of `pairwise`, where a general preference compares pictures instead, the columns of scores are a picture's
    embedding, which says nothing alone: `utility` and `pairs` compare those of a prompt.

    Args:
        scorers: config names, or mappings with `name`, the scorer's own keys and, to tell two of a kind apart, `as`.
        weights: of each in the sum; default 1 each.
        prefer: how several make one preference, see `utility` and `pairs`.
        timeout: seconds for one call of a scorer.

    Raises:
        UserError: no scorer, an unknown one, two of one name, weights of another number, or one that compares where
            scores are wanted, and the other way round.
    """

    def __init__(
        self,
        scorers: Sequence[str | Mapping[str, Any]],
        weights: Sequence[float],
        prefer: Prefer,
        timeout: float | None,
    ) -> None:
        if prefer not in get_args(Prefer):
            raise UserError(f"source.prefer={prefer!r}: legal are {', '.join(get_args(Prefer))}")
        self.scorers: dict[str, Any] = dict(build_scorers(scorers, "source.scorers"))
        if weights and len(weights) != len(self.scorers):
            raise UserError(f"source.weights has {len(weights)} numbers for {len(self.scorers)} scorers")
        for name, scorer in self.scorers.items():
            if hasattr(scorer, "represent") != (prefer == "pairwise"):
                what = "scores pictures one by one" if prefer == "pairwise" else "compares pictures and has no scores"
                raise UserError(f"source.scorers: {name} {what}: source.prefer=pairwise is for general_preference")
        if prefer == "pairwise" and (len(self.scorers) > 1 or weights):
            raise UserError("source.prefer=pairwise takes one scorer, and no weights")
        self.weights = np.array(weights or [1.0] * len(self.scorers))
        self.prefer, self.timeout = prefer, timeout

    @classmethod
    def of_people(cls) -> Judge:
        """Votes in place of a scorer: one column, `votes`, that somebody else fills."""
        judge = cls.__new__(cls)
        judge.scorers, judge.weights, judge.prefer, judge.timeout = {"votes": None}, np.ones(1), "sum", None
        return judge

    @property
    def names(self) -> list[str]:
        """Of the score columns."""
        if self.prefer == "pairwise":
            ((name, scorer),) = self.scorers.items()
            return [f"{name}_{place}" for place in range(scorer.dim)]
        return list(self.scorers)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Float[NDArray[np.float32], "N J"]:
        """A column per scorer. What a scorer could not judge (no finite number) is NaN, for the caller to count.

        A scorer that raises is asked a second time: a server may have been away for a moment. One that hangs is not.

        Raises:
            UserError: a scorer refuses its input (ValueError).
            RuntimeError: it failed twice, gave no answer in time, or another number of scores.
        """
        if self.prefer == "pairwise":
            return self._asked(
                lambda scorer: scorer.represent(list(images), list(prompts)), (len(images), len(self.names))
            )
        return self._asked(lambda scorer: scorer.score(list(images), list(prompts)), (len(images),))

    def _asked(self, ask: Callable[[Any], Any], shape: tuple[int, ...]) -> Float[NDArray[np.float32], "N J"]:
        columns = []
        for name, scorer in self.scorers.items():

            def call(scorer: Any = scorer) -> Any:
                return ask(scorer)

            what = f"scorer {name}"
            try:
                try:
                    values = within(self.timeout, call, what)
                except (ValueError, NoAnswer):
                    raise
                except Exception:  # any kind: the second failure is told in full
                    values = within(self.timeout, call, what)
            except ValueError as error:
                raise UserError(f"{what}: {' '.join(str(error).split())}") from error
            except NoAnswer:
                raise
            except Exception as error:
                told = " ".join(f"{type(error).__name__}: {error}".split())
                raise RuntimeError(f"{what} failed twice: {told}; the same command resumes") from error
            column = torch.as_tensor(values).detach().float().cpu().numpy()
            if column.shape != shape:
                raise RuntimeError(f"{what} gave scores of shape {column.shape} for {shape[0]} images")
            columns.append(np.where(np.isfinite(column), column, np.nan))
        return np.column_stack(columns)

    def score_pixels(
        self, pixels: Float[Tensor, "N 3 H W"], prompts: Sequence[str], timestep: float
    ) -> Float[NDArray[np.float32], "N J"]:
        """`score` of previews in [0, 1], taken at the network's time `timestep`, which step-aware scorers are told.

        Raises:
            UserError, RuntimeError: as `score`.
        """
        images: list[Image.Image] = []

        def of(scorer: Any) -> Any:
            if "timestep" in scorer.info.inputs:
                with torch.no_grad():
                    times = torch.full((len(pixels),), timestep, device=pixels.device)
                    return scorer.score_tensor(pixels, list(prompts), timestep=times).float().cpu().numpy()
            if not images:
                arrays = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().clip(0, 255).astype(np.uint8)
                images.extend(Image.fromarray(array) for array in arrays)
            return scorer.score(images, list(prompts))

        return self._asked(of, (len(pixels),))

    def utility(self, scores: Float[NDArray[np.float32], "K J"]) -> Float[NDArray[np.float64], " K"]:
        """One number per candidate of a prompt, NaN where a scorer had none: the weighted sum; for `maximin` the worst
        of its scores, each standardised over the candidates that all scorers judged; for `pairwise` its mean
        probability to beat the others."""
        is_judged = np.isfinite(scores).all(axis=1)
        utility = np.full(len(scores), np.nan)
        if is_judged.any():
            utility[is_judged] = preference_rules.utility(self._values(scores[is_judged]), self.prefer, self.weights)
        return utility

    def _values(self, scores: Float[NDArray[np.float32], "K J"]) -> Float[NDArray[np.float64], "K J"]:
        """What the rules take: scores, or P(row beats column) [K K] of embeddings."""
        if self.prefer != "pairwise":
            return scores.astype(float)
        (scorer,) = self.scorers.values()
        return np.asarray(scorer.win_table(torch.from_numpy(np.ascontiguousarray(scores))), dtype=float)

    def pairs(self, scores: Float[NDArray[np.float32], "K J"], rule: Pairs, min_margin: float) -> list[tuple[int, int]]:
        """(winner, loser) among the candidates of a prompt; candidates without a score are left out.

        `best-worst`: one pair; `all`: every two that differ; by `prefer` as in `preference_rules.compare`. Of the
        best-worst rule `maximin` and `pairwise` take the extremes that they name, others the pair of the largest size.
        """
        judged = np.flatnonzero(np.isfinite(scores).all(axis=1))
        if len(judged) < 2:
            return []
        verdict = preference_rules.compare(self._values(scores[judged]), self.prefer, self.weights, min_margin)
        if rule == "best-worst" and verdict.extremes is not None:
            best, worst = verdict.extremes
            return [(int(judged[best]), int(judged[worst]))] if verdict.extremes_differ else []
        found = [(int(w), int(loser)) for w, loser in np.argwhere(verdict.wins)]
        if rule == "best-worst" and found:
            found = [max(found, key=lambda pair: verdict.size[pair])]
        return [(int(judged[w]), int(judged[loser])) for w, loser in found]
