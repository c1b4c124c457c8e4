"""Stable Diffusion 1.x and 2.x: a U-Net with one CLIP text encoder (arXiv 2112.10752).

Epsilon (1.x, 2.x base) or v (2.x 768) follows from the pipeline's scheduler config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from diffalign.models import _tiny
from diffalign.models._config import ModelConfig
from diffalign.models._family import Cond, Family, no_size_cond


def _encode(pipeline: Any, prompts: list[str], settings: Any) -> Cond:
    embeds, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
    return {"prompt_embeds": embeds}


def _empty(pipeline: Any, settings: Any) -> Cond:
    return _encode(pipeline, [""], settings)


def _forward(network: nn.Module, xt: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(xt, time, encoder_hidden_states=cond["prompt_embeds"].to(xt.dtype), return_dict=False)[0]


def build_tiny(folder: str | Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Writes a tiny pipeline with random weights: 32 x 32 pixels, 4 x 16 x 16 latents. Returns the folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    with _tiny.seeded(seed):
        unet: Any = UNet2DConditionModel(
            sample_size=_tiny.LATENT,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        )
        pipeline: Any = StableDiffusionPipeline(
            vae=_tiny.vae(4, 0.18215),
            text_encoder=_tiny.clip_encoder(32),
            tokenizer=_tiny.clip_tokenizer(),
            unet=unet.eval(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class SD15(ModelConfig):
    """`model: {name: sd15, path: ...}`: Stable Diffusion 1.x or 2.x."""

    family: ClassVar[Family] = Family(
        pipeline_class="StableDiffusionPipeline",
        denoiser="unet",
        encode=_encode,
        empty=_empty,
        size_cond=no_size_cond,
        forward=_forward,
        build_tiny=build_tiny,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        repeated_blocks=("BasicTransformerBlock",),
        # The checker judges finished images and is no part of training; without it 1.2 GB less are loaded.
        load_options={"safety_checker": None, "requires_safety_checker": False},
    )
