"""A tiny Qwen2-VL with random weights and a tokenizer of single bytes, built offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .conftest import randomised

CONTROL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def processor() -> Any:
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    words = Qwen2Tokenizer(vocab=vocabulary, merges=[("Y", "e"), ("Ye", "s")])
    words.add_tokens(CONTROL, special_tokens=True)
    size = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    return Qwen2VLProcessor(Qwen2VLImageProcessorPil(size=size), words, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def config(made: Any) -> Any:
    from transformers import Qwen2VLConfig

    image, video, start, end = (made.tokenizer.convert_tokens_to_ids(CONTROL[index]) for index in (4, 5, 2, 3))
    text = {
        "vocab_size": len(made.tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)


def write_vlm(folder: Path) -> Path:
    """The model's folder, as transformers writes it."""
    from transformers import Qwen2VLForConditionalGeneration

    words = processor()
    torch.manual_seed(0)
    randomised(Qwen2VLForConditionalGeneration(config(words)), 1).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
