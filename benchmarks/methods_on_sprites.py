"""Every method from the same base on the same sprites data, tuned with the same small budget: one table.

    python benchmarks/methods_on_sprites.py                # all methods, three seeds; hours on two cores
    python benchmarks/methods_on_sprites.py --methods diffusion-dpo sft rankdpo --seeds 1 --steps 150

One set of pictures (prompts x images) is sampled and judged once and read as pairs and as ranked lists; `--flips` turns
a share of the pairs round. For each method every setting of its grid (learning rate x beta factor) trains once; the one
with the best gold score on tuning prompts is trained again with each seed and measured on other held-out prompts. Both
evaluations use the base's noise. All of it resumes: a finished run or sampling is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffalign import evaluation
from diffalign._json import read_json, write_json
from diffalign.config import Config, Generate, config_folder, config_names, resolve
from diffalign.data import RecordWriter, Report, good_records
from diffalign.distributed import World
from diffalign.recipes._run import environment
from diffalign.recipes.evaluate import _score_folder
from diffalign.recipes.generate import generate, load_for_images, read_manifest, write_images
from diffalign.recipes.label import label
from diffalign.recipes.score import build_scorers, score
from diffalign.recipes.train import train
from diffalign.registry import build
from diffalign.sprites.scene import prompts

LISTWISE = ("rankdpo", "lipo-lambda", "plackett-luce", "pro", "all-pairs")
LEFT_OUT = {
    "dcpo": "needs a caption per image",
    "flow-dpo": "is diffusion-dpo with another beta",
    "soft-dpo": "needs votes",
}
RATES = (3e-4, 1e-3)
FACTORS = (0.3, 1.0)  # of the beta below
# The demo's for the SDXL-architecture model (a tenth suits the SD3 one); the others start from the same strength.
BETA = 1000.0
OWN_BETA = {"simpo": 50.0, "cpo": 50.0, "kto": 2 * BETA, "orpo": None, "asft": None, "mapo": None, "mapo-paper": None}
SCORERS = ("sprites_gold", "sprites_proxy")


def data_of(model: str, root: Path, num_prompts: int, flips: float, seed: int) -> dict[str, Path]:
    """Pairs and lists of the same pictures; made once."""
    spec = f"sprites:train:{num_prompts}:two"
    config = resolve([model, "demo", f"generate.prompts={spec}", f"score.scorers={list(SCORERS)}"])
    images = generate(replace(config, generate=replace(config.generate, out=str(root / "images"))))
    scores = score(replace(config, score=replace(config.score, images=str(images))))
    made = {}
    for rule in ("all-pairs", "ranking"):
        settings = replace(config.label, scores=str(scores), scorer=SCORERS[0], rule=rule, out=str(root / rule))
        made[rule] = label(replace(config, label=settings))
    if flips:
        made["all-pairs"] = flipped(made["all-pairs"], root / f"all-pairs-flipped-{flips}", flips, seed)
    return made


def flipped(path: Path, out: Path, share: float, seed: int) -> Path:
    """The pairs with a share of the labels turned round, each decided by (seed, its number)."""
    if (out / "done.json").is_file():
        return out
    reader = build("data", {"name": "records", "path": str(path)})
    with RecordWriter(out) as writer:
        for row, record in good_records(reader, Report()):
            turn = np.random.default_rng([seed, row]).random() < share
            writer.write(replace(record, utility=record.utility[::-1]) if turn else record)
    write_json(out / "done.json", {"share": share, "seed": seed})
    return out


def settings_of(method: str) -> Iterator[dict[str, Any]]:
    """The grid of a method as config sections."""
    section = yaml.safe_load((config_folder() / "methods" / f"{method}.yaml").read_text())["objective"]
    beta = OWN_BETA.get(method, BETA if "beta" in str(section) or method in LISTWISE else None)
    factors = FACTORS if beta is not None and method != "sft" else (1.0,)
    for lr, factor in itertools.product(RATES, factors):
        objective = dict(section)
        if beta is not None and method != "sft":
            ratio = beta * factor / section.get("beta", beta)
            objective["beta"] = beta * factor
            if "beta_loser" in section:
                objective["beta_loser"] = section["beta_loser"] * ratio
            if section["name"] == "sum":
                objective.pop("beta")
                first, *rest = section["terms"]
                objective["terms"] = [{**first, "beta": beta * factor}, *rest]
        if "nats" in objective:
            objective["nats"] = 8.0 * 4 * 16 * 16
        yield {"objective": objective, "train": {"lr": lr}}


def measured(config: Config, run: Path | None, texts: Sequence[str], out: Path, seeds: int) -> dict[str, np.ndarray]:
    """Scores of the model's pictures for these prompts, sampled once."""
    world = World("cpu" if config.train.device == "cpu" else "auto", "auto")
    model = load_for_images(config, None if run is None else str(run / "export"), 1.0, world)
    how = Generate(images_per_prompt=seeds, seed=1000)
    write_images(model, list(texts), out, how, config.sampling, world, True, out.name)
    return _score_folder(out, build_scorers(SCORERS), out.name, True)


