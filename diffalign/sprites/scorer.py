"""Builds and trains the embedded scorer: `python -m diffalign.sprites.scorer {base,pairs,clip,step}`; resumes.

    base    a small CLIP, trained from scratch on rendered scenes with its contrastive loss (arXiv 2103.00020)
    pairs   preference pairs of training captions, as the gold judge decides: right and wrong renderings, and pictures
            of the embedded SDXL-architecture model
    clip    `diffalign train-scorer` on the pairs: `weights/scorer`, the scorer `sprites_clip`
    step    `diffalign train-scorer` on noisy previews of the pairs: `weights/step_scorer`, `sprites_step_aware`

About ten, five, four and, with its pictures, ninety minutes of an idle core. None reads a held-out caption.
The shipped base's schedule was 1,500 steps long until step 685 and 1,000 from there on; the shipped `clip` learned from
pairs of neighbours among a prompt's pictures, where `pairs` makes all now; `training.json` beside the weights says the
rest.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffalign.progress import Progress
from diffalign.sprites import WEIGHTS, build
from diffalign.sprites.preferences import generated_pairs, rendered_pairs, training_scene, write_pairs, wrong_scenes
from diffalign.sprites.render import render
from diffalign.sprites.scene import SIZE, caption, is_held_out
from diffalign.sprites.training_state import State, rate, swap_in

WIDTH, LAYERS, PATCH = 128, 4, 8
BATCH = 128  # pictures per contrastive step
WRONG = 2  # near-miss captions per picture, beside the batch's other captions
STEPS = 1000  # contrastive: ten minutes on one core
PAIRS = {"rendered": 16_000, "prompts": 500, "images": 4}
# Previews of all noise levels say little a pair: with fewer pairs the step-aware scorer learns its pairs by heart. Most
# are of the model's own pictures, whose faults are harder to see than those of wrong renderings.
STEP_PAIRS = {"rendered": 16_000, "prompts": 5000, "images": 4}
SAVE_EVERY_S = 120.0


def clip() -> Any:
    """The untrained CLIPModel, about 0.95 million parameters: 64-pixel pictures, the sprites tokenizer's captions."""
    from transformers import CLIPConfig, CLIPModel

    text = build.text_encoder(len(build.tokenizer()), True).config.to_dict()
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=build.TEXT_WIDTH))


def contrastive_batch(rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """Pictures [BATCH, 3, 64, 64], normalised, and BATCH * (1 + WRONG) captions: the right ones first."""
    scenes = [training_scene(rng) for _ in range(BATCH)]
    wrong: list[str] = []
    for scene in scenes:
        options = [text for text in map(caption, wrong_scenes(scene)) if not is_held_out(text)]
        wrong += [options[int(rng.integers(len(options)))] if options else caption(scene) for _ in range(WRONG)]
    pixels = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return normalised(torch.from_numpy(pixels)), [*map(caption, scenes), *wrong]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [n, 64, 64, 3] to CLIP's normalised float32 [n, 3, 64, 64]."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def contrastive_loss(model: Any, tokenizer: Any, pixels: Tensor, texts: list[str]) -> Tensor:
    """Cross entropy of pictures over all captions and of right captions over pictures; equal captions are no wrong."""
    num = len(pixels)
    unique = list(dict.fromkeys(texts))
    place = torch.tensor([unique.index(text) for text in texts])
    tokens = tokenizer(unique, padding="max_length", max_length=build.TOKENS, return_tensors="pt").input_ids
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=pixels).pooler_output
        text = model.get_text_features(input_ids=tokens).pooler_output
    image, text = (nn.functional.normalize(rows.float(), dim=-1) for rows in (image, text))
    logits = model.logit_scale.exp() * image @ text.T  # [num, distinct captions]
    of_picture = nn.functional.cross_entropy(logits, place[:num])
    square = logits[:, place[:num]].T  # [caption of picture i, picture j]
    is_same = place[:num, None] == place[None, :num]
    square = square.masked_fill(is_same & ~torch.eye(num, dtype=torch.bool), -torch.inf)
    return of_picture + nn.functional.cross_entropy(square, torch.arange(num))


