"""The Train tab's form: what it begins with, its fields, and the words of `diffalign train` that they make."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from diffalign import api
from gradio_app._context import Context

METHOD = "diffusion-dpo"
QUICK = "sprites-quick"  # a run config of a minute
FIRST = (  # the keys that are asked for first, where the chosen configs have them
    "model.path",
    "source.data.path",
    "source.prompts",
    "source.scorers",
    "train.out",
    "train.steps",
    "train.batch_size",
    "train.lr",
    "objective.beta",
    "train.seed",
    "train.sample_every",
    "train.validate_every",
)
SECTIONS = {
    "model": "Model",
    "source": "Source: what it learns from",
    "likelihood": "Likelihood",
    "reference": "Reference",
    "objective": "Objective",
    "train": "Training",
    "sampling": "Sampling of the sample grids",
    "stop": "Early stopping and the over-optimisation alarm",
    "log": "Log",
}
MAX_HELP = 220  # characters


@dataclass(frozen=True)
class Form:
    """The fields of the chosen configs, and what they hold at first: the app's own settings over the configs'."""

    configs: tuple[str, ...]
    fields: tuple[Any, ...]
    values: tuple[Any, ...]

    def words(self, values: Sequence[Any]) -> list[str]:
        """The words of `diffalign train`: configs, then the keys that were changed."""
        changed = [field.word(value) for field, value in zip(self.fields, values, strict=True)]
        return [*self.configs, *(word for word in changed if word is not None)]


@dataclass(frozen=True)
class Opening:
    """What may be chosen, and what is chosen at first: what the app was started with, else a quick run."""

    models: tuple[str, ...]
    methods: tuple[str, ...]
    more: tuple[str, ...]
    model: str
    method: str
    chosen: tuple[str, ...]

    @property
    def own(self) -> tuple[str, ...]:
        """Config files that the app was started with."""
        return tuple(name for name in self.more if name not in api.config_names("runs"))


def opening(context: Context) -> Opening:
    """The choices of configs of this app."""
    names = {kind: api.config_names(kind) for kind in ("models", "methods", "runs")}
    given = [word for word in context.tokens if "=" not in word]
    own = [word for word in given if not any(word in of for of in names.values())]
    model = next((word for word in given if word in names["models"]), "" if own else names["models"][0])
    method = next((word for word in given if word in names["methods"]), "" if own else METHOD)
    chosen = [word for word in given if word in names["runs"] or word in own]
    if not chosen and model.startswith("sprites") and method == METHOD:
        chosen = [QUICK]
    nothing = [""] if own else []
    return Opening(
        models=(*nothing, *names["models"]),
        methods=(*nothing, *names["methods"]),
        more=(*own, *names["runs"]),
        model=model,
        method=method,
        chosen=tuple(chosen),
    )


def example_path(context: Context) -> Path:
    """Where the pairs of the embedded example are, or will be."""
    return context.folder / "example" / "pairs.parquet"


def make_form(context: Context, model: str, method: str, more: Sequence[str]) -> Form:
    """The form of these configs.

    Raises:
        UserError: no such config.
    """
    configs = tuple(word for word in (model, method, *more) if word)
    fields = api.form_fields(configs=configs)
    values = {field.key: field.default for field in fields}
    overrides = [word for word in context.tokens if "=" in word and not word.startswith("app.")]
    values |= {field.key: field.default for field in api.form_fields(configs=[*configs, *overrides])}
    if "source.cache_dir" in values:
        values["source.cache_dir"] = _shown(context.folder / "cache")
    values["train.out"] = _new_folder(context, "-".join(Path(config).stem for config in configs))
    if model.startswith("sprites"):
        if "source.data.path" in values and not values["source.data.path"]:
            values["source.data.path"] = _shown(example_path(context))
        if values.get("source.prompts") == "null":
            values |= {"source.prompts": "sprites:train:64:two", "source.scorers": "[sprites_gold]"}
    return Form(configs, tuple(fields), tuple(values[field.key] for field in fields))


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _new_folder(context: Context, title: str) -> str:
    """A run folder that is not there yet, below the first of the folders that the app was given."""
    first = context.settings.roots[0] if context.settings.roots else _shown(context.folder)
    names = [title, *(f"{title}-{number}" for number in range(2, 1000))]
    return next((f"{first}/{name}" for name in names if not Path(first, name).exists()), f"{first}/{title}")


def show_fields(form: Form) -> list[Any]:
    """The fields as components: the first keys in the open, the others folded by section; in the order of the form."""
    shown: dict[str, Any] = {}
    given = dict(zip((field.key for field in form.fields), form.values, strict=True))
    of_key = {field.key: field for field in form.fields}
    with gr.Row(elem_classes="da-fields"):
        for key in (key for key in FIRST if key in of_key):
            shown[key] = _component(of_key[key], given[key])
    for section, title in SECTIONS.items():
        rest = [field for field in form.fields if field.section == section and field.key not in FIRST]
        if rest:
            with gr.Accordion(title, open=False, elem_id=f"da-section-{section}"), gr.Row(elem_classes="da-fields"):
                for field in rest:
                    shown[field.key] = _component(field, given[field.key])
    return [shown[field.key] for field in form.fields]


def _component(field: Any, value: Any) -> Any:
    """An input that fits the type; YAML for what is no single value."""
    text = field.help if len(field.help) <= MAX_HELP else field.help[: MAX_HELP - 1] + "\u2026"
    common: dict[str, Any] = {
        "label": field.key,
        "info": text or None,
        "elem_id": f"da-key-{field.key.replace('.', '-')}",
        "min_width": 220,
        "interactive": True,
    }
    if field.kind == "bool":
        return gr.Checkbox(value, **common)
    if field.kind == "choice":
        choices = [(choice.strip("'").replace("null", "none"), choice) for choice in field.choices]
        return gr.Dropdown(choices, value=value, filterable=len(choices) > 8, **common)
    return gr.Textbox(value, max_lines=1, **common)


def embedded(context: Context, words: Sequence[str]) -> None:
    """Draws the example's pairs when they are about to be used for the first time."""
    path = example_path(context)
    if f"source.data.path={_shown(path)}" in words:
        api.example_pairs(path=path)
