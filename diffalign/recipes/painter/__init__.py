"""Pictures while somebody waits: several models stay loaded, and any of their variants is painted batch by batch."""

from __future__ import annotations

import functools
import gc
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.config import Config
from diffalign.distributed import World
from diffalign.models._adapter import ADAPTER
from diffalign.models._user_files import FILE as USER_FILE
from diffalign.recipes._images import decoded, sample_latents
from diffalign.recipes._judging import batched
from diffalign.recipes._user import user_cond
from diffalign.recipes.generate import load_for_images
from diffalign.recipes.generate._variants import Variant, made_by
from diffalign.recipes.generate._variants import variants as variants
from diffalign.sampling import SamplerStep
from diffalign.types import UserError

SHARE = 0.5  # of the device's memory that loaded models may fill
MAX_ADAPTERS = 16  # on one loaded model, which is then loaded anew


@dataclass(frozen=True)
class Painted:
    """One picture, and what `generate` writes of it in its manifest."""

    variant: str
    prompt: str
    number: int
    image: Image.Image
    made: Mapping[str, Any]


@dataclass
class _Loaded:
    """A model in memory. `adapters` are the LoRAs on it, by file and state, with their names inside peft."""

    model: Any
    num_bytes: int
    adapters: dict[str, str] = field(default_factory=dict)


class Painter:
    """Paints variants of any models. Threads may share one: it makes one batch at a time, in turn.

    The models used last stay loaded: at most `max_models`, and no more than half of the device's memory where there are
    several (a new one is taken to be as large as the largest). LoRAs of one model share it, and so do their strengths.

    Args:
        device: auto, cpu or cuda.
    """

    def __init__(self, device: str = "auto", max_models: int = 4, max_bytes: int | None = None) -> None:
        self.device, self.max_models, self.max_bytes = device, max_models, max_bytes
        self._lock = threading.Lock()
        self._world: World | None = None
        self._held: dict[str, _Loaded] = {}  # the one used last is last

    def paint(
        self,
        parts: Sequence[Variant],
        prompts: Sequence[str],
        numbers: Sequence[int],
        on_step: Callable[[float], None] | None = None,
    ) -> Iterator[Painted]:
        """The pictures of each variant in turn, prompt by prompt, as their batches end.

        They are those of `diffalign generate`, bit for bit where `numbers` are 0 to n - 1: the same batches then. Close
        the iterator to stop before the next batch, or raise out of `on_step`, which is told the share of the whole work
        that is done after every step of the sampler.

        Raises:
            UserError: a model, adapter, user or sampling that does not fit; a variant that selects among candidates.
        """
        sizes = [part.config.sampling.batch_size for part in parts]
        total = sum(-(-len(prompts) * len(numbers) // size) for size in sizes)
        done = 0
        for part, size in zip(parts, sizes, strict=True):
            made: dict[str, Any] = {}
            for batch in batched(product(prompts, numbers), size):

                def told(step: SamplerStep, done: int = done) -> None:
                    assert on_step is not None
                    on_step((done + (step.index + 1) / step.num_steps) / total)

                images = self._batch(part.config, batch, told if on_step else None, made)
                for (prompt, number), image in zip(batch, images, strict=True):
                    yield Painted(part.name, prompt, number, image, made)
                done += 1

    def load(self, config: Config) -> None:
        """Loads a model ahead of the first picture.

        Raises:
            UserError: it cannot be loaded.
        """
        with self._lock:
            self._model(config)

    def _batch(
        self,
        config: Config,
        batch: Sequence[tuple[str, int]],
        on_step: Callable[[SamplerStep], None] | None,
        made: dict[str, Any],
    ) -> list[Image.Image]:
        settings = config.generate
        if settings.select is not None:
            raise UserError("generate.select chooses among pictures, and here all are shown: leave it empty")
        texts, numbers = [text for text, _ in batch], [number for _, number in batch]
        with self._lock:
            model = self._model(config)
            user = user_cond(model, settings, "generate")
            latents = sample_latents(model, texts, numbers, settings.seed, config.sampling, user, on_step=on_step)
            if not made:  # once for a variant: it reads the weight files
                made.update(made_by(model, config))
            return [Image.fromarray(pixels) for pixels in decoded(model, latents)]

    def _model(self, config: Config) -> Any:
        """The variant's model with its adapter, and no other, switched on."""
        state = _state(config.generate.adapter)
        key = json.dumps([config.to_dict(("model",)), None if _shares(config) else state], sort_keys=True)
        held = self._held.pop(key, None)
        if held is None or (len(held.adapters) >= MAX_ADAPTERS and state not in held.adapters):
            held = None  # frees its memory before the next one is loaded
            held = self._load(config)
        _switch(held, config, state)  # where it fails, what is half loaded is not kept
        self._held[key] = held
        return held.model

    def _load(self, config: Config) -> _Loaded:
        self._world = self._world or World(self.device)
        limit = self.max_bytes or int(SHARE * _memory(self._world.device))
        sizes = [held.num_bytes for held in self._held.values()]
        while sizes and (len(sizes) >= self.max_models or sum(sizes) + max(sizes) > limit):
            del self._held[next(iter(self._held))], sizes[0]
        gc.collect()
        if self._world.device.type == "cuda":
            torch.cuda.empty_cache()
        settings = config.generate
        adapter = None if _shares(config) else settings.adapter
        model = load_for_images(config, adapter, settings.adapter_scale, self._world)
        model.fingerprint = functools.cache(model.fingerprint)  # reads all weight files
        modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        size = sum(weight.numel() * weight.element_size() for part in modules for weight in part.parameters())
        loaded = [name for name in _peft_names(model) if name != ADAPTER]
        return _Loaded(model, size, {_state(adapter): name for name in loaded})


@functools.cache
def shared(device: str = "auto") -> Painter:
    """The one of this process, so that nobody loads what another has loaded."""
    return Painter(device)


def _memory(device: torch.device) -> int:
    """Bytes there are, in use or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shares(config: Config) -> bool:
    """Whether the network may serve variants of other adapters, too: there are plain LoRAs alone."""
    if config.generate.adapter is None:
        return bool(config.model.trainable == "lora")
    path = Path(config.generate.adapter).expanduser()
    is_plain = not any((path / file).is_file() for file in (USER_FILE, "model_index.json"))
    return bool(config.model.trainable == "lora" and is_plain)


def _state(adapter: str | None) -> str:
    """An adapter's path with size and time of its files: a run may export anew while the old weights are loaded."""
    if adapter is None:
        return ""
    path = Path(adapter).expanduser()
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return f"{path}: {found}"


def _peft_names(model: Any) -> list[str]:
    return list(getattr(model.network, "peft_config", {}))


def _switch(held: _Loaded, config: Config, state: str) -> None:
    """The variant's adapter at its strength, all others off.

    Raises:
        UserError: there is none, or one of another model.
    """
    model, settings = held.model, config.generate
    if settings.adapter is not None and _shares(config) and state not in held.adapters:
        model.load_adapter(settings.adapter)
        held.adapters[state] = _peft_names(model)[-1]
    weights = {name: 1.0 for name in _peft_names(model) if name == ADAPTER}
    if state in held.adapters:
        weights[held.adapters[state]] = settings.adapter_scale
    if weights:
        model.network.set_adapters(list(weights), list(weights.values()))
    if settings.adapter is not None and (Path(settings.adapter).expanduser() / USER_FILE).is_file():
        model.users.call.scale = settings.adapter_scale
