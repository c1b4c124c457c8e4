"""The config keys every model family shares; a family's dataclass adds which family it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Lt

from diffalign.models._family import Family

if TYPE_CHECKING:
    from diffalign.models._model import Model

Attention = Literal["auto", "sdpa", "flash", "cudnn", "xformers", "flex", "math"]
Dtype = Literal["float32", "bfloat16", "float16"]
Side = Annotated[int, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank adapter (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353), built by peft."""

    rank: Annotated[int, Gt(0)] = 16
    alpha: Annotated[float, Gt(0)] | None = None  # the update is scaled by alpha / rank; default: rank, that is 1
    targets: Literal["default"] | list[str] = "default"  # ends of module names; default: the attention projections
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0  # active only where gradients are on: never in sampling
    dora: bool = False
    init: str = "gaussian"  # or the path of an exported adapter, whose rank, alpha and targets then hold


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A `model:` section. Frozen weights are kept in `dtype`; trainable parameters are always float32."""

    family: ClassVar[Family]

    path: str  # a diffusers folder, a hub id, "package:pkg/folder", or "tiny": random weights, built offline
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"  # SDXL's VAE overflows in float16 and gives black images
    trainable: Literal["lora", "full"] = "lora"
    lora: Lora = field(default_factory=Lora)
    attention: Attention = "auto"
    gradient_checkpointing: bool = False
    resolution: Side | tuple[Side, Side] | None = None  # pixels, or (height, width); default: the model's own
    compile: Literal[False, "blocks"] = False

    def load(self, device: str = "cpu") -> Model:
        """Loads the pipeline and makes it trainable. LoRA's random half comes from torch's global generator.

        Raises:
            UserError: what is wrong with the path, the folder or a key, in one line.
        """
        from diffalign.models._model import Model

        return Model(self, device)
