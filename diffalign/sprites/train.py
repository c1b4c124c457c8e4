"""Trains the embedded models: `python -m diffalign.sprites.train {vae,sdxl,sd3}`; the same command resumes.

The VAE comes first; then each denoiser learns, together with its text encoders, on latents of rendered scenes whose
captions are of the training split. Weights land in `weights/<name>/` as ordinary diffusers pipelines, a stamp beside;
`diffalign.sprites.measure` then adds the judged accuracy to the stamp.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.progress import Progress
from diffalign.sprites import build
from diffalign.sprites.render import render
from diffalign.sprites.scene import caption, is_held_out, parse, sample_scene
from diffalign.sprites.training_state import State, rate, swap_in

WEIGHTS = Path(__file__).parent / "weights"
NUM_SCENES = 60_000
MIXTURE = {"single": 0.3, "open": 0.1, "count": 0.2, "two": 0.4}  # harder scenes more often than they are asked for
BATCH = 32
UNCONDITIONAL = 0.1  # share of captions replaced by the model's unconditional input
SAVE_EVERY_S = 180.0
DEFAULT_STEPS = {"sdxl": 10_000, "sd3": 10_000}  # about an hour on one core each


def training_caption(rng: np.random.Generator, kind: str | None = None) -> str:
    """A caption of the training split."""
    while True:
        text = caption(sample_scene(rng, kind))
        if not is_held_out(text):
            return text


def render_batch(captions: list[str], rng: np.random.Generator) -> Tensor:
    """Pictures in [-1, 1], [n, 3, 64, 64]."""
    images = np.stack([np.asarray(render(parse(text), rng)) for text in captions])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(work: Path, steps: int, seed: int) -> None:
    """L1 plus edges, objects weighted: a small sprite is four hundredths of the pixels, and all that matters."""
    torch.manual_seed(seed)
    model = build.vae().to(memory_format=torch.channels_last)
    state = State(work / "vae-state", {"vae": model})
    begun, saved = time.monotonic() - state.seconds, time.monotonic()
    with Progress("vae", steps, state.step, "step") as progress:
        while state.step < steps:
            rng = np.random.default_rng([seed, state.step])
            images = render_batch([caption(sample_scene(rng)) for _ in range(32)], rng)
            images = images.to(memory_format=torch.channels_last)
            mean = model.encode(images).latent_dist.mean
            restored = model.decode(mean + 0.05 * torch.randn_like(mean)).sample
            away = (images - images[:, :, :1, :1]).abs().amax(dim=1, keepdim=True)  # from the ground's colour
            error = (restored - images) * (1 + 5 * (away > 0.2))
            edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            loss = error.abs().mean() + error.square().mean() + edges + 1e-4 * mean.square().mean()
            loss.backward()
            state.update(loss, rate(state.step, steps, 3e-3, warmup=40))
            state.seconds = time.monotonic() - begun
            if state.step == steps or time.monotonic() - saved > SAVE_EVERY_S:
                state.save()
                saved = time.monotonic()
            progress.advance(note=f"loss {loss.item():.4f}")
    model.load_state_dict(state.averaged()["vae"])
    whiten(model, seed)
    model.save_pretrained(work / "vae")


@torch.no_grad()
def whiten(model: Any, seed: int) -> None:
    """Rotates and scales the latents to mean 0 and unit covariance, and undoes it in the decoder's first layer.

    What the pair computes stays the same. The diffusion model then finds every channel at the scale of its noise; as
    trained, the channels' scales differed tenfold. The posterior's std becomes one small constant.
    """
    rng = np.random.default_rng([seed, 2])
    means = []
    for _ in range(16):
        images = render_batch([training_caption(rng) for _ in range(64)], rng).to(memory_format=torch.channels_last)
        means.append(model.encode(images).latent_dist.mean.movedim(1, -1).flatten(0, -2))
    values = torch.cat(means).double()
    centre = values.mean(0)
    scales, axes = torch.linalg.eigh(torch.cov((values - centre).T))
    forward, backward = (axes / scales.sqrt()).T, axes * scales.sqrt()
    num = len(centre)
    quant, post = model.quant_conv, model.post_quant_conv
    weight, bias = quant.weight[:num, :, 0, 0].double(), quant.bias[:num].double()
    quant.weight.zero_()
    quant.weight[:num, :, 0, 0] = (forward @ weight).float()
    quant.bias[:num] = (forward @ (bias - centre)).float()
    quant.bias[num:] = 2 * math.log(0.02)
    first = post.weight[:, :, 0, 0].double()
    post.bias += (first @ centre).float()
    post.weight[:, :, 0, 0] = (first @ backward).float()


def encode_scenes(work: Path, seed: int) -> tuple[Tensor, list[str]]:
    """Latents [n, C, h, w] (unscaled means) and captions of NUM_SCENES training scenes, made once."""
    from diffusers import AutoencoderKL

    path, texts_path = work / "latents.safetensors", work / "captions.json"
    if not path.is_file():
        model = AutoencoderKL.from_pretrained(work / "vae").eval().to(memory_format=torch.channels_last)
        latents, captions = [], []
        with Progress("encode", NUM_SCENES, unit="scene") as progress, torch.no_grad():
            for start in range(0, NUM_SCENES, 250):
                rng = np.random.default_rng([seed, 1, start])
                kinds = rng.choice(list(MIXTURE), size=250, p=list(MIXTURE.values()))
                texts = [training_caption(rng, str(kind)) for kind in kinds]
                images = render_batch(texts, rng).to(memory_format=torch.channels_last)
                latents.append(model.encode(images).latent_dist.mean.contiguous())
                captions += texts
                progress.advance(250)
        texts_path.write_text(json.dumps(captions))
        save_file({"latents": torch.cat(latents)}, path)
    return load_file(path)["latents"], json.loads(texts_path.read_text())


class Sdxl:
    """The SDXL pipeline's training loss: noise prediction with min-SNR weights (arXiv 2303.09556)."""

    modules = ("unet", "text_encoder", "text_encoder_2")
    autocast = False  # bfloat16 convolutions are slower on a CPU

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.alphas = pipeline.scheduler.alphas_cumprod
        self.time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(BATCH, 6)

    def loss(self, x0: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
        """`keep` [B, 1] is 0 where the prompt is dropped: SDXL's unconditional input is zeros."""
        p = self.pipeline
        first = p.text_encoder(tokens, output_hidden_states=True)
        second = p.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1) * keep[:, :, None]
        t = torch.randint(0, 1000, (BATCH,))
        abar = self.alphas[t][:, None, None, None]
        noise = torch.randn_like(x0)
        pred = p.unet(
            abar.sqrt() * x0 + (1 - abar).sqrt() * noise,
            t,
            states,
            added_cond_kwargs={"text_embeds": second.text_embeds * keep, "time_ids": self.time_ids},
        ).sample
        snr = (abar / (1 - abar)).flatten()
        weight = snr.clamp(max=5) / snr
        return (weight * (pred - noise).square().mean(dim=(1, 2, 3))).mean()


