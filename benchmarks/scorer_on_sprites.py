"""How often the embedded scorers agree with the gold judge on held-out captions: pictures, and noisy previews.

    python benchmarks/scorer_on_sprites.py            # about six minutes on one core
    python benchmarks/scorer_on_sprites.py --prompts 100 --timesteps 251 701

Pairs are the embedded SDXL-architecture model's own pictures of held-out captions (all pairs of a prompt), and right
and wrong renderings of other held-out captions; those that the judge scores equally decide nothing and are left out.
Previews are made as in training: both pictures of a pair noised alike at a timestep, and what the model then takes for
the clean picture. The base scorer sees the same previews as the step-aware one, which is also told timestep 0 for each
(`told_0`): what knowing the time is worth to it, not what a scorer trained without it would reach. Intervals resample
prompts.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffalign import _statistics
from diffalign._json import read_json, write_json
from diffalign.config import resolve
from diffalign.recipes._images import prompt_cond
from diffalign.recipes._run import environment
from diffalign.recipes.generate import generate
from diffalign.recipes.train_scorer._previews import Previews, time_of
from diffalign.registry import build
from diffalign.sprites import WEIGHTS
from diffalign.sprites.preferences import generated_pairs, pair, wrong_scenes
from diffalign.sprites.render import render
from diffalign.sprites.scene import caption, is_held_out, sample_scene

TIMESTEPS = (0, 251, 501, 701, 951)
BATCH = 32


def rendered(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """Pairs for held-out captions: a right rendering, and one with one fault."""
    rng = np.random.default_rng([seed, 21])
    while num:
        scene = sample_scene(rng)
        if is_held_out(caption(scene)):
            options = wrong_scenes(scene)
            shown = [render(scene, rng), render(options[int(rng.integers(len(options)))], rng)]
            yield pair(caption(scene), *(shown if rng.random() < 0.5 else shown[::-1]))
            num -= 1


def decided(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which the judge prefers one."""
    return [row for row in rows if row["label_0"] != 0.5]


def pictures(rows: Sequence[dict[str, Any]]) -> list[Image.Image]:
    """First and second of each pair in turn."""
    return [Image.open(io.BytesIO(row[key])).convert("RGB") for row in rows for key in ("jpg_0", "jpg_1")]


