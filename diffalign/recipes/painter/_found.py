"""What can be painted side by side: configured models, the embedded ones, and what runs exported below some folders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from diffalign import checkpoint
from diffalign.config import Config, config_names, resolve
from diffalign.models._adapter import FILE as LORA_FILE
from diffalign.models._config import Lora
from diffalign.models._user_files import FILE as USER_FILE
from diffalign.recipes.export import export
from diffalign.recipes.generate._variants import variants
from diffalign.registry import find, names
from diffalign.types import UserError

INDEX = "model_index.json"
MAX_DEPTH, MAX_FOLDERS, MAX_FOUND = 8, 20_000, 500
NO_MODELS = frozenset(("cache", "checkpoints", "samples", "images", "exports", "comparisons", "rounds"))
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, as safe


@dataclass(frozen=True)
class Contestant:
    """Something that makes pictures.

    name: what people choose, and links say.
    entry: of `generate.vary`.
    checkpoint: (run folder, step) of one that `ready` exports first.
    """

    name: str
    entry: Mapping[str, Any]
    checkpoint: tuple[Path, int] | None = None

    @property
    def has_strength(self) -> bool:
        """Whether it is an adapter."""
        adapter = self.entry.get("adapter")
        return self.checkpoint is not None or (adapter is not None and not (Path(adapter) / INDEX).is_file())

    @property
    def has_users(self) -> bool:
        """Whether it draws for users of its own."""
        adapter = self.checkpoint[0] / "export" if self.checkpoint else self.entry.get("adapter")
        return adapter is not None and (Path(adapter) / USER_FILE).is_file()


def contestants(config: Config, roots: Sequence[Path]) -> dict[str, Contestant]:
    """Name -> what can be painted: the config's own model and the entries of its `generate.vary`, shipped models whose
    weights are here, then runs, checkpoints, pipelines and loose LoRAs below `roots`, at most 500.

    A folder is not searched deeper than 8 levels, and links are not followed. A checkpoint is called RUN:STEP. A loose
    LoRA is taken to be of the config's model.
    """
    known = {name: _section(name) for name in config_names("models") if _is_here(name)}
    own: dict[str, Any] = {}
    if config.model is not None:
        own = _for_pictures(config.to_dict(("model",))["model"])
    bare: dict[str, Any] = {"adapter": None}
    first: dict[str, Mapping[str, Any]] = {config.title: bare} if own else {}
    if config.generate.adapter is not None:
        first["adapter"] = {"adapter": config.generate.adapter}
    if config.generate.vary:
        first |= {part.name: entry for part, entry in zip(variants(config), config.generate.vary, strict=True)}
    for name, section in known.items():
        if section != own:
            first.setdefault(name, bare | {"model": name})
    found = {name: Contestant(name, entry) for name, entry in first.items()}

    def model_entry(section: Mapping[str, Any]) -> dict[str, Any]:
        section = _for_pictures(section)
        if section == own:
            return {}
        return {"model": next((name for name, values in known.items() if values == section), section)}

    outer = [root for root in roots if not any(root != other and root.is_relative_to(other) for other in roots)]
    for root in outer:
        for contestant in _below(root, "" if len(outer) == 1 else f"{root.name}/", model_entry):
            if len(found) >= MAX_FOUND:
                return found
            found.setdefault(contestant.name, contestant)
    return found


def ready(contestant: Contestant, folder: Path) -> dict[str, Any]:
    """The entry of `generate.vary`. A checkpoint's weights are first exported to `folder`, once.

    Raises:
        UserError: its run or the checkpoint has gone, or is broken.
    """
    if contestant.checkpoint is None:
        return dict(contestant.entry)
    run, step = contestant.checkpoint
    path = checkpoint.found(run).get(step)
    if path is None:
        raise UserError(f"{contestant.name}: the run has removed this checkpoint since: choose another")
    mark = hashlib.blake2b(f"{path}\0{(path / 'state.json').stat().st_mtime_ns}".encode(), digest_size=4).hexdigest()
    out = folder / f"{contestant.name.replace('/', '_').replace(':', '-')}-{mark}"
    if not out.is_dir():
        writing = folder / f".{out.name}-{uuid.uuid4().hex}"
        try:
            export(resolve([{"export": {"run": str(run), "step": step, "out": str(writing)}}]))
            os.replace(writing, out)
        except OSError:  # somebody else was faster
            if not out.is_dir():
                raise
        finally:
            shutil.rmtree(writing, ignore_errors=True)
    return {**contestant.entry, "adapter": str(out)}


def _section(name: str) -> dict[str, Any]:
    return _for_pictures(resolve([name]).to_dict(("model",))["model"])


def _is_here(name: str) -> bool:
    """Whether a shipped model's weights are on this machine without a download."""
    path = resolve([name]).model.path
    return path.startswith("package:") or Path(path).expanduser().is_dir()


