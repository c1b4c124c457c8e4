"""How one of several candidates is kept: best-of-N, and the potential search of PARM (arXiv 2501.13926).

PARM asks a verifier three questions of every path of a sampler: is the preview clear enough to be judged, can it still
become a picture of the prompt, and, of finished ones, which is best. Here any scorers with thresholds answer them.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from diffalign.registry import build_dataclass, suggest
from diffalign.scorers._build import scorer_key
from diffalign.sections import Generate
from diffalign.sources._judge import Judge
from diffalign.types import UserError

KEY = "generate.select"
PRESETS: dict[str, dict[str, Any]] = {"best-of-n": {}, "parm": {"checks": (0.5,), "keep": (0.25,)}}
Spec = str | dict[str, Any]
Reflect = Callable[[Image.Image, str], str | None]


@dataclass(frozen=True)
class Selection:
    """The keys of `generate.select` beside its name.

    checks: shares of the sampler's steps after which candidates are judged by their preview (the clean picture
        predicted there); 0.5 by itself for parm, none for best-of-n.
    keep: share of the candidates that goes on after a check at most, of those with a verdict; one number for all
        checks, or one for each. The Nth part rounds up, and one always goes on. 1 prunes by `potential_from` alone.
    clarity, clear_from: scorers of a preview, and the score from which it is clear: a candidate gets no verdict
        before. Without them every preview is clear. What is clear at no check is given up at the last.
    potential: scorers of a clear preview's potential; default: generate.scorers and their weights.
    potential_from: candidates of less potential are given up.
    ask_again: judge the potential anew at every check (successive halving); off, the first verdict stays, as in PARM.
    preview: `full`; `half` decodes latents of half the size; or the folder of a tiny decoder (AutoencoderTiny).
    reflect: `pkg.module:callable`, given a finished picture and its prompt; what it returns is a revised prompt to
        sample anew with, or None. The picture that scores best on the user's own prompt is kept.
    reflections: revised prompts per picture at most; PARM++ has three.
    """

    checks: tuple[float, ...] = ()
    keep: tuple[float, ...] = (1.0,)
    clarity: tuple[Spec, ...] = ()
    clear_from: float | None = None
    potential: tuple[Spec, ...] = ()
    potential_from: float | None = None
    ask_again: bool = False
    preview: str = "full"
    reflect: str | None = None
    reflections: int = 3

    def __post_init__(self) -> None:
        if list(self.checks) != sorted(set(self.checks)) or not all(0 < share < 1 for share in self.checks):
            raise UserError(f"{KEY}.checks must be rising shares of the steps between 0 and 1 (got {self.checks})")
        if len(self.keep) not in (1, len(self.checks)) or not all(0 < share <= 1 for share in self.keep):
            raise UserError(
                f"{KEY}.keep must be a share above 0, up to 1, for all of {KEY}.checks or for each (got {self.keep})"
            )
        if bool(self.clarity) != (self.clear_from is not None):
            missing, there = ("clear_from", "clarity") if self.clarity else ("clarity", "clear_from")
            raise UserError(f"{KEY}.{missing} is missing: {KEY}.{there} needs it")
        asks = self.keep != (1.0,) or self.clarity or self.potential or self.potential_from is not None
        if not self.checks and (asks or self.ask_again):
            raise UserError(f"{KEY}.checks is empty, so no preview is judged: set {KEY}.name=parm")
        if self.reflections < 1:
            raise UserError(f"{KEY}.reflections must be at least 1 (got {self.reflections})")

    def steps(self, num_steps: int) -> list[int]:
        """The indices of the steps after which there is a check, of `num_steps`.

        Raises:
            UserError: two checks at one step, or one at the last, where nothing is left to save.
        """
        found = [math.ceil(round(share * num_steps, 6)) - 1 for share in self.checks]
        if len(set(found)) != len(found) or (found and found[-1] >= num_steps - 1):
            raise UserError(f"{KEY}.checks={list(self.checks)}: no such steps apart in sampling.num_steps={num_steps}")
        return found

    def limit(self, check: int, candidates: int) -> int:
        """How many of the candidates with a verdict go on after a check."""
        share = self.keep[0] if len(self.keep) == 1 else self.keep[check]
        return max(1, math.ceil(round(share * candidates, 6)))

    @cached_property
    def hook(self) -> Reflect | None:
        """What `reflect` names.

        Raises:
            UserError: nothing callable.
        """
        if self.reflect is None:
            return None
        module, _, attribute = self.reflect.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"{KEY}.reflect={self.reflect}: cannot import it ({error})") from error
        if not callable(found):
            raise UserError(f"{KEY}.reflect={self.reflect}: is not callable")
        return found


@dataclass(frozen=True)
class Judges:
    """Who answers the three questions."""

    outcome: Judge
    potential: Judge
    clarity: Judge | None


def selection_of(settings: Generate) -> tuple[Selection, Judges] | None:
    """What `generate.select` asks for, its scorers built; None where every picture is kept.

    Raises:
        UserError: an unknown name, key or scorer, or values that do not fit.
    """
    if settings.select is None:
        return None
    spec = {"name": settings.select} if isinstance(settings.select, str) else dict(settings.select)
    name = str(spec.pop("name", ""))
    if name not in PRESETS:
        raise UserError(f"{KEY}.name={name!r}: unknown.{suggest(name, list(PRESETS))}")
    if name == "best-of-n" and spec.get("checks"):
        raise UserError(f"{KEY}.checks prunes, which best-of-n does not: set {KEY}.name=parm")
    selection = build_dataclass(Selection, PRESETS[name] | spec, KEY)
    outcome = _judge(settings.scorers, settings.weights, "generate.scorers")
    potential = _judge(selection.potential, (), f"{KEY}.potential") if selection.potential else outcome
    clarity = _judge(selection.clarity, (), f"{KEY}.clarity") if selection.clarity else None
    _ = selection.hook
    return selection, Judges(outcome, potential, clarity)


def _judge(specs: Sequence[str | Mapping[str, Any]], weights: Sequence[float], key: str) -> Judge:
    called = [scorer_key(spec) for spec in specs]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{key} names {twice!r} twice: give one of them another name with `as`")
    try:
        return Judge(specs, weights, "sum", None)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
