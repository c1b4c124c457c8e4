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
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator

from diffalign.registry import build, build_dataclass, suggest
from diffalign.types import UserError


@dataclass(frozen=True)
class Train:
    """The training loop. Batch sizes count prompts (pairs), over all devices unless said otherwise."""

    out: str | None = None  # run folder; runs/<names of the config files> where not given
    steps: int = 1000  # optimizer steps
    batch_size: int = 64  # prompts per optimizer step, over all devices
    micro_batch_size: int | None = None  # prompts per device and forward call; default: the device's whole share
    lr: float = 1e-5
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    ema: float = 0.0  # decay per step of the exported weights' moving average; 0 is off
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the GPU has it, else fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    validate_every: int = 100  # steps between held-out preference accuracies; 0 is off
    validate_prompts: int = 256  # held-out prompts used, at most
    validate_draws: int = 4  # noise levels per held-out prompt
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    sample_prompts: tuple[str, ...] = ()  # default: the first held-out prompts

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "validate_draws"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1 (got {getattr(self, name)})")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"train.micro_batch_size must be at least 1 (got {self.micro_batch_size})")
        if not 0 <= self.ema < 1:
            raise UserError(f"train.ema must lie in [0, 1) (got {self.ema})")


@dataclass(frozen=True)
class Sampling:
    """How images are made: shared by `generate`, by `evaluate` and by the sample grids of `train`."""

    sampler: Literal["default", "ddim", "ddpm", "euler", "flow-euler", "flow-sde"] = "default"
    num_steps: int = 25
    cfg_scale: float = 5.0
    eta: float = 0.0
    batch_size: int = 16  # images per call


@dataclass(frozen=True)
class Generate:
    """Prompts to images. Every image is addressed by (seed, prompt, its number), so models can be compared on it."""

    prompts: str | None = None  # a text file (one per line), a JSONL file with `prompt`, or sprites:<split>:<n>[:kind]
    out: str | None = None
    adapter: str | None = None  # an exported LoRA
    adapter_scale: float = 1.0
    images_per_prompt: int = 4
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Score:
    """Scorers over generated images."""

    images: str | None = None  # a folder that `generate` wrote
    scorers: tuple[str, ...] = ("sprites_gold",)
    out: str | None = None  # default: scores.jsonl in the images folder


@dataclass(frozen=True)
class Label:
    """From scores to preference records."""

    scores: str | None = None  # scores.jsonl that `score` wrote
    scorer: str | None = None  # default: the only one there
    rule: Literal["best-worst", "all-pairs", "ranking"] = "best-worst"  # ranking: one list per prompt
    min_margin: float = 0.0  # pairs whose scores differ by no more are not made
    out: str | None = None  # Parquet file of records


@dataclass(frozen=True)
class Evaluate:
    """Same prompts and seeds for all models; the first is the baseline."""

    prompts: str | None = None
    adapters: tuple[str, ...] = ()  # exported LoRA folders; the base model comes first by itself
    names: tuple[str, ...] = ()  # default: the adapters' run folder names
    scorers: tuple[str, ...] = ("sprites_gold",)
    train_scorers: tuple[str, ...] = ()  # judges the labels came from: reported apart, never silently concluded from
    seeds: int = 1  # images per prompt
    seed: int = 1000
    out: str | None = None
    run: str | None = None  # a training run whose curves and facts go into the report
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Export:
    """A run's trained weights in other tools' formats."""

    run: str | None = None
    out: str | None = None
    format: Literal["diffusers", "kohya"] = "diffusers"
    step: int | None = None  # default: the newest checkpoint