def train_base(work: Path, steps: int, seed: int) -> None:
    """The contrastive training; `work/base` is then a CLIP folder in float32."""
    torch.manual_seed(seed)
    model, tokenizer = clip(), build.tokenizer()
    state = State(work / "base-state", {"clip": model})
    begun, saved, smooth = time.monotonic() - state.seconds, time.monotonic(), None
    with Progress("contrastive", steps, state.step, "step") as progress:
        while state.step < steps:
            pixels, texts = contrastive_batch(np.random.default_rng([seed, 11, state.step]))
            loss = contrastive_loss(model, tokenizer, pixels, texts)
            loss.backward()
            state.update(loss, rate(state.step, steps, 1e-3))
            state.seconds = time.monotonic() - begun
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            if state.step == steps or time.monotonic() - saved > SAVE_EVERY_S:
                state.save()
                saved = time.monotonic()
            progress.advance(note=f"loss {smooth:.4f}")
    model.load_state_dict(state.averaged()["clip"])
    write_clip(model, work / "base")
    facts = {"steps": steps, "batch": BATCH, "seed": seed, "seconds": round(state.seconds), "loss": smooth}
    (work / "base" / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_clip(model: Any, folder: Path) -> None:
    """A CLIP folder: weights, tokenizer and the preprocessing at 64 pixels."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model.save_pretrained(folder)
    build.tokenizer().save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)


def make_pairs(work: Path, seed: int) -> None:
    """`work/pairs/*.parquet`; the pictures come from `diffalign generate`, without guidance as in the demo."""
    command("generate", "sprites-sdxl", f"generate.out={work / 'images'}", *of_images(PAIRS, seed))
    rendered = rendered_pairs(PAIRS["rendered"], seed)
    _write(work / "pairs", {"generated": generated_pairs(work / "images"), "rendered": rendered})


def make_step_pairs(work: Path, seed: int) -> None:
    """`work/step-pairs/*.parquet`: more of the model's own."""
    command("generate", "sprites-sdxl", f"generate.out={work / 'step-images'}", *of_images(STEP_PAIRS, seed))
    pairs = {
        "generated": generated_pairs(work / "step-images"),
        "rendered": rendered_pairs(STEP_PAIRS["rendered"], seed),
    }
    _write(work / "step-pairs", pairs)


def _write(folder: Path, pairs: Mapping[str, Iterator[dict[str, Any]]]) -> None:
    """A file for each that is not there yet."""
    for name, rows in pairs.items():
        if not (folder / f"{name}.parquet").is_file():
            write_pairs(folder / f"{name}.parquet", rows)


def of_images(num: Mapping[str, int], seed: int) -> list[str]:
    """The words of the pictures' sampling."""
    prompts = f"generate.prompts=sprites:train:{num['prompts']}"
    words = [prompts, f"generate.images_per_prompt={num['images']}", f"generate.seed={seed}"]
    return [*words, "sampling.cfg_scale=1", "sampling.num_steps=15", "sampling.batch_size=50"]


def command(*words: str) -> None:
    """One verb in a process of its own: this package lies below the recipes. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "diffalign", *words], check=True)


def ship(exported: Path, final: Path, facts: dict[str, Any]) -> None:
    """An exported scorer in float16, swapped into the package's weights."""
    temporary = final.with_name(f".{final.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(exported, temporary)
    for path in temporary.glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    (temporary / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    swap_in(temporary, final)


def train_clip(work: Path, seed: int, extra: list[str]) -> None:
    """Bradley-Terry on the pairs, from the contrastive base."""
    words = [f"train_scorer.base={work / 'base'}", f"train_scorer.data.path={work / 'pairs'}"]
    words += [f"train_scorer.out={work / 'clip'}", f"train_scorer.seed={seed}", *CLIP_SETTINGS, *extra]
    command("train-scorer", *words)
    base = json.loads((work / "base" / "training.json").read_text())
    ship(work / "clip" / "export", WEIGHTS / "scorer", {"base": base, **_facts(work / "clip", words)})


def train_step(work: Path, seed: int, extra: list[str]) -> None:
    """The step-aware scorer, on previews of the embedded SDXL-architecture model, from `weights/scorer`."""
    make_step_pairs(work, seed)
    words = [f"train_scorer.base={WEIGHTS / 'scorer'}", f"train_scorer.data.path={work / 'step-pairs'}"]
    words += [
        f"train_scorer.out={work / 'step'}",
        f"train_scorer.seed={seed}",
        f"train_scorer.cache_dir={work / 'cache'}",
    ]
    words += [*STEP_SETTINGS, *extra]
    command("train-scorer", "sprites-sdxl", *words)
    ship(work / "step" / "export", WEIGHTS / "step_scorer", _facts(work / "step", words))


def _facts(run: Path, words: list[str]) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for key, value in rows[-1].items() if key.startswith("holdout/") or key == "step"}
    settings = [word for word in words if not any(f".{key}=" in word for key in ("path", "out", "base", "cache_dir"))]
    return {"settings": settings, "last": last}


CLIP_SETTINGS = [
    *("train_scorer.lr=5e-5", "train_scorer.steps=220", "train_scorer.batch_size=64", "train_scorer.warmup_steps=20"),
    *("train_scorer.weight_decay=0.01", "train_scorer.validate_every=220", "train_scorer.checkpoint_every=55"),
    *("train_scorer.precision=bf16", "train_scorer.device=cpu", "train_scorer.validate_pairs=500", "log.trackers=[]"),
]
STEP_SETTINGS = [
    *("train_scorer.step_aware=true", "train_scorer.cfg_scale=1", "train_scorer.prompt_weights=false"),
    *("train_scorer.lr=3e-5", "train_scorer.modulation_lr=1e-3", "train_scorer.lr_schedule=cosine"),
    *("train_scorer.steps=1000", "train_scorer.batch_size=64", "train_scorer.warmup_steps=30"),
    *("train_scorer.weight_decay=0.01", "train_scorer.validate_every=100", "train_scorer.validate_pairs=1000"),
    *("train_scorer.holdout=0.03", "train_scorer.checkpoint_every=50"),
    *("train_scorer.precision=bf16", "train_scorer.device=cpu", "log.trackers=[]"),
]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "pairs", "clip", "step"))
    parser.add_argument("--work", type=Path, default=Path("runs/sprites-scorer"), help="checkpoints and pairs")
    parser.add_argument("--steps", type=int, default=STEPS, help="contrastive steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments, extra = parser.parse_known_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "base":
        train_base(arguments.work, arguments.steps, arguments.seed)
    elif arguments.what == "pairs":
        make_pairs(arguments.work, arguments.seed)
    else:
        (train_clip if arguments.what == "clip" else train_step)(arguments.work, arguments.seed, extra)


if __name__ == "__main__":
    main()
