"""A run's config: files merged from left to right, then `key=value`, checked strictly before anything is loaded.

A bare name finds `configs/models/`, `configs/methods/` or `configs/runs/`; a path is a path. So M models and N methods
cost M + N files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffalign.registry import build, build_dataclass, suggest
from diffalign.sections import (
    SECTIONS,
    Agree,
    App,
    Evaluate,
    Export,
    Filter,
    Generate,
    Label,
    Log,
    Sampling,
    Score,
    Stages,
    Stop,
    Sweep,
    Train,
    TrainScorer,
)
from diffalign.types import UserError

COMPONENTS = ("model", "source", "likelihood", "reference", "objective")


@dataclass(frozen=True)
class Config:
    """A resolved config: every section built, every default filled in. Components are None where not configured."""

    model: Any = None
    source: Any = None
    likelihood: Any = None
    reference: Any = None
    objective: Any = None
    train: Train = field(default_factory=Train)
    train_scorer: TrainScorer = field(default_factory=TrainScorer)
    sampling: Sampling = field(default_factory=Sampling)
    generate: Generate = field(default_factory=Generate)
    score: Score = field(default_factory=Score)
    label: Label = field(default_factory=Label)
    agree: Agree = field(default_factory=Agree)
    filter: Filter = field(default_factory=Filter)
    stages: Stages = field(default_factory=Stages)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)
    stop: Stop = field(default_factory=Stop)
    sweep: Sweep = field(default_factory=Sweep)
    log: Log = field(default_factory=Log)
    app: App = field(default_factory=App)
    names: Mapping[str, str] = field(default_factory=dict)  # component -> its name
    unnamed: Mapping[str, Any] = field(default_factory=dict)  # components of which keys are given, but no name
    title: str = "run"  # from the config files' names, for the default run folder

    def require(self, *components: str) -> None:
        """Refuses a config without one of the components.

        Raises:
            UserError: names the section and how to give it.
        """
        for component in components:
            if getattr(self, component) is None:
                kind = "models" if component == "model" else "methods"
                said = f"keys are given for it, but no {component}.name" if component in self.unnamed else "none given"
                names = ", ".join(config_names(kind))
                raise UserError(f"no {component} configured ({said}): name one ({names}) or set {component}.name")

    def to_dict(self, sections: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain mappings, as written to `config.yaml`; it resolves to the same config."""
        result: dict[str, Any] = {}
        for name in sections or (*COMPONENTS, *SECTIONS):
            value = getattr(self, name)
            if value is None:
                continue
            values = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
            result[name] = {"name": self.names[name], **values} if name in self.names else values
        return result


TRAINING_SECTIONS = (*COMPONENTS, "train", "sampling", "stop", "log")


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of a resolved config, without the keys that do not change what is computed."""
    kept = json.loads(json.dumps(config))
    for section in ("train", "train_scorer"):
        for key in ("out", "keep_checkpoints", "checkpoint_every"):
            kept.get(section, {}).pop(key, None)
    kept.pop("log", None)
    # what is not switched on changes nothing: folders from before a key existed go on
    for name in ("stop", "train_scorer", "generate", "score", "label", "evaluate"):
        default = json.loads(json.dumps(_plain(SECTIONS[name]())))
        changed = {key: value for key, value in kept.pop(name, {}).items() if value != default.get(key)}
        kept |= {name: changed} if changed else {}
    if "source" in kept and kept["source"].get("part") is None:
        kept["source"].pop("part", None)
    for section in kept.values():
        for key in ("users", "user", "user_data", "user_shots", "by_users"):
            if section.get(key) is None or section[key] is False:
                section.pop(key, None)
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def config_folder() -> Path:
    """The shipped configs: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names(kind: str) -> list[str]:
    """Names of the shipped configs of a kind: models, methods or runs."""
    return sorted(path.stem for path in (config_folder() / kind).glob("*.yaml"))


def _read(token: str) -> tuple[str, dict[str, Any]]:
    path = Path(token)
    if not (path.suffix in (".yaml", ".yml") or "/" in token):
        found = [config_folder() / kind / f"{token}.yaml" for kind in ("models", "methods", "runs")]
        path = next((candidate for candidate in found if candidate.is_file()), path)
        if not path.is_file():
            legal = [name for kind in ("models", "methods", "runs") for name in config_names(kind)]
            raise UserError(f"no config named {token!r}.{suggest(token, legal)}")
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no config file {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `train:` with keys below them")
    return path.stem, content


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` over `base`, section by section; a component of another name starts from its own defaults."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            renamed = "name" in value and "name" in old and value["name"] != old["name"]
            merged[key] = dict(value) if renamed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _override(token: str) -> dict[str, Any]:
    key, _, text = token.partition("=")
    try:
        value: Any = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    return nested(key, value)


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` and 1 as {a: {b: 1}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`key=value` tokens as nested sections."""
    return merge_settings([_override(token) for token in tokens])


def merge_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested sections, merged from left to right."""
    merged: dict[str, Any] = {}
    for setting in settings:
        merged = _merge(merged, setting)
    return merged


def resolve(tokens: Sequence[str | Mapping[str, Any]]) -> Config:
    """Merges config names, paths, mappings and `key=value` overrides, and builds every section.

    Raises:
        UserError: an unknown file, section, key or name, or a wrong type; one line that says what is legal.
    """
    merged: dict[str, Any] = {}
    titles: list[str] = []
    for token in tokens:
        if isinstance(token, Mapping):
            merged = _merge(merged, token)
        elif "=" in token:
            merged = _merge(merged, _override(token))
        else:
            title, content = _read(token)
            titles.append(title)
            merged = _merge(merged, content)
    built: dict[str, Any] = {}
    names: dict[str, str] = {}
    unnamed: dict[str, Any] = {}
    for section, values in merged.items():
        if section not in (*COMPONENTS, *SECTIONS):
            raise UserError(f"unknown section {section!r}.{suggest(section, [*COMPONENTS, *SECTIONS])}")
        if not isinstance(values, Mapping):
            raise UserError(f"{section} must hold keys, for example {section}.name=... (got {values!r})")
        if section in COMPONENTS and "name" not in values:
            unnamed[section] = values  # a verb that needs the component refuses; the others go on without
        elif section in COMPONENTS:
            built[section] = build(section, values)
            names[section] = str(values["name"])
        else:
            built[section] = build_dataclass(SECTIONS[section], values, section)
    return Config(**built, names=names, unnamed=unnamed, title="-".join(titles) or "run")