@dataclass(frozen=True)
class Stop:
    """When `train` ends before its last step, which weights it exports, and the over-optimisation alarm; off as it is.

    A measurement is a validation (`train.validate_every`) for holdout/..., a sample grid (`train.sample_every`) for
    samples/...
    """

    metric: str | None = None  # holdout/<name>, samples/<scorer> or samples/diversity: its best checkpoint is kept
    mode: Literal["max", "min"] = "max"  # which way the metric is better
    patience: int = 0  # measurements in a row without improvement after which training ends; 0: never
    min_delta: float = 0.0  # an improvement is more than this, in the metric's unit
    restore_best: bool = False  # export the weights that measured best instead of the last
    scorers: tuple[str, ...] = ()  # judge the sample grids
    seeds: int = 1  # pictures per sample prompt; from 2 on, diversity is that of a prompt's pictures
    # YAML reads a bare off as false
    alarm: Annotated[
        Literal["off", "warn", "stop", "rollback"], BeforeValidator(lambda value: "off" if value is False else value)
    ] = "off"
    train_scorer: str | None = None  # the one whose rise the alarm distrusts: what the labels came from
    held_out_scorers: tuple[str, ...] = ()  # default: all others of `scorers`
    window: int = 3  # samplings from whose first to whose last the alarm looks

    def __post_init__(self) -> None:
        for name, least in (("patience", 0), ("min_delta", 0), ("seeds", 1), ("window", 2)):
            if getattr(self, name) < least:
                raise UserError(f"stop.{name} must be at least {least} (got {getattr(self, name)})")
        if self.metric is None:
            for key, is_set in (
                ("patience", self.patience > 0),
                ("restore_best", self.restore_best),
                ("alarm=rollback", self.alarm == "rollback"),
            ):
                if is_set:
                    raise UserError(f"stop.{key} needs stop.metric, which says what best is: holdout/implicit_accuracy")
        elif not self.metric.startswith(("holdout/", "samples/")):
            raise UserError(f"stop.metric must be holdout/<name> or samples/<scorer> (got {self.metric!r})")
        if self.alarm == "off":
            return
        if self.train_scorer is None:
            raise UserError("stop.alarm needs stop.train_scorer, one of stop.scorers")
        for key, names in (("train_scorer", (self.train_scorer,)), ("held_out_scorers", self.held_out_scorers)):
            for scorer in names:
                if scorer not in self.scorers:
                    raise UserError(f"stop.{key}: {scorer!r} is not in stop.scorers ({', '.join(self.scorers) or '-'})")
        if self.train_scorer in self.held_out_scorers:
            raise UserError(f"stop.held_out_scorers: {self.train_scorer!r} is stop.train_scorer, so it is not held out")

    @property
    def decides(self) -> bool:
        """Whether anything beside logging is switched on."""
        return self.metric is not None or self.alarm != "off"


@dataclass(frozen=True)
class Log:
    """Where metrics go beside metrics.jsonl."""

    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    project: str = "diffalign"
    every: int = 1  # steps between lines


COMPONENTS = ("model", "source", "likelihood", "reference", "objective")
SECTIONS = {
    "train": Train,
    "sampling": Sampling,
    "generate": Generate,
    "score": Score,
    "label": Label,
    "evaluate": Evaluate,
    "export": Export,
    "stop": Stop,
    "log": Log,
}


@dataclass(frozen=True)
class Config:
    """A resolved config: every section built, every default filled in. Components are None where not configured."""

    model: Any = None
    source: Any = None
    likelihood: Any = None
    reference: Any = None
    objective: Any = None
    train: Train = field(default_factory=Train)
    sampling: Sampling = field(default_factory=Sampling)
    generate: Generate = field(default_factory=Generate)
    score: Score = field(default_factory=Score)
    label: Label = field(default_factory=Label)
    evaluate: Evaluate = field(default_factory=Evaluate)
    export: Export = field(default_factory=Export)
    stop: Stop = field(default_factory=Stop)
    log: Log = field(default_factory=Log)
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
    for section, key in (("train", "out"), ("train", "keep_checkpoints"), ("train", "checkpoint_every")):
        kept.get(section, {}).pop(key, None)
    kept.pop("log", None)
    # what is not switched on changes nothing: runs from before a key existed go on
    default = json.loads(json.dumps(_plain(Stop())))
    stop = {key: value for key, value in kept.pop("stop", {}).items() if value != default.get(key)}
    kept |= {"stop": stop} if stop else {}
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
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge_overrides(tokens: Sequence[str]) -> dict[str, Any]:
    """`key=value` tokens as nested sections."""
    merged: dict[str, Any] = {}
    for token in tokens:
        merged = _merge(merged, _override(token))
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