class Sd3:
    """The SD3 pipeline's training loss: velocities at logit-normal times (arXiv 2403.03206)."""

    modules = ("transformer", "text_encoder", "text_encoder_2")
    autocast = True  # a quarter faster

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.empty = pipeline.tokenizer(
            "", padding="max_length", max_length=build.TOKENS, return_tensors="pt"
        ).input_ids

    def loss(self, x0: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
        """The unconditional input is the encoded empty prompt; the missing T5 is a block of zero tokens."""
        p = self.pipeline
        tokens = torch.where(keep > 0, tokens, self.empty)
        first = p.text_encoder(tokens, output_hidden_states=True)
        second = p.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        zeros = 256 if torch.rand(()) < 0.01 else 8  # mostly ours, sometimes diffusers' default
        states = torch.cat([states, states.new_zeros(BATCH, zeros, states.shape[-1])], dim=1)
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        t = torch.sigmoid(torch.randn(BATCH))
        noise = torch.randn_like(x0)
        mixed = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
        pred = p.transformer(mixed, states, pooled, 1000 * t).sample
        return (pred - (noise - x0)).square().mean()


def write_weights(name: str, pipeline: Any, state: State, stamp: dict[str, Any]) -> None:
    """The averaged weights as a float16 pipeline folder, swapped in whole."""
    import copy

    final, temporary = WEIGHTS / name, WEIGHTS / f".{name}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    kept = {module: copy.deepcopy(getattr(pipeline, module)) for module in (*state.modules, "vae")}
    for module, values in state.averaged().items():
        getattr(pipeline, module).load_state_dict(values)
    for module in kept:
        getattr(pipeline, module).half()
    pipeline.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(stamp, indent=2) + "\n")
    for module, original in kept.items():
        getattr(pipeline, module).float().load_state_dict(original.state_dict())
    swap_in(temporary, final)


