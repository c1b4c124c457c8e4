"""Parts of the tiny twins: whole pipelines with random weights, built offline in about a second.

The tokenizers know every byte (CLIP) or the printable ASCII characters (T5), one token each, so that any text works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from diffalign.models._quiet import no_bars

SIZE = 32  # pixels
LATENT = 16  # the tiny VAEs halve the side once
START, END = "<|startoftext|>", "<|endoftext|>"


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random initialisation from `seed` that leaves the caller's generator alone; no bars while saving."""
    with torch.random.fork_rng(devices=[]), no_bars():
        torch.manual_seed(seed)
        yield


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the tokenizers library's order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip_tokenizer(pad_token: str = END) -> Any:
    """A CLIP tokenizer without merges: one token per byte, 77 long."""
    from transformers import CLIPTokenizer

    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), START, END]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def clip_encoder(width: int, projection: int | None = None, layers: int = 2) -> Any:
    """A tiny CLIP text encoder; with `projection` it also gives a pooled embedding of that size."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=projection or width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    """A T5 tokenizer with one token per printable ASCII character."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=512)


def t5_encoder(width: int) -> Any:
    """A tiny T5 encoder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels: int, scaling_factor: float, shift_factor: float | None = None) -> Any:
    """A tiny autoencoder: 32 x 32 pixels to `channels` x 16 x 16 latents."""
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )
    return network.eval()
