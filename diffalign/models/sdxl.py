"""Stable Diffusion XL: a U-Net with two CLIP text encoders and the image size as conditioning (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.models import _tiny
from diffalign.models._config import ModelConfig
from diffalign.models._family import Cond, Family


def _encode(pipeline: Any, prompts: list[str], settings: Any) -> Cond:
    device = pipeline.text_encoder_2.device
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled": pooled}


def _empty(pipeline: Any, settings: Any) -> Cond:
    """Zeros where the pipeline says so (the published SDXL does), which is not the encoding of an empty text."""
    cond = _encode(pipeline, [""], settings)
    if pipeline.config.force_zeros_for_empty_prompt:
        return {name: torch.zeros_like(value) for name, value in cond.items()}
    return cond


def _size_cond(original: Tensor, crop: Tensor, target: Tensor) -> Cond:
    """Float32 [n, 6]: original height, width, crop top, left, target height, width."""
    return {"time_ids": torch.cat([original, crop, target], dim=1).float()}


def _forward(network: nn.Module, xt: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    assert "time_ids" in cond, "SDXL needs Model.size_cond(...) in its conditioning"
    # Sizes stay float32: bfloat16 would round 1333 pixels to 1336.
    added = {"text_embeds": cond["pooled"].to(xt.dtype), "time_ids": cond["time_ids"].float()}
    embeds = cond["prompt_embeds"].to(xt.dtype)
    return network(xt, time, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0]


def build_tiny(folder: str | Path, seed: int = 0) -> Path:
    """Writes a tiny pipeline with random weights: 32 x 32 pixels, 4 x 16 x 16 latents. Returns the folder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with _tiny.seeded(seed):
        unet: Any = UNet2DConditionModel(
            sample_size=_tiny.LATENT,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(4, 8),
            cross_attention_dim=64,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        pipeline: Any = StableDiffusionXLPipeline(
            vae=_tiny.vae(4, 0.13025),
            text_encoder=_tiny.clip_encoder(32),
            text_encoder_2=_tiny.clip_encoder(32, projection=32),
            tokenizer=_tiny.clip_tokenizer(),
            tokenizer_2=_tiny.clip_tokenizer(pad_token="!"),
            unet=unet.eval(),
            scheduler=scheduler,
            add_watermarker=False,
        )
        pipeline.save_pretrained(folder)
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class SDXL(ModelConfig):
    """`model: {name: sdxl, path: ...}`: Stable Diffusion XL base."""

    family: ClassVar[Family] = Family(
        pipeline_class="StableDiffusionXLPipeline",
        denoiser="unet",
        encode=_encode,
        empty=_empty,
        size_cond=_size_cond,
        forward=_forward,
        build_tiny=build_tiny,
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        repeated_blocks=("BasicTransformerBlock",),
    )
