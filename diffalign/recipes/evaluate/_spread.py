"""How varied a model's pictures are, and how far they are from the baseline's of the same prompt and seed.

Pictures pass once, a few prompts at a time; of each prompt a few numbers are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.diagnostics import cosine_kernel, pixel_features, pixel_kernel, vendi
from diffalign.evaluation import Estimate, mean_and_se, mean_difference
from diffalign.progress import Progress
from diffalign.recipes._judging import BATCH, batched, open_image
from diffalign.recipes.generate import read_manifest
from diffalign.scorers._build import build_scorers, scorer_key
from diffalign.types import Scorer, UserError

GRID = 8  # cells of the pixel features, both ways
MAX_PROMPTS = 1024  # whose first pictures the Vendi score over prompts is of: the same ones for every model


class Looks(Protocol):
    """What pictures look like, as vectors."""

    @property
    def about(self) -> Mapping[str, Any]: ...  # name, version, distance

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]: ...
    def kernel(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]: ...
    def distance(self, x: Float[Tensor, "... D"], y: Float[Tensor, "... D"]) -> Float[Tensor, " ..."]: ...


@dataclass(frozen=True)
class PixelLooks:
    """Mean colours on a coarse grid: layout and colour, and nothing of what is shown."""

    @property
    def about(self) -> Mapping[str, Any]:
        """The features' facts."""
        return {"name": "pixels", "version": f"{GRID} x {GRID}", "distance": "root mean square, of a colour range of 1"}

    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """One picture at a time: sizes may differ."""
        return torch.cat([pixel_features(np.array(image.convert("RGB"))[None], GRID) for image in images])

    def kernel(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
        """`pixel_kernel`: the grid of mean colours is a picture whose mean colours are itself."""
        return pixel_kernel(255 * x.unflatten(1, (3, GRID, GRID)).permute(0, 2, 3, 1), GRID)

    def distance(self, x: Float[Tensor, "... D"], y: Float[Tensor, "... D"]) -> Float[Tensor, " ..."]:
        """Root mean square difference."""
        return (x - y).square().mean(dim=-1).sqrt()


@dataclass(frozen=True)
class TowerLooks:
    """A scorer's own image features, as unit vectors."""

    scorer: Any

    @property
    def about(self) -> Mapping[str, Any]:
        """The features' facts."""
        info = self.scorer.info
        return {"name": info.name, "version": info.version, "distance": "1 - cosine"}

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Float[Tensor, "N D"]:
        """The tower's features of pictures preprocessed as for its score."""
        parts = []
        for some in batched(images, self.scorer.batch_size):
            features = torch.as_tensor(self.scorer.image_features(some))
            parts.append(features.double().cpu())
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    def kernel(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N N"]:
        """Cosines."""
        return cosine_kernel(x)

    def distance(self, x: Float[Tensor, "... D"], y: Float[Tensor, "... D"]) -> Float[Tensor, " ..."]:
        """1 - cosine."""
        return 1 - (x * y).sum(dim=-1)


@dataclass(frozen=True)
class SpreadRow:
    """One model. Estimates are means over prompts; `..._change` is the difference from the baseline's, by prompt."""

    model: str
    vendi_over_prompts: float  # effective number of pictures among the first ones of the prompts
    vendi: Estimate | None = None  # effective number of pictures of one prompt; None for one picture per prompt
    vendi_change: Estimate | None = None
    distance: Estimate | None = None  # mean distance of two pictures of one prompt
    distance_change: Estimate | None = None
    drift: Estimate | None = None  # feature distance from the baseline's picture of the same prompt and seed
    pixel_drift: Estimate | None = None  # root mean square difference of its pixels, of 255; None for other sizes


@dataclass(frozen=True)
class Spread:
    """`rows` of all models; `num_prompts` of those whose first pictures `vendi_over_prompts` compares."""

    features: Mapping[str, Any]
    num_prompts: int
    rows: tuple[SpreadRow, ...]


def looks_of(spec: str | Mapping[str, Any] | None, scorers: Mapping[str, Scorer]) -> Looks:
    """The features that `evaluate.features` names; a scorer that judges too is not loaded twice.

    Raises:
        UserError: a scorer that has no picture features.
    """
    if spec is None:
        return PixelLooks()
    key = scorer_key(spec)
    scorer = (
        scorers[key] if isinstance(spec, str) and key in scorers else build_scorers([spec], "evaluate.features")[key]
    )
    if not hasattr(scorer, "image_features"):
        raise UserError(f"evaluate.features: {key} has no picture features: name a CLIP-type scorer, or leave it out")
    return TowerLooks(scorer)


def _prompts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(prompt, its pictures) in the order of the manifest."""
    for _, rows in groupby(read_manifest(folder), key=lambda row: row["prompt_id"]):
        group = list(rows)
        yield group[0]["prompt"], [folder / row["file"] for row in group]


@dataclass
class _Tally:
    """What is kept of one model: numbers per prompt, and the first features."""

    vendi: list[float]
    distance: list[float]
    drift: list[float]
    pixel_drift: list[float]
    first: list[Tensor]


def _pixel_drift(image: Image.Image, other: Image.Image) -> float:
    if image.size != other.size:
        return float("nan")
    x, y = (np.asarray(picture.convert("RGB"), np.float32) for picture in (image, other))
    return float(np.sqrt(np.mean((x - y) ** 2)))


def _count(
    tally: _Tally, looks: Looks, x: Tensor, base: Tensor, images: Sequence[Image.Image], others: Sequence[Image.Image]
) -> None:
    """One prompt's pictures [k, D] and the baseline's."""
    if len(x) > 1:
        tally.vendi.append(vendi(looks.kernel(x)))
        first, second = torch.triu_indices(len(x), len(x), offset=1)
        tally.distance.append(float(looks.distance(x[first], x[second]).mean()))
    tally.drift.append(float(looks.distance(x, base).mean()))
    tally.pixel_drift.append(float(np.mean([_pixel_drift(*pair) for pair in zip(images, others, strict=True)])))
    if len(tally.first) < MAX_PROMPTS:
        tally.first.append(x[0])


def spread(
    folders: Mapping[str, Path], baseline: str, looks: Looks, *, level: float, seed: int, quiet: bool = False
) -> Spread:
    """Diversity and drift of every model's pictures; `folders` hold the same prompts and numbers of pictures.

    Raises:
        UserError: a picture that cannot be read.
    """
    tallies = {name: _Tally([], [], [], [], []) for name in folders}
    texts: list[str] = []
    names = [baseline, *(name for name in folders if name != baseline)]
    per_prompt = max(1, len(next(_prompts(folders[baseline]))[1]))
    groups = zip(*(_prompts(folders[name]) for name in names), strict=True)
    total = sum(1 for _ in read_manifest(folders[baseline]))
    with Progress("diversity", total, unit="img", quiet=quiet) as progress:
        for some in batched(groups, max(1, BATCH // per_prompt)):
            texts += [of_models[0][0] for of_models in some]
            base: tuple[Tensor, list[Image.Image]] | None = None
            for place, name in enumerate(names):
                images = [open_image(file) for of_models in some for file in of_models[place][1]]
                features = looks.embed(images)
                base = base or (features, images)
                for k in range(len(some)):
                    rows = slice(k * per_prompt, (k + 1) * per_prompt)
                    _count(tallies[name], looks, features[rows], base[0][rows], images[rows], base[1][rows])
            progress.advance(len(some) * per_prompt)
    options: dict[str, Any] = {"level": level, "seed": seed}
    made = [_row(name, tallies[name], tallies[baseline], name == baseline, texts, looks, options) for name in folders]
    return Spread(looks.about, len(tallies[baseline].first), tuple(made))


def _row(
    name: str, own: _Tally, base: _Tally, is_base: bool, texts: list[str], looks: Looks, options: Mapping[str, Any]
) -> SpreadRow:
    def mean(values: list[float]) -> Estimate | None:
        has_all = bool(values) and bool(np.isfinite(values).all())
        return mean_and_se(values, texts, level=options["level"]) if has_all else None

    def change(values: list[float], of_base: list[float]) -> Estimate | None:
        return mean_difference(values, of_base, texts, **options) if values and not is_base else None

    return SpreadRow(
        name,
        vendi(looks.kernel(torch.stack(own.first))),
        vendi=mean(own.vendi),
        vendi_change=change(own.vendi, base.vendi),
        distance=mean(own.distance),
        distance_change=change(own.distance, base.distance),
        drift=None if is_base else mean(own.drift),
        pixel_drift=None if is_base else mean(own.pixel_drift),
    )
