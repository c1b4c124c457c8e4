"""Which runs a sweep consists of: section `sweep` as resolved configs, all checked before any of them is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.config import (
    COMPONENTS,
    SECTIONS,
    TRAINING_SECTIONS,
    Config,
    fingerprint,
    merge_settings,
    nested,
    resolve,
)
from diffalign.recipes._fit import check_data, check_needs
from diffalign.recipes._stopping import check_stop
from diffalign.types import UserError

# what a setting may not change: runs then would not share their base model, their judgement or their folders
FIXED = {
    "model.name": "sweep one model at a time",
    "model.path": "sweep one model at a time",
    "train.seed": "give sweep.seeds",
    "train.out": "every run has its folder below sweep.out",
}
VARIED = tuple(section for section in TRAINING_SECTIONS if section not in ("sampling", "log"))
NAME_LENGTH = 60  # of a setting's part of a folder's name


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: what is set, what it is called, and its run of each training seed."""

    name: str  # beta=1000, lr=0.001
    label: str  # short, for charts: 1000, 0.001
    values: Mapping[str, Any]  # key -> resolved value
    runs: Mapping[int, Config]  # training seed -> the run's config


def _settings(config: Config) -> list[dict[str, Any]]:
    """Section `sweep` as one mapping of keys to values per setting.

    Raises:
        UserError: it says nothing.
    """
    sweep = config.sweep
    if sweep.key:
        return [{sweep.key: value} for value in sweep.values]
    if sweep.grid:
        return [dict(zip(sweep.grid, row, strict=True)) for row in itertools.product(*sweep.grid.values())]
    if not sweep.points:
        raise UserError(
            "sweep.key is missing: sweep.key=objective.beta sweep.values=[500,1000] (or sweep.grid, .points)"
        )
    return [dict(point) for point in sweep.points]


def value_at(config: Config, key: str) -> Any:
    """The resolved value of a dotted key; None where there is none."""
    section, *rest = key.split(".")
    value = getattr(config, section)
    if rest == ["name"]:
        return config.names.get(section)
    for part in rest:
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _short(keys: Sequence[str]) -> dict[str, str]:
    """key -> its last part, or the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def folder_name(name: str, seed: int) -> str:
    """A run's part of a path: readable, safe on every file system, and never the same for two settings."""
    plain = name.replace(", ", ",").replace("=", "-")
    safe = re.sub(r"[^A-Za-z0-9._,+-]+", "-", plain)
    if safe != plain or len(safe) > NAME_LENGTH:
        safe = f"{safe[:NAME_LENGTH]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    return f"{safe}-seed{seed}"


def settings_of(config: Config, out: Path) -> list[Setting]:
    """Every setting with its runs, resolved and checked as `train` would check them, data included.

    Raises:
        UserError: the key or value at fault, before anything is loaded or written.
    """
    config.require(*COMPONENTS)
    chosen = _settings(config)
    keys = list(dict.fromkeys(key for setting in chosen for key in setting))
    short = _short(keys)
    base = config.to_dict([*COMPONENTS, *(section for section in SECTIONS if section != "sweep")])
    result, seen = [], dict[str, str]()
    for setting in chosen:
        words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in setting.items()}
        name = ", ".join(f"{short[key]}={word}" for key, word in words.items())
        try:
            changed = resolve([base, merge_settings([nested(key, value) for key, value in setting.items()])])
            _refuse_fixed(config, changed)
            runs = {}
            for seed in config.sweep.seeds or (config.train.seed,):
                folder = out / "runs" / folder_name(name, seed)
                run = replace(changed, train=replace(changed.train, seed=seed, out=str(folder)), title=config.title)
                mark = fingerprint(run.to_dict(TRAINING_SECTIONS))
                if mark in seen:
                    raise UserError(f"it is the same run as {seen[mark]}")
                seen[mark] = name
                runs[seed] = run
            check_needs(changed)
            check_stop(changed)
            check_data(changed)
        except UserError as error:
            raise UserError(f"setting {name} ({', '.join(setting)}): {error}") from error
        result.append(Setting(name, ", ".join(words.values()), {key: value_at(changed, key) for key in keys}, runs))
    return result


def _refuse_fixed(base: Config, changed: Config) -> None:
    """Refuses what would make a run incomparable with the others.

    Raises:
        UserError: names the key and what to do.
    """
    for key, advice in FIXED.items():
        if value_at(changed, key) != value_at(base, key):
            raise UserError(f"{key} cannot vary in a sweep: {advice}")
    for section in SECTIONS:
        if section not in VARIED and getattr(changed, section) != getattr(base, section) and section != "sweep":
            raise UserError(f"{section} cannot vary in a sweep, which changes what is trained: {', '.join(VARIED)}")
