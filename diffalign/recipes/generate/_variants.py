"""What makes the pictures of one folder: the command's own model, or several models, adapters and samplers."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import __version__
from diffalign.config import Config, resolve
from diffalign.registry import suggest
from diffalign.types import UserError

OF_GENERATE = ("adapter", "adapter_scale", "user", "user_data", "user_shots", "seed")
LEGAL = ("as", "model", "sampling", *OF_GENERATE)
NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Variant:
    """One way to make the pictures. `name` is its subfolder, empty where there is only the command's own way."""

    name: str
    config: Config


def variants(config: Config) -> list[Variant]:
    """The command's own way, or those of `generate.vary`, in order.

    Raises:
        UserError: no model, an unknown key, a value that does not fit, or two variants of one name.
    """
    entries = config.generate.vary
    if not entries:
        config.require("model")
        return [Variant("", config)]
    found: dict[str, Variant] = {}
    for index, entry in enumerate(entries):
        key = f"generate.vary[{index}]"
        for unknown in set(entry) - set(LEGAL):
            raise UserError(f"unknown key {key}.{unknown}.{suggest(str(unknown), list(LEGAL))}")
        name = _name(entry)
        if not NAME.fullmatch(name):
            raise UserError(f"{key}.as={name!r}: letters, digits and . + - _ name a folder")
        if name in found:
            raise UserError(f"generate.vary: two variants are called {name!r}: give one of them another name with `as`")
        try:
            found[name] = Variant(name, _varied(config, entry))
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return list(found.values())


def _varied(config: Config, entry: Mapping[str, Any]) -> Config:
    base = config.to_dict(("model", "sampling", "generate"))
    base["generate"]["vary"] = []
    model, tokens = entry.get("model"), list[str | Mapping[str, Any]]()
    if isinstance(model, str):  # a config of its own: nothing of the command's model is left
        base.pop("model", None)
        tokens.append(model)
    elif model is not None:
        tokens.append({"model": model})
    of_generate = {key: entry[key] for key in OF_GENERATE if key in entry}
    varied = resolve([base, *tokens, {"sampling": entry.get("sampling", {}), "generate": of_generate}])
    varied.require("model")
    return varied


def _name(entry: Mapping[str, Any]) -> str:
    """`as`, or what the entry changes, in its order."""
    if "as" in entry:
        return str(entry["as"])
    parts = []
    for key, value in entry.items():
        if key == "model":
            path = value if isinstance(value, str) else str(value.get("path", value.get("name", "model")))
            parts.append(Path(path).stem if path.endswith((".yaml", ".yml")) else Path(path).name)
        elif key == "adapter" and value is not None:
            folder = Path(str(value))  # runs/x/export is called x
            parts.append(folder.parent.name if folder.name == "export" else folder.name)
        elif key == "sampling":
            parts += [str(item) if name == "sampler" else f"{name}{item}" for name, item in value.items()]
        else:
            parts.append(f"{key}{value}")
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)) or "base"


def made_by(model: Any, config: Config) -> dict[str, Any]:
    """All that a picture depends on beside its prompt and number, as plain JSON types.

    `sampling.batch_size` is there because neighbours in a batch move a picture's rounding, and nothing more.
    """
    settings = config.generate
    adapter = {} if settings.adapter is None else {"adapter_fingerprint": adapter_fingerprint(Path(settings.adapter))}
    users = {key: getattr(settings, key) for key in ("user", "user_data", "user_shots")}
    return {
        "model": config.names["model"],
        "path": str(model.config.path),
        "fingerprints": {part: model.fingerprint(part) for part in ("denoiser", "text", "vae")},
        "resolution": list(model.resolution),
        "adapter": settings.adapter,
        "adapter_scale": settings.adapter_scale,
        **adapter,
        **{key: value for key, value in users.items() if value is not None},
        "seed": settings.seed,
        "sampling": dataclasses.asdict(config.sampling),
        "diffalign": __version__,
    }


def adapter_fingerprint(folder: Path) -> str:
    """blake2b over the weights that lie directly in an exported folder; of a whole pipeline the model's says all."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.expanduser().glob("*.safetensors")):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found.update(f"{file.name}\0{content}\0".encode())
    return found.hexdigest()


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The facts in which two of `made_by` differ; the toolkit's own version is told, and refuses nothing."""
    return [key for key in dict.fromkeys([*old, *new]) if key != "diffalign" and old.get(key) != new.get(key)]
