"""A view made definite: which columns, prompts and numbers, and the `generate.vary` that makes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.config import Config, Sampling, merge_settings, resolve
from diffalign.data._prompt_sets import SETS
from diffalign.data._prompts import SMOKE, read_prompts
from diffalign.recipes.generate._manifest import image_name
from diffalign.recipes.generate._variants import Variant, variants
from diffalign.recipes.painter._found import Contestant, ready
from diffalign.recipes.painter._view import MAX_STRENGTH, View, number, within
from diffalign.types import UserError


@dataclass(frozen=True)
class Column:
    """One way to make pictures, as a view shows it."""

    contestant: str
    detail: str  # what of it varies, or nothing
    variant: Variant

    @property
    def label(self) -> str:
        """Both."""
        return f"{self.contestant}, {self.detail}" if self.detail else self.contestant


@dataclass(frozen=True)
class Plan:
    """A view made definite. `config` is what `diffalign generate` makes the same pictures of."""

    view: View
    columns: list[Column]
    prompts: list[str]
    numbers: list[int]
    config: Config


def plan(
    view: View,
    config: Config,
    found: Mapping[str, Contestant],
    *,
    exports: Path,
    below: Callable[[str], Path],
    limit: int,
) -> Plan:
    """What a view asks for, of what `contestants` found; a chosen checkpoint is exported to `exports`.

    Args:
        below: resolves the path of a prompt set, or refuses it.
        limit: pictures, at most.

    Raises:
        UserError: nothing or too much to paint, an unknown contestant, or a value that does not fit.
    """
    prompts, numbers = _texts(view.prompts, below, limit), view.numbers()
    chosen = _chosen(view, found)
    num = len(chosen) * len(prompts) * len(numbers)
    if not num:
        raise UserError("contestants: choose a model or adapter" if prompts else "prompts: write one")
    if num > limit:
        told = f"{len(chosen)} columns x {len(prompts)} prompts x {len(numbers)} seeds are {num} pictures"
        raise UserError(f"{told}, and a comparison has at most {limit} (app.max_pictures): take fewer")
    names = _folders([f"{name}-{detail}" if detail else name for name, _, detail, _ in chosen])
    entries = []
    for name, (_, contestant, _, keys) in zip(names, chosen, strict=True):
        user = {"user": config.generate.user} if contestant.has_users else {}
        entries.append(merge_settings([ready(contestant, exports), user, keys, {"as": name}]))
    sampling = {"sampler": view.sampler, "num_steps": view.steps, "cfg_scale": view.cfg, "eta": view.eta}
    generate: dict[str, Any] = {
        "prompts": "prompts.jsonl",
        "out": None,
        "vary": entries,
        "images_per_prompt": max(numbers) + 1,
        "only": [],
        "user": None,
        "select": None,
        "scorers": [],
        "weights": [],
    }
    if numbers != list(range(len(numbers))):
        files = (image_name(prompt, number) for prompt in range(len(prompts)) for number in numbers)
        generate["only"] = [f"{name}/{file}" for file in files for name in names]
    base = config.to_dict(("model", "sampling", "generate"))
    made = resolve([base, {"sampling": sampling, "generate": generate}])
    columns = [
        Column(name, detail, variant)
        for (name, _, detail, _), variant in zip(chosen, variants(made), strict=True)
    ]  # fmt: skip
    return Plan(view, columns, prompts, numbers, made)


def _chosen(view: View, found: Mapping[str, Contestant]) -> list[tuple[str, Contestant, str, dict[str, Any]]]:
    """(name, contestant, detail, keys) of every column; what a contestant cannot vary in makes one column of it."""
    columns: list[tuple[str, Contestant, str, dict[str, Any]]] = []
    for said in dict.fromkeys(view.contestants):
        name, at, text = (said, "", "") if said in found else _apart(said)
        contestant = found.get(name)
        if contestant is None:
            raise UserError(f"contestants: there is no {said[:200]!r} (refresh the list, or see app.roots)")
        keys: dict[str, Any] = {}
        if at:
            if not contestant.has_strength:
                raise UserError(f"contestants: {name} is no adapter, and has no strength")
            keys["adapter_scale"] = within("strength", number("strength", text), -MAX_STRENGTH, MAX_STRENGTH)
        label = name if view.vary == "strength" else said  # then it has all strengths, not its own
        if any(label == column[0] for column in columns):
            continue
        varies = {"strength": contestant.has_strength, "user": contestant.has_users}.get(view.vary, True)
        for detail, more in view.variations() if varies else [("", {})]:
            columns.append((label, contestant, detail, keys | more))
    return columns


def _apart(said: str) -> tuple[str, str, str]:
    """NAME, @ and the strength of NAME@0.5; the name alone where there is no strength."""
    name, at, text = said.rpartition("@")
    return (name, at, text) if at else (said, "", "")


def _texts(said: Sequence[str], below: Callable[[str], Path], limit: int) -> list[str]:
    """The prompts in order, each once."""
    texts: list[str] = []
    for line in said:
        name, _, path = line.strip().partition(":")
        if name in SETS and path:
            texts += read_prompts({"name": name, "path": str(below(path))}, "prompts")
        elif name == "sprites" and path:
            if (found := re.match(r"\w+:(\d+)", path)) and (len(found[1]) > 6 or int(found[1]) > limit):
                raise UserError(f"prompts: {line.strip()[:80]} are more than {limit}: take fewer")
            texts += read_prompts(line.strip(), "prompts")
        elif line.strip() == SMOKE:
            texts += read_prompts(SMOKE, "prompts")
        elif line.strip():
            texts.append(line.strip())
    return list(dict.fromkeys(texts))


def _folders(labels: Sequence[str]) -> list[str]:
    """A folder's name for each label, all different, also where upper and lower case are one."""
    found: list[str] = []
    for label in labels:
        name = re.sub(r"[^\w.+-]+", "_", label).lstrip("_.+-")[:80] or "variant"
        taken = {other.lower() for other in found}
        free = (f"{name}-{number}" if number else name for number in range(len(labels) + 1))
        found.append(next(each for each in free if each.lower() not in taken))
    return found


def first_view(config: Config, found: Mapping[str, Contestant], prompts: Sequence[str]) -> View:
    """What a form begins with: the config's model beside its newest adapter, two seeds, its sampling settings.

    The embedded models are sampled without guidance where the config says nothing of it: so they were trained.
    """
    own = list(found.values())[:1]
    adapters = [one for one in found.values() if one.entry.get("adapter") and "model" not in one.entry]
    newest = sorted(adapters, key=lambda one: Path(one.entry["adapter"]).stat().st_mtime)[-1:]
    others = newest or list(found.values())[1:2]
    sampling = config.sampling
    is_embedded = config.model is not None and config.model.path.startswith("package:diffalign.sprites")
    is_told = sampling != Sampling()
    return View(
        contestants=tuple(one.name for one in [*own, *others]),
        prompts=tuple(prompts),
        steps=20 if is_embedded and not is_told else sampling.num_steps,
        cfg=1.0 if is_embedded and not is_told else sampling.cfg_scale,
        sampler=sampling.sampler,
        eta=sampling.eta,
        scorers=("sprites_gold",) if is_embedded else (),
    )
