"""What happens when the labels come from a judge that can be hacked: gold and proxy score along long runs.

    python benchmarks/overoptimisation_on_sprites.py --data runs/methods/sprites-sdxl/data

Pairs are labelled by `sprites_proxy`, which likes saturated colour as much as following the prompt. Every run samples
the same held-out prompts with the same noise as it goes and scores them with both judges; the alarm is on, and only
warns. Two claims are tested. An SFT term curbs over-optimisation (arXiv 2405.16436): contradicted where the gold score
falls as far from its peak with it as without. Falling diversity flags over-optimisation early (after 2410.11677):
contradicted where the alarm rings after the gold score's peak by more than two samplings, or never. `--decide`
trains nothing: it asks today's alarm about the samplings of runs that are there.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign._json import write_json
from diffalign.config import resolve
from diffalign.distributed import World
from diffalign.metrics import read_metrics
from diffalign.recipes._run import environment
from diffalign.recipes._stopping import decide
from diffalign.recipes.generate import generate
from diffalign.recipes.label import label
from diffalign.recipes.score import score
from diffalign.recipes.train import train
from diffalign.sprites.scene import prompts

GOLD, PROXY = SCORERS = ("sprites_gold", "sprites_proxy")


def pair(beta: float) -> dict[str, Any]:
    """Diffusion-DPO."""
    return {"name": "pair", "beta": beta}


RUNS: dict[str, dict[str, Any]] = {
    "dpo, beta 1000": pair(1000.0),
    "dpo, beta 50": pair(50.0),
    "sft-po, beta 50, weight 1": {"name": "sum", "terms": [pair(50.0), {"name": "sft", "weight": 1.0}]},
    "sft-po, beta 50, weight 10": {"name": "sum", "terms": [pair(50.0), {"name": "sft", "weight": 10.0}]},
}


def pairs_of(model: str, root: Path, num_prompts: int) -> Path:
    """All pairs of the base's samples, labelled by the proxy."""
    config = resolve([model, "demo", f"generate.prompts=sprites:train:{num_prompts}:two"])
    images = generate(replace(config, generate=replace(config.generate, out=str(root / "images"))))
    scores = score(replace(config, score=replace(config.score, images=str(images), scorers=SCORERS)))
    how = replace(config.label, scores=str(scores), scorer=PROXY, rule="all-pairs", out=str(root / "all-pairs-proxy"))
    return label(replace(config, label=how))


def curve(name: str, seed: int, pairs: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run's samplings: step, both scores, diversity, and where the alarm rang."""
    out = arguments.out / f"{name.replace(', ', '-').replace(' ', '')}-{seed}"
    fixed = {
        "objective": RUNS[name],
        "source": {
            "data": {"path": str(pairs)},
            "cache_dir": str(arguments.out / "cache"),
            "cache_dtype": "float32",
            "prompt_dropout": 0.0,
        },
        "sampling": {"num_steps": 20, "cfg_scale": 1.0, "batch_size": 48},
        "train": {
            "out": str(out),
            "steps": arguments.steps,
            "batch_size": 16,
            "lr": 1e-3,
            "warmup_steps": 20,
            "seed": seed,
            "validate_every": 0,
            "sample_every": arguments.every,
            "sample_prompts": prompts(arguments.sampled, split="heldout", kind="two"),
        },
        "stop": {
            "scorers": list(SCORERS),
            "seeds": 2,
            "alarm": "warn",
            "train_scorer": PROXY,
        },
        "log": {"trackers": [], "every": 10},
    }
    config = resolve([arguments.model, "diffusion-dpo", fixed])
    if not arguments.decide:
        train(config, quiet=True)
    rows = [row for row in read_metrics(out) if f"samples/{GOLD}" in row]
    kept = [f"samples/{name}{end}" for name in (GOLD, PROXY, "diversity") for end in ("", "_se")]
    alarms = [bool(decide(rows[: k + 1], config.stop).alarm) for k in range(len(rows))]
    told = [{"step": row["step"]} | {key: row.get(key) for key in kept} for row in rows]
    return {
        "name": name,
        "seed": seed,
        "rows": [row | {"alarm": alarm} for row, alarm in zip(told, alarms, strict=True)],
    }


def summary(run: dict[str, Any]) -> str:
    """A Markdown row: where gold peaks, what is left of it at the end, and when the alarm first rang."""
    rows = run["rows"]
    gold = [row[f"samples/{GOLD}"] for row in rows]
    proxy = [row[f"samples/{PROXY}"] for row in rows]
    peak = max(range(len(gold)), key=gold.__getitem__)
    rang = next((row["step"] + 1 for row in rows if row.get("alarm")), None)
    return (
        f"| {run['name']} | {run['seed']} | {gold[0]:.3f} | {gold[peak]:.3f} after {rows[peak]['step'] + 1} |"
        f" {gold[-1]:.3f} | {proxy[0]:.3f} | {proxy[-1]:.3f} | {rows[0]['samples/diversity']:.2f} |"
        f" {rows[-1]['samples/diversity']:.2f} | {rang or 'never'} |"
    )


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between samplings")
    parser.add_argument("--sampled", type=int, default=48, help="held-out prompts, two pictures each")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--data", type=Path, default=Path("runs/overoptimisation/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimisation"))
    parser.add_argument("--decide", action="store_true", help="ask the alarm about finished runs, train nothing")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/overoptimisation-<model>.json")
    arguments = parser.parse_args()
    name = f"overoptimisation-{arguments.model}.json"
    results = arguments.results or Path(__file__).parent / "results" / name
    pairs = Path() if arguments.decide else pairs_of(arguments.model, arguments.data, arguments.prompts)
    runs: list[dict[str, Any]] = []
    print("| run | seed | gold, first | gold peak | gold, last | proxy, first | last | diversity | last | alarm |")
    for seed, named in itertools.product(range(arguments.seeds), RUNS):
        runs.append(curve(named, seed, pairs, arguments))
        stamp = environment(str(World("auto", "auto").device))
        write_json(results, {"model": arguments.model, "steps": arguments.steps, "runs": runs, "stamp": stamp})
        print(summary(runs[-1]), flush=True)


if __name__ == "__main__":
    main()