def train_denoiser(name: str, work: Path, steps: int, seed: int, peak: float) -> None:
    """Denoiser and text encoders together, from the encoded scenes."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    latents, captions = encode_scenes(work, seed)
    autoencoder = AutoencoderKL.from_pretrained(work / "vae")
    mean, std = latents.mean().item(), latents.std().item()
    shift = mean if name == "sd3" else None
    autoencoder.register_to_config(scaling_factor=1 / std, shift_factor=shift)
    pipeline = build.sdxl(autoencoder) if name == "sdxl" else build.sd3(autoencoder)
    pipeline.set_progress_bar_config(disable=True)
    x0 = (latents - (shift or 0.0)) / std
    tokens = pipeline.tokenizer(captions, padding="max_length", max_length=build.TOKENS, return_tensors="pt").input_ids
    task = Sdxl(pipeline) if name == "sdxl" else Sd3(pipeline)
    modules = {module: getattr(pipeline, module).train() for module in task.modules}
    state = State(work / f"{name}-state", modules)
    begun, saved, smooth = time.monotonic() - state.seconds, time.monotonic(), None
    with Progress(name, steps, state.step, "step") as progress:
        while state.step < steps:
            torch.manual_seed(seed * 1_000_003 + state.step)
            rows = torch.randint(0, len(x0), (BATCH,))
            keep = (torch.rand(BATCH, 1) > UNCONDITIONAL).float()
            with torch.autocast("cpu", torch.bfloat16, enabled=task.autocast):
                loss = task.loss(x0[rows], tokens[rows], keep)
            loss.backward()
            state.update(loss, rate(state.step, steps, peak))
            state.seconds = time.monotonic() - begun
            smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
            if state.step == steps or time.monotonic() - saved > SAVE_EVERY_S:
                state.save()
                stamp: dict[str, Any] = {
                    "steps": state.step,
                    "of": steps,
                    "batch": BATCH,
                    "scenes": len(x0),
                    "seed": seed,
                }
                stamp |= {"seconds": round(state.seconds), "loss": smooth, "threads": torch.get_num_threads()}
                write_weights(name, pipeline, state, stamp)
                saved = time.monotonic()
            progress.advance(note=f"loss {smooth:.4f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vae", "encode", "sdxl", "sd3"))
    parser.add_argument("--work", type=Path, default=Path("runs/sprites"), help="checkpoints and encoded scenes")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.what == "vae":
        train_vae(arguments.work, arguments.steps or 1650, arguments.seed)
    elif arguments.what == "encode":
        encode_scenes(arguments.work, arguments.seed)
    else:
        train_denoiser(
            arguments.what,
            arguments.work,
            arguments.steps or DEFAULT_STEPS[arguments.what],
            arguments.seed,
            arguments.lr,
        )


if __name__ == "__main__":
    main()
