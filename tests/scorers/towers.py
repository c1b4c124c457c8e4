"""Tiny CLIPs with random weights and CLIP's own vocabulary, built offline; a reference forward pass; nasty inputs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffalign.scorers import _open_clip

from .conftest import randomised

SIDE = 32
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = [
    "a cat with a horn",
    "",
    "\N{GRINNING FACE} an emoji, \N{LEFT DOUBLE QUOTATION MARK}quoted\N{RIGHT DOUBLE QUOTATION MARK} &amp; more",
    "a red cube on a blue sphere " * 360,
    "a cat with a horn",
    "UPPER\tcase\nand   spaces",
    "\N{LATIN SMALL LIGATURE FI}sh na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve",
]


def nasty_pictures() -> list[Image.Image]:
    """Seven pictures: square, wide, transparent, palette, grey, a single pixel, tall with the tower's side."""
    rng = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
        return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)

    smooth = Image.fromarray(noise(9, 12)).resize((120, 90), Image.Resampling.BICUBIC)
    return [
        Image.fromarray(noise(SIDE, SIDE)),
        smooth,
        Image.fromarray(noise(40, 60, 4)),
        smooth.convert("P"),
        smooth.convert("L"),
        Image.new("RGB", (1, 1), (200, 30, 90)),
        Image.fromarray(noise(SIDE, 20)),
    ]


def pixels_of(images: list[Image.Image]) -> list[Tensor]:
    """float32 [1, 3, H, W] in [0, 1], each."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    return [torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255 for array in arrays]


@cache
def network(seed: int = 0, quick_gelu: bool = False) -> Any:
    """open_clip's own network."""
    import open_clip

    torch.manual_seed(seed)
    made = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu)
    randomised(made, seed)
    torch.nn.init.constant_(made.logit_scale, 4.0 + seed / 8)
    return made.eval().requires_grad_(False)


def state(seed: int = 0) -> dict[str, Tensor]:
    """Its weights under open_clip's names."""
    return {key: value.clone() for key, value in network(seed).state_dict().items()}


def write_architecture(folder: Path, quick_gelu: bool = False) -> str:
    """open_clip's JSON config of the sizes."""
    file = folder / f"tiny-{quick_gelu}.json"
    file.write_text(json.dumps(CONFIG | {"quick_gelu": quick_gelu}))
    return str(file)


@cache
def clip_tokenizer() -> Any:
    """transformers' CLIP tokenizer of CLIP's vocabulary, which open_clip ships."""
    from open_clip import SimpleTokenizer
    from transformers import CLIPTokenizer

    words = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {renamed.get(word, word): number for word, number in words.encoder.items()}
    merges = [pair for pair in words.bpe_ranks if len(pair) == 2]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def write_folder(folder: Path, seed: int = 0, quick_gelu: bool = False, has_words: bool = True) -> Path:
    """A CLIP folder as transformers writes it, of the weights of `network(seed)`."""
    from transformers import CLIPModel

    folder.mkdir(parents=True, exist_ok=True)
    model = CLIPModel(_open_clip.clip_config(write_architecture(folder, quick_gelu)))
    model.load_state_dict(_open_clip.to_transformers(state(seed)))
    model.save_pretrained(folder)
    (folder / f"tiny-{quick_gelu}.json").unlink()
    if has_words:
        write_words(folder)
    return folder


def write_head(folder: Path) -> Path:
    """The same folder with a random general preference of 6 dimensions beside the CLIP."""
    from diffalign.scorers import _preference_head

    write_folder(folder)
    torch.manual_seed(3)
    head = randomised(_preference_head.PreferenceHead(CONFIG["embed_dim"], 6))
    _preference_head.save(folder, head)
    return folder


def write_words(folder: Path) -> Path:
    """Tokenizer and preprocessor config."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    clip_tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


def write_hub(cache_folder: Path, repository: str, folder: Path) -> None:
    """What the hub's client leaves in its cache after downloading the files of `folder`."""
    place = cache_folder / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def write_release(file: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A weights file as HPSv2's release is: open_clip's names under `state_dict`; or safetensors."""
    tensors = {key: value.to(dtype) for key, value in state(seed).items()}
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"epoch": 1, "state_dict": tensors}, file)
    return file


def clip_pixels(image: Image.Image) -> Tensor:
    """[3, SIDE, SIDE]: CLIP's preprocessing from Pillow and numpy alone."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    size = (int(SIDE * width / short), int(SIDE * height / short))
    resized = image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    pixels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


def odd_margins() -> list[Image.Image]:
    """Pictures whose margin around the middle is odd at this tower's side, and halved to different numbers."""
    noise = np.random.default_rng(7).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    return [Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR) for size in ((640, 427), (427, 640))]


def torchvision_pixels(image: Image.Image, side: int = SIDE) -> Tensor:
    """[3, side, side]: CLIP's preprocessing as OpenAI's code has it, by torchvision."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    resize = Resize(side, InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(side), ToTensor(), Normalize(MEAN, STD)])(image.convert("RGB"))


def _transformer(
    x: Tensor, weights: dict[str, Tensor], prefix: str, heads: int, is_causal: bool, quick: bool
) -> Tensor:
    width = x.shape[-1]
    for layer in range(2):
        w = {
            key.removeprefix(f"{prefix}{layer}."): v
            for key, v in weights.items()
            if key.startswith(f"{prefix}{layer}.")
        }
        y = F.layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        qkv = F.linear(y, w["attn.in_proj_weight"], w["attn.in_proj_bias"]).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w["attn.out_proj.weight"], w["attn.out_proj.bias"])
        y = F.linear(
            F.layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"]), w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]
        )
        y = y * torch.sigmoid(1.702 * y) if quick else F.gelu(y)
        x = x + F.linear(y, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


def reference_image(pixels: Tensor, seed: int = 0, quick_gelu: bool = False) -> Tensor:
    """Features [N, D], not of unit length, by torch.nn.functional alone."""
    w = state(seed)
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1) + w["visual.positional_embedding"]
    x = F.layer_norm(x, (48,), w["visual.ln_pre.weight"], w["visual.ln_pre.bias"])
    x = _transformer(x, w, "visual.transformer.resblocks.", 3, False, quick_gelu)
    x = F.layer_norm(x[:, 0], (48,), w["visual.ln_post.weight"], w["visual.ln_post.bias"])
    return x @ w["visual.proj"]


def reference_text(tokens: Tensor, seed: int = 0, quick_gelu: bool = False) -> Tensor:
    """Features [N, D], not of unit length, at the first end token."""
    w = state(seed)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][: tokens.shape[1]]
    x = _transformer(x, w, "transformer.resblocks.", 2, True, quick_gelu)
    x = F.layer_norm(x, (32,), w["ln_final.weight"], w["ln_final.bias"])
    return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ w["text_projection"]


def reference_cosine(pixels: Tensor, tokens: Tensor, seed: int = 0, quick_gelu: bool = False) -> Tensor:
    """[N]."""
    return F.cosine_similarity(reference_image(pixels, seed, quick_gelu), reference_text(tokens, seed, quick_gelu))
