"""Tiny twins on disk, one folder per family, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign import registry
from diffalign.models import sd3, sd15, sdxl
from diffalign.models._model import Model

TWINS = {
    "sd15": ("sd15", sd15.build_tiny, {}),
    "sd21": ("sd15", sd15.build_tiny, {"prediction_type": "v_prediction"}),
    "sdxl": ("sdxl", sdxl.build_tiny, {}),
    "sd3": ("sd3", sd3.build_tiny, {}),
    "sd3-no-t5": ("sd3", sd3.build_tiny, {"has_t5": False}),
}


class Twins:
    """Folders of the tiny pipelines, built on first use, and models loaded from them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, twin: str) -> Path:
        _, build_tiny, options = TWINS[twin]
        path = self.root / twin
        return path if path.is_dir() else build_tiny(path, **options)

    def load(self, twin: str, **keys: Any) -> Model:
        torch.manual_seed(0)
        return registry.build("model", {"name": TWINS[twin][0], "path": str(self.folder(twin)), **keys}).load()

    def pipeline(self, twin: str) -> Any:
        """The plain diffusers pipeline."""
        from diffusers import DiffusionPipeline

        absent = {"text_encoder_3": None, "tokenizer_3": None} if twin == "sd3-no-t5" else {}
        pipeline = DiffusionPipeline.from_pretrained(self.folder(twin), **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(tmp_path_factory.mktemp("twins"))


@pytest.fixture(params=list(TWINS))
def twin(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["sd15", "sdxl", "sd3"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def inputs(model: Model, num: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Noise, times and conditioning for one call."""
    generator = torch.Generator().manual_seed(seed)
    xt = torch.randn(num, *model.latent_shape(*model.resolution), generator=generator)
    t = torch.linspace(0.2, 1.0, num)
    sizes = torch.tensor([[32, 32]] * num)
    cond = model.encode_prompts(["a red circle", "two blue squares", "a dog"][:num])
    return xt, t, cond | model.size_cond(sizes, torch.zeros_like(sizes), sizes)


def make_nonzero(model: Model, std: float = 0.1) -> None:
    """Gives the adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