def _for_pictures(section: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved `model:` section without what is for training alone; an adapter that it starts from stays."""
    lora = section.get("lora") or {}
    if lora.get("init", "gaussian") == "gaussian":
        lora = dataclasses.asdict(Lora())
    changed = {"trainable": "lora", "lora": lora, "users": None, "gradient_checkpointing": False}
    return json.loads(json.dumps({**section, **changed}))


def _stays(folder: Path, root: Path) -> bool:
    """Whether no link in a folder leads out of the root."""
    return all(_is_below(path, root) for path in (folder, *folder.iterdir()))


def _is_below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root)


def _below(root: Path, prefix: str, model_entry: Any) -> Iterator[Contestant]:
    """What lies in `root` and deeper, folder by folder in the order of their names."""
    num = 0
    for folder, inner, files in os.walk(root):  # links are listed, and not followed
        path = Path(folder)
        num += 1
        if num > MAX_FOLDERS:
            return
        depth = len(path.relative_to(root).parts)
        is_pipeline = INDEX in files
        skipped = NO_MODELS | ({"export"} if "config.yaml" in files else set())
        inner[:] = sorted(
            name for name in inner if name not in skipped and name[0] != "." and not name.isdigit()
        ) if depth < MAX_DEPTH and not is_pipeline else []  # fmt: skip
        name = prefix + (path.relative_to(root).as_posix() if depth else root.name)
        if "config.yaml" in files:
            yield from _of_run(path, name, root, model_entry)
        elif not (is_pipeline or LORA_FILE in files or USER_FILE in files) or not _stays(path, root):
            continue
        elif is_pipeline and (family := _family(path)):
            yield Contestant(name, {"model": {"name": family, "path": str(path)}, "adapter": None})
        elif not is_pipeline:
            yield Contestant(name, {"adapter": str(path)})


def _of_run(run: Path, name: str, root: Path, model_entry: Any) -> Iterator[Contestant]:
    file = run / "config.yaml"
    section = _run_model(file, file.stat().st_mtime_ns) if _is_below(file, root) else {}
    if not section:
        return
    entry, exported = model_entry(section), run / "export"
    is_exported = any((exported / file).is_file() for file in (LORA_FILE, USER_FILE, INDEX))
    if is_exported and _stays(exported, root):
        yield Contestant(name, {**entry, "adapter": str(exported)})
    if section.get("trainable") == "full":  # gigabytes each
        return
    try:
        steps = [step for step, path in checkpoint.found(run).items() if _is_below(path, root)]
    except ValueError:  # a folder with no number in its name, and none of ours
        return
    for step in steps[:-1] if is_exported else steps:
        yield Contestant(f"{name}:{step}", entry, (run, step))


@lru_cache(maxsize=2 * MAX_FOUND)
def _run_model(path: Path, changed: int) -> Mapping[str, Any]:
    """The model section of a run that trained one, {} of other folders."""
    try:
        content = yaml.load(path.read_text(), Loader=LOADER)
        return resolve([{"model": content["model"]}]).to_dict(("model",))["model"] if "train" in content else {}
    except (OSError, yaml.YAMLError, UserError, TypeError, KeyError, UnicodeDecodeError):
        return {}  # none of ours, or of another version


def _family(folder: Path) -> str | None:
    """The model family that loads a pipeline folder."""
    try:
        found = json.loads((folder / INDEX).read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    families: dict[str, Any] = {name: find("model", name) for name in names("model")}
    return next((name for name, of in families.items() if of.family.pipeline_class == found), None)
