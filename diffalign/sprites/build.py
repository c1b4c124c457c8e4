"""The embedded pipelines, untrained: tiny networks in the SDXL and the SD3 architecture around one small VAE."""

from __future__ import annotations

from typing import Any

from diffalign.sprites import scene

TOKENS = 16  # the longest caption has 14 words
TEXT_WIDTH = 64
LATENT_CHANNELS = 4
LATENT_SIZE = 16


def vocabulary() -> list[str]:
    """Every word of the grammar."""
    words = ["a", "on", "of", "background", *scene.SHAPES, *scene.SINGULARS, *scene.COLOURS, *scene.SIZES]
    words += [*scene.BACKGROUNDS, *scene.COUNTS, *(word for phrase in scene.RELATIONS for word in phrase.split())]
    return list(dict.fromkeys(words))


def tokenizer() -> Any:
    """A CLIP tokenizer with a token per word of the grammar; anything else falls apart into bytes."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    made = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token="<|endoftext|>",
        model_max_length=TOKENS,
    )
    made.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in vocabulary()])
    return made


def text_encoder(vocab_size: int, has_projection: bool) -> Any:
    """A two-layer CLIP text encoder, `TEXT_WIDTH` wide."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if has_projection else CLIPTextModel)(config)


def vae() -> Any:
    """64 x 64 pixels to 4 x 16 x 16 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(12, 24, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=scene.SIZE,
    )


def unet() -> Any:
    """SDXL's U-Net: text and time embeddings added, cross-attention on both encoders' states."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2, 3),
        norm_num_groups=16,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
    )


def transformer() -> Any:
    """SD3's MM-DiT on patches of 2 x 2 latent pixels."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
    )


def sdxl(autoencoder: Any) -> Any:
    """The SDXL pipeline, untrained but for its VAE."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    words = tokenizer()
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=text_encoder(len(words), False),
        text_encoder_2=text_encoder(len(words), True),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def sd3(autoencoder: Any) -> Any:
    """The SD3 pipeline without T5, untrained but for its VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    words = tokenizer()
    return StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=text_encoder(len(words), True),
        text_encoder_2=text_encoder(len(words), True),
        text_encoder_3=None,
        tokenizer=words,
        tokenizer_2=tokenizer(),
        tokenizer_3=None,
        transformer=transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
    )