def agreement(scores: NDArray[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of the pairs whose preferred picture has the higher score, with an interval over prompts.

    `scores` [2N], first and second in turn.
    """
    margin = margins(scores, rows)
    found = _statistics.win_rate(margin, np.zeros(len(margin)), groups=[row["caption"] for row in rows])
    return {
        "accuracy": found.rate,
        "low": found.low,
        "high": found.high,
        "pairs": len(rows),
        "prompts": found.num_groups,
    }


def margins(scores: NDArray[Any], rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """Score of the preferred picture less the other's, [N]."""
    sign = np.array([1.0 if row["label_0"] == 1 else -1.0 for row in rows])
    return sign * (np.asarray(scores, np.float64)[0::2] - np.asarray(scores, np.float64)[1::2])


def hits(scores: NDArray[Any], rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    """1 where the preferred picture of a pair has the higher score, 1/2 where both have the same, [N]."""
    return 0.5 * (np.sign(margins(scores, rows)) + 1)


def versus(a: NDArray[np.float64], b: NDArray[np.float64], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of the first scorer less that of the second on the same pairs, of the `hits` of both."""
    found = _statistics.mean_difference(a, b, groups=[row["caption"] for row in rows])
    return {"difference": found.mean, "low": found.low, "high": found.high}


@torch.no_grad()
def on_previews(
    model: Any, rows: Sequence[dict[str, Any]], scorers: dict[str, Any], timestep: int, cfg_scale: float, seed: int
) -> dict[str, NDArray[np.float32]]:
    """scorer -> scores [2N] of the same previews."""
    previews = Previews(model, cfg_scale, seed)
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in (*scorers, "told_0")}
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in pictures(part)]))
        mean, std = model.encode_images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
        texts = [row["caption"] for row in part]
        text = {
            name: value[:, None].expand(-1, 2, *value.shape[1:]) for name, value in prompt_cond(model, texts).items()
        }
        latents = {"mean": mean.unflatten(0, (-1, 2)), "std": std.unflatten(0, (-1, 2)), "text": text}
        ids, visits = torch.arange(start, start + len(part)), torch.zeros(len(part), dtype=torch.long)
        t = torch.full((len(part),), time_of(model.schedule, timestep))
        seen, times = previews(latents, ids, visits, t, f"benchmark {timestep}")
        both, pictures_seen = [text for text in texts for _ in range(2)], seen.flatten(0, 1)
        times = times.repeat_interleave(2)
        for name, scorer in scorers.items():
            found[name].append(scorer.score_tensor(pictures_seen, both, times).numpy())
        told = scorers["sprites_step_aware"].score_tensor(pictures_seen, both, torch.zeros_like(times))
        found["told_0"].append(told.numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of the model's pictures")
    parser.add_argument("--images", type=int, default=4, help="pictures of each")
    parser.add_argument("--rendered", type=int, default=400, help="pairs of renderings")
    parser.add_argument("--timesteps", type=int, nargs="+", default=TIMESTEPS)
    parser.add_argument("--cfg-scale", type=float, default=1.0, help="guidance of the previews")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/scorer-sprites"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scorer-sprites.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    words = [f"generate.prompts=sprites:heldout:{arguments.prompts}", f"generate.images_per_prompt={arguments.images}"]
    words += [f"generate.seed={arguments.seed}", "sampling.cfg_scale=1", "sampling.num_steps=15"]
    images = arguments.work / f"images-{arguments.prompts}-{arguments.images}-{arguments.seed}"
    config = resolve(["sprites-sdxl", *words, f"generate.out={images}", "generate.device=cpu"])
    generate(config)
    sets = {
        "generated": decided(generated_pairs(images)),
        "rendered": decided(rendered(arguments.rendered, arguments.seed)),
    }
    scorers = {
        name: build("scorer", {"name": name, "device": "cpu"}) for name in ("sprites_clip", "sprites_step_aware")
    }
    proxy = build("scorer", {"name": "sprites_proxy"})
    result: dict[str, Any] = environment("cpu") | {
        "command": f"python benchmarks/scorer_on_sprites.py --prompts {arguments.prompts}"
        f" --images {arguments.images} --seed {arguments.seed}",
        "seed": arguments.seed,
        "cfg_scale": arguments.cfg_scale,
        "versions_of_scorers": {name: asdict(scorer.info) for name, scorer in scorers.items()},
        "training": {name: read_json(WEIGHTS / name / "training.json") for name in ("scorer", "step_scorer")},
        "pictures": {},
        "previews": {},
    }
    for name, rows in sets.items():
        texts = [row["caption"] for row in rows for _ in range(2)]
        values = {
            key: scorer.score(pictures(rows), texts) for key, scorer in (scorers | {"sprites_proxy": proxy}).items()
        }
        result["pictures"][name] = {key: agreement(scores, rows) for key, scores in values.items()}
        print(name, {key: round(of["accuracy"], 4) for key, of in result["pictures"][name].items()}, flush=True)
    torch.manual_seed(0)  # of the adapter that stays off
    model = replace(config.model, trainable="lora").load()
    for name, rows in sets.items():
        table = result["previews"][name] = {}
        right: dict[str, list[NDArray[np.float64]]] = {key: [] for key in scorers}
        for timestep in arguments.timesteps:
            values = on_previews(model, rows, scorers, timestep, arguments.cfg_scale, arguments.seed)
            table[str(timestep)] = {key: agreement(scores, rows) for key, scores in values.items()}
            ours, base, told = (hits(values[key], rows) for key in ("sprites_step_aware", "sprites_clip", "told_0"))
            table[str(timestep)]["step_aware_less_base"] = versus(ours, base, rows)
            table[str(timestep)]["step_aware_less_told_0"] = versus(ours, told, rows)
            right["sprites_step_aware"].append(ours)
            right["sprites_clip"].append(base)
            print(name, timestep, {key: round(next(iter(of.values())), 4) for key, of in table[str(timestep)].items()})
        means = [np.mean(right[key], axis=0) for key in ("sprites_step_aware", "sprites_clip")]
        table["all"] = {"step_aware_less_base": versus(*means, rows)}
        print(name, "all timesteps", table["all"], flush=True)
    write_json(arguments.out, result)


if __name__ == "__main__":
    main()
