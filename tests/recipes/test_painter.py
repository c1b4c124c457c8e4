"""The painter: generate's pictures bit for bit, models that are shared and given back, and stopping in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config import Config, resolve
from diffalign.recipes import painter as recipe
from diffalign.recipes.generate import generate, read_facts, read_manifest
from diffalign.recipes.generate._variants import Variant, variants
from diffalign.recipes.painter import Painter
from diffalign.registry import find
from diffalign.types import UserError

PROMPTS = ["a thing", "another thing", "a third thing"]


def build_twin(folder: Path, seed: int) -> Path:
    family: Any = find("model", "sd15")
    return family.family.build_tiny(folder, seed=seed)


def trained(twin: Path, out: Path, seed: int, **keys: Any) -> Path:
    """An exported adapter whose weights are far from zero."""
    model = resolve([{"model": {"name": "sd15", "path": str(twin), "dtype": "float32", **keys}}]).model.load()
    if model.users is not None:
        model.set_users(names=("ann", "bob"), seed=0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.export(out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """two models, two LoRAs and a user branch of the first."""
    root = tmp_path_factory.mktemp("painter")
    twin = build_twin(root / "twin", 0)
    build_twin(root / "other", 1)
    trained(twin, root / "a", 1, lora={"rank": 4})
    trained(twin, root / "b", 2, lora={"rank": 2, "targets": ["to_q", "to_k", "to_v"]})
    trained(twin, root / "mine", 3, trainable="users", users={"by": "id", "width": 8, "token_width": 8})
    return root


def section(path: Path) -> dict[str, Any]:
    return {"name": "sd15", "path": str(path), "dtype": "float32"}


def configured(folder: Path, vary: list[dict[str, Any]], **generate: Any) -> Config:
    sampling = {"num_steps": 2, "cfg_scale": 2.0, "batch_size": 4}
    settings = {"vary": vary, "images_per_prompt": 2, "device": "cpu", **generate}
    return resolve([{"model": section(folder / "twin"), "sampling": sampling, "generate": settings}])


def ways(folder: Path) -> list[dict[str, Any]]:
    a, b, mine = (str(folder / name) for name in ("a", "b", "mine"))
    return [
        {"as": "plain"},
        {"as": "a", "adapter": a},
        {"as": "a-half", "adapter": a, "adapter_scale": 0.5, "sampling": {"num_steps": 3, "eta": 0.5}},
        {"as": "other", "model": {"path": str(folder / "other")}, "seed": 7},
        {"as": "b", "adapter": b},
        {"as": "ann", "adapter": mine, "user": "ann"},
        {"as": "mixed", "adapter": mine, "adapter_scale": 0.3, "user": {"ann": 0.5, "bob": 0.5}},
        {"as": "again", "seed": 7},
    ]


def painted(painter: Painter, parts: list[Variant], numbers: list[int] | None = None) -> dict[Any, np.ndarray]:
    found = painter.paint(parts, PROMPTS, [0, 1] if numbers is None else numbers)
    return {(one.variant, one.prompt, one.number): np.asarray(one.image) for one in found}


def same(left: dict[Any, np.ndarray], right: dict[Any, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(value, right[key]) for key, value in left.items())


def test_pictures_and_facts_are_those_of_generate_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    out = generate(configured(folder, ways(folder), prompts=str(prompts), out=str(tmp_path / "out")), quiet=True)
    rows = list(read_manifest(out))
    made = {(row["variant"], row["prompt"], row["number"]): np.asarray(Image.open(out / row["file"])) for row in rows}
    pictures = list(Painter("cpu").paint(variants(configured(folder, ways(folder))), PROMPTS, [0, 1]))
    found = {(one.variant, one.prompt, one.number): np.asarray(one.image) for one in pictures}
    assert same(found, made)
    assert list(found)[:3] == [("plain", "a thing", 0), ("plain", "a thing", 1), ("plain", "another thing", 0)]
    assert {one.variant: dict(one.made) for one in pictures} == read_facts(out)["made"]
    different = {key[0]: value.tobytes() for key, value in found.items() if key[1:] == ("a thing", 0)}
    assert len(set(different.values())) == len(different)  # every way changes the picture


def test_loras_and_their_strengths_share_one_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str | None] = []
    original = recipe.load_for_images

    def load(config: Config, adapter: str | None, *rest: Any) -> Any:
        loaded.append(adapter)
        return original(config, adapter, *rest)

    monkeypatch.setattr(recipe, "load_for_images", load)
    painter, a, b = Painter("cpu"), str(folder / "a"), str(folder / "b")
    entries = [{"as": f"a{scale}", "adapter": a, "adapter_scale": scale} for scale in (1.0, 0.0, 0.5)]
    found = painted(painter, variants(configured(folder, [*entries, {"as": "b", "adapter": b}, {"as": "plain"}])))
    assert loaded == [None]
    for prompt in PROMPTS:
        assert np.array_equal(found["a0.0", prompt, 0], found["plain", prompt, 0])  # nothing of a or b is left on
        assert not np.array_equal(found["a0.5", prompt, 0], found["a1.0", prompt, 0])
    mine = str(folder / "mine")
    users = [{"as": f"u{scale}", "adapter": mine, "adapter_scale": scale, "user": "ann"} for scale in (1.0, 0.0)]
    painted(painter, variants(configured(folder, users)))
    assert loaded == [None, mine]


def test_the_model_used_least_recently_goes_first(folder: Path) -> None:
    plain, other = variants(configured(folder, [{"as": "plain"}, ways(folder)[3]]))
    alone, one_at_a_time = Painter("cpu"), Painter("cpu", max_models=1)
    assert same(painted(one_at_a_time, [plain, other, plain]), painted(alone, [plain, other, plain]))
    assert (len(one_at_a_time._held), len(alone._held)) == (1, 2)
    size = next(iter(alone._held.values())).num_bytes
    for limit, num in ((size, 1), (2 * size, 2)):
        bounded = Painter("cpu", max_bytes=limit)
        painted(bounded, [plain, other])
        assert len(bounded._held) == num


def test_an_adapter_that_changed_on_disk_is_loaded_anew(folder: Path, tmp_path: Path) -> None:
    painter, out = Painter("cpu"), tmp_path / "a"
    parts = variants(configured(folder, [{"as": "a", "adapter": str(out)}]))
    trained(folder / "twin", out, 1)
    first = painted(painter, parts)
    trained(folder / "twin", out, 5)
    second = painted(painter, parts)
    assert not same(first, second)
    assert same(second, painted(Painter("cpu"), parts))


def test_what_fails_to_load_leaves_the_painter_as_it_was(folder: Path, tmp_path: Path) -> None:
    painter = Painter("cpu")
    plain, missing = variants(configured(folder, [{"as": "plain"}, {"as": "x", "adapter": str(tmp_path / "none")}]))
    before = painted(painter, [plain])
    with pytest.raises(UserError, match="none: no adapter here"):
        painted(painter, [missing])
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="does not load"):
        painted(painter, variants(configured(folder, [{"as": "x", "adapter": str(tmp_path / "bad.safetensors")}])))
    assert same(painted(painter, [plain]), before)


def test_a_selection_is_refused(folder: Path) -> None:
    config = configured(folder, [], select="best-of-n", scorers=["pixel"])
    with pytest.raises(UserError, match="generate.select"):
        next(iter(Painter("cpu").paint([Variant("", config)], PROMPTS, [0])))


def test_closing_stops_before_the_next_batch_and_raising_before_the_next_step(folder: Path) -> None:
    painter, parts = Painter("cpu"), variants(configured(folder, [{"as": "plain"}, {"as": "again", "seed": 7}]))
    shares: list[float] = []
    everything = list(painter.paint(parts, PROMPTS, [0, 1], shares.append))
    assert len(everything) == 12
    assert shares == pytest.approx([k / 8 for k in range(1, 9)])  # 2 variants x 2 batches x 2 steps

    shares.clear()
    stream: Iterator[Any] = painter.paint(parts, PROMPTS, [0, 1], shares.append)
    assert next(stream).number == 0
    stream.close()  # type: ignore[attr-defined]
    assert len(shares) == 2

    class Enough(Exception): ...

    def stop(share: float) -> None:
        raise Enough

    with pytest.raises(Enough):
        next(painter.paint(parts, PROMPTS, [0, 1], stop))
    again = list(painter.paint(parts, PROMPTS, [0, 1]))  # nothing is locked, nothing is half done
    assert all(np.array_equal(x.image, y.image) for x, y in zip(again, everything, strict=True))


def test_threads_share_a_painter(folder: Path) -> None:
    painter, entries = Painter("cpu"), ways(folder)[:5]
    alone = [painted(Painter("cpu"), variants(configured(folder, [entry]))) for entry in entries]
    together: list[dict[Any, np.ndarray]] = [{} for _ in entries]

    def work(index: int) -> None:
        together[index] = painted(painter, variants(configured(folder, [entries[index]])))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(entries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(left, right) for left, right in zip(together, alone, strict=True))
