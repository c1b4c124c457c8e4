"""The keys of a training config as the fields of a form: type, default, choices and help, read off the dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import threading
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from typing import Any, Literal, get_args, get_origin

import yaml

from diffalign.config import TRAINING_SECTIONS, resolve
from diffalign.registry import names

Kind = Literal["bool", "int", "float", "choice", "text", "yaml"]
EMPTY = "null"  # how a key without a value is written
_parsing = threading.Lock()  # Python 3.11's ast fails in two threads at once


@dataclass(frozen=True)
class Field:
    """One key. `default` is what the chosen configs make of it, as the form shows it."""

    key: str  # section.key, or section.key.inner
    kind: Kind
    default: Any  # bool of bool, text of the others
    choices: tuple[str, ...] = ()
    help: str = ""

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]

    def word(self, value: Any) -> str | None:
        """`key=value` of what a form holds, None where that is the default."""
        if self.kind == "bool":
            return None if bool(value) == self.default else f"{self.key}={shown(bool(value))}"
        text = " ".join(str(value if value is not None else "").split())
        if text == self.default:
            return None
        return f"{self.key}={shown(text) if self.kind == 'text' and text else text or EMPTY}"


def form_fields(configs: Sequence[str]) -> list[Field]:
    """Every key of a training that these configs describe, section by section.

    Raises:
        UserError: an unknown config.
    """
    config = resolve(list(configs))
    fields = []
    for section in TRAINING_SECTIONS:
        value = getattr(config, section)
        fields += [] if value is None else _fields(section, value)
    return fields


def _fields(where: str, value: Any) -> list[Field]:
    cls = type(value)
    hints, helps = typing.get_type_hints(cls), field_help(cls)
    found: list[Field] = []
    for each in dataclasses.fields(value):
        if not each.init:
            continue
        key, now, kind = f"{where}.{each.name}", getattr(value, each.name), _optional(hints[each.name])
        if dataclasses.is_dataclass(now) and not isinstance(now, type):
            found += _fields(key, now)
        elif key == "source.data":
            found += _data_fields(now)
        else:
            found.append(_field(key, kind, now, helps.get(each.name, "")))
    return found


def _data_fields(data: Mapping[str, Any]) -> list[Field]:
    """What a section of its own inside `source` needs most; the layout's further keys are for the command line."""
    path = Field(
        "source.data.path", "text", str(data.get("path", "")), help="a Parquet or JSONL file, or a folder of pairs"
    )
    layouts = tuple(names("data"))
    return [
        path,
        Field("source.data.name", "choice", str(data.get("name", "auto")), layouts, "layout; auto detects it"),
    ]


def _optional(hint: Any) -> tuple[Any, bool]:
    """A type without None, and whether None was there."""
    if get_origin(hint) is typing.Annotated:
        return _optional(get_args(hint)[0])
    if get_origin(hint) in (typing.Union, types.UnionType):
        rest = [_optional(kind)[0] for kind in get_args(hint) if kind is not type(None)]
        return (rest[0] if len(rest) == 1 else None), len(rest) < len(get_args(hint))
    return hint, False


def _field(key: str, kind: tuple[Any, bool], now: Any, help: str) -> Field:
    hint, is_optional = kind
    if get_origin(hint) is Literal:
        choices = [shown(choice) for choice in get_args(hint)]
        return Field(key, "choice", shown(now), (*([EMPTY] if is_optional else []), *choices), help)
    if hint is bool and not is_optional:
        return Field(key, "bool", now, help=help)
    if hint is str:
        return Field(key, "text", now or "", help=help)
    if hint in (int, float):
        return Field(key, "int" if hint is int else "float", "" if now is None else shown(now), help=help)
    return Field(key, "yaml", shown(now), help=help)


def shown(value: Any) -> str:
    """A value as the command line takes it: YAML on one line."""
    if isinstance(value, float):
        return repr(value) if "e" not in repr(value) or "." in repr(value) else f"{value:.1e}"  # YAML 1.1: 1.0e-05
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1e9, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def field_help(cls: type) -> Mapping[str, str]:
    """Field -> what its comments and its class's docstring say of it; nothing where there is no source."""
    with _parsing:
        return _field_help(cls)


@lru_cache(maxsize=256)
def _field_help(cls: type) -> Mapping[str, str]:
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            helps |= _comments(base) | _docstring(base)
    return helps


def _docstring(cls: type) -> dict[str, str]:
    """`name: text` paragraphs of a docstring, those of several names (`a, b: text`) for each."""
    names = {each.name for each in dataclasses.fields(cls)}
    helps = {}
    for match in re.finditer(r"^(\w+(?:, \w+)*): (.+(?:\n[ ]{4,}.+)*)", inspect.getdoc(cls) or "", re.M):
        for name in match[1].split(", "):
            if name in names:
                helps[name] = " ".join(match[2].split())
    return helps


def _comments(cls: type) -> dict[str, str]:
    """The comments above and behind a field's line."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    helps = {}
    (body,) = ast.parse(source).body
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first, last = node.lineno, node.end_lineno or node.lineno
            above = first
            while above - 1 in alone:
                above -= 1
            text = " ".join(comments[line] for line in [*range(above, first), last] if line in comments)
            if text:
                helps[node.target.id] = text
    return helps
