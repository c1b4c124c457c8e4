"""What people set up to compare: the fields of a form, and the words of a link."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal
from urllib.parse import urlencode

from diffalign.registry import build_dataclass, suggest
from diffalign.sampling import SAMPLERS
from diffalign.types import UserError

LISTS = {"c": "contestants", "p": "prompts", "score": "scorers"}  # words of a link that may be there several times
MAX_LINK = 8000  # characters that browsers and servers carry without fail
MAX_STEPS, MAX_CFG, MAX_STRENGTH, MAX_NUMBER = 1000, 100.0, 10.0, 9_999
MAX_PROMPT = 20_000  # characters
MIXES = 5  # of ann..bob


@dataclass(frozen=True, kw_only=True)
class View:
    """One comparison as it is set up.

    contestants: their names; NAME@0.5 is an adapter at that strength.
    prompts: texts; a prompt set (sprites:heldout:8:two, smoke, or NAME:PATH) stands for its prompts.
    seeds: numbers of the pictures of each prompt: 0-3, or 0,5.
    vary: what else differs between columns; `seeds` makes a column of every seed.
    values: of what varies, with commas: 10,20,40. Users: ann, ann:0.7+bob:0.3, or ann..bob for five mixtures.

    Raises:
        UserError: a value that does not fit.
    """

    contestants: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    seeds: str = "0-1"
    steps: int = 20
    cfg: float = 5.0
    sampler: str = "default"
    eta: float = 0.0
    scorers: tuple[str, ...] = ()
    vary: Literal["none", "seeds", "steps", "cfg", "strength", "user"] = "none"
    values: str = ""

    def __post_init__(self) -> None:
        within("steps", self.steps, 1, MAX_STEPS)
        within("cfg", self.cfg, 0, MAX_CFG)
        within("eta", self.eta, 0, 1)
        if self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {self.sampler[:80]!r}.{suggest(self.sampler[:80], list(SAMPLERS))}")
        if (longest := max(map(len, self.prompts), default=0)) > MAX_PROMPT:
            raise UserError(f"prompts: one has {longest} characters, and {MAX_PROMPT} are taken")
        self.numbers()
        self.variations()

    def link(self) -> str:
        """The query string from which `from_link` makes this view again.

        Raises:
            UserError: it would be too long for a link.
        """
        words: list[tuple[str, str]] = []
        short = {field: word for word, field in LISTS.items()}
        default = View()
        for field, value in asdict(self).items():
            if field in short:
                words += [(short[field], item) for item in value]
            elif value != getattr(default, field) or field in ("seeds", "steps", "cfg"):
                words.append((field, f"{value:.12g}" if isinstance(value, float) else str(value)))
        found = urlencode(words, safe=":/@,.")
        if len(found) > MAX_LINK:
            raise UserError(f"the prompts make the link longer than {MAX_LINK} characters: download the comparison")
        return found

    @staticmethod
    def from_link(words: Sequence[tuple[str, str]]) -> View:
        """The view of a link's words and their values, as strangers may have written them.

        Raises:
            UserError: an unknown word, one that is there twice, or a value that does not fit.
        """
        values: dict[str, Any] = {}
        legal = [*LISTS, *(field.name for field in fields(View) if field.name not in LISTS.values())]
        for word, value in words:
            if word not in legal:
                raise UserError(f"link: unknown word {word[:80]!r}.{suggest(word[:80], legal)}")
            if word in LISTS:
                values[LISTS[word]] = (*values.get(LISTS[word], ()), value)
            elif word in values:
                raise UserError(f"link: {word} is there twice")
            else:
                values[word] = value
        return View.of(values)

    @staticmethod
    def of(values: Mapping[str, Any]) -> View:
        """The view of values by field, as a form gives them.

        Raises:
            UserError: an unknown field, or a value that does not fit.
        """
        view: View = build_dataclass(View, values, "compare")
        return view

    def numbers(self) -> list[int]:
        """The seeds, in order, each once."""
        found: set[int] = set()
        for part in _parts("seeds", self.seeds):
            ends = re.fullmatch(r"(\d{1,5})(?:\s*-\s*(\d{1,5}))?", part)
            first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
            if not first <= last <= MAX_NUMBER:
                raise UserError(f"seeds={self.seeds[:80]!r}: write 0-3, or 0,5, up to {MAX_NUMBER}")
            found.update(range(first, last + 1))
        return sorted(found)

    def variations(self) -> list[tuple[str, dict[str, Any]]]:
        """(what a column says of it, keys of a `generate.vary` entry) of every value; one that changes nothing."""
        if self.vary in ("none", "seeds"):
            return [("", {})]
        parts = _parts("values", self.values)
        if self.vary == "user":
            users = [user for part in parts for user in _users(part)]
            return [(_shown(user), {"user": user}) for user in users]
        made: dict[str, Callable[[float], dict[str, Any]]] = {
            "steps": lambda value: {"sampling": {"num_steps": round(value)}},
            "cfg": lambda value: {"sampling": {"cfg_scale": value}},
            "strength": lambda value: {"adapter_scale": value},
        }
        low, high = {"steps": (1, MAX_STEPS), "cfg": (0, MAX_CFG), "strength": (-MAX_STRENGTH, MAX_STRENGTH)}[self.vary]
        values = [number(self.vary, part) for part in parts]
        for value in values:
            within(self.vary, value, low, high)
            if self.vary == "steps" and value != round(value):
                raise UserError(f"steps: {value:g} is no whole number")
        return [(f"{self.vary} {value:g}", made[self.vary](value)) for value in dict.fromkeys(values)]


def _users(part: str) -> list[Any]:
    """ann; {ann: 0.7, bob: 0.3}; or the mixtures from ann to bob."""
    first, is_range, last = part.partition("..")
    if is_range:
        shares = [index / (MIXES - 1) for index in range(MIXES)]
        mixed = [{first.strip(): 1 - share, last.strip(): share} for share in shares]
        return [{user: share for user, share in mix.items() if share} for mix in mixed]
    weights = {}
    for word in part.split("+"):
        user, is_weighted, weight = word.strip().rpartition(":")
        weights[user if is_weighted else word.strip()] = number("user", weight) if is_weighted else 1.0
    return [next(iter(weights)) if list(weights.values()) == [1.0] else weights]


def _shown(user: Any) -> str:
    return " + ".join(f"{share:g} {name}" for name, share in user.items()) if isinstance(user, dict) else f"user {user}"


def _parts(key: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or len(parts) > 1000:
        raise UserError(f"{key}: give one or more, with commas between them")
    return parts


def number(key: str, text: str) -> float:
    """A finite number.

    Raises:
        UserError: names the key.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{key}: {text[:80]!r} is no number")
    return value


def within(key: str, value: float, low: float, high: float) -> float:
    """The value, if it lies between the two.

    Raises:
        UserError: names the key.
    """
    if not low <= value <= high:
        raise UserError(f"{key} must lie in {low:g} to {high:g} (got {value:g})")
    return value