def one(
    model: str, method: str, data: dict[str, Path], setting: dict[str, Any], seed: int, steps: int, out: Path
) -> tuple[Config, Any, float]:
    """Trains (or finds trained) one run; returns config, result and seconds."""
    path = data["ranking" if method in LISTWISE else "all-pairs"]
    fixed = {
        "source": {"data": {"path": str(path)}, "cache_dir": str(out.parent / "cache"), "cache_dtype": "float32"},
        "train": {
            "out": str(out),
            "steps": steps,
            "batch_size": 32 if method not in LISTWISE else 16,  # the same number of pictures a step
            "seed": seed,
            "sample_every": 0,
            "warmup_steps": 20,
            "lr_schedule": "cosine",
        },
        "log": {"trackers": []},
    }
    config = resolve([model, method, {"sampling": sampling()}, fixed, setting])
    begun = time.perf_counter()
    result = train(config, quiet=True)
    return config, result, time.perf_counter() - begun


def sampling() -> dict[str, Any]:
    """The demo's sampler."""
    return yaml.safe_load((config_folder() / "runs" / "demo.yaml").read_text())["sampling"]


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl")
    parser.add_argument("--methods", nargs="*", default=[m for m in config_names("methods") if m not in LEFT_OUT])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--flips", type=float, default=0.0, help="share of pairs with a wrong label")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/methods-<model>[-flips].json")
    arguments = parser.parse_args()
    root = arguments.out / arguments.model
    suffix = f"-flips-{arguments.flips}" if arguments.flips else ""
    results = arguments.results or Path(__file__).parent / "results" / f"methods-{arguments.model}{suffix}.json"
    data = data_of(arguments.model, root / "data", arguments.prompts, arguments.flips, seed=0)
    tuning, final = prompts(300, split="heldout", kind="two")[200:], prompts(200, split="heldout", kind="two")
    base_config = resolve([arguments.model, {"sampling": sampling()}])
    base = {
        "tuning": measured(base_config, None, tuning, root / "base-tuning", 1),
        "final": measured(base_config, None, final, root / "base-final", 2),
    }
    table = read_json(results).get("methods", {})
    for method in arguments.methods:
        runs = root / f"{method}{suffix}"
        scored = []
        for number, setting in enumerate(settings_of(method)):
            out = runs / f"tune-{number}"
            config, _, _ = one(arguments.model, method, data, setting, 0, arguments.steps, out)
            scores = measured(config, out, tuning, runs / f"tune-{number}-images", 1)
            scored.append((float(scores[SCORERS[0]].mean()), number, setting))
        best = max(scored, key=lambda row: row[0])
        rows = []
        for seed in range(arguments.seeds):
            out = runs / f"seed-{seed}"
            config, result, seconds = one(arguments.model, method, data, best[2], seed, arguments.steps, out)
            images = runs / f"seed-{seed}-images"
            scores = measured(config, out, final, images, 2)
            compared = evaluation.compare(
                {"base": base["final"], "aligned": scores},
                [row["prompt"] for row in read_manifest(images)],
                [row["number"] for row in read_manifest(images)],
                "base",
                seed=1000,
            )
            row = {"seed": seed, "seconds": seconds, "winner_error_gap": result.metrics.get("winner_error_gap")}
            for line in compared.rows:
                if line.model == "aligned" and line.category is None:
                    row[line.scorer] = {"mean": line.mean.mean, "se": line.mean.se} | (
                        {"win": line.win.rate, "low": line.win.low, "high": line.win.high} if line.win else {}
                    )
            rows.append(row)
        table[method] = {"setting": best[2], "tuning": [row[0] for row in scored], "runs": rows}
        facts = {
            "model": arguments.model,
            "steps": arguments.steps,
            "prompts": arguments.prompts,
            "flips": arguments.flips,
        }
        base_means = {name: float(values.mean()) for name, values in base["final"].items()}
        stamp = environment(str(World("auto", "auto").device))
        write_json(results, facts | {"base": base_means, "methods": table, "stamp": stamp})
        gold = [row[SCORERS[0]] for row in rows]
        wins = ", ".join(f"{100 * g['win']:.1f} [{100 * g['low']:.1f}, {100 * g['high']:.1f}]" for g in gold)
        mean = statistics.mean(g["mean"] for g in gold)
        print(f"{method:18s} gold {mean:.4f} (base {base_means[SCORERS[0]]:.4f}) wins {wins}", flush=True)


if __name__ == "__main__":
    main()
