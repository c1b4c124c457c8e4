"""Methods that sample while they train, from the same base with the same judge: one table, beside offline DPO.

    python benchmarks/on_policy_on_sprites.py                          # all, on sprites-sdxl, three seeds
    python benchmarks/on_policy_on_sprites.py --model sprites-sd3 --methods d3po spo
    python benchmarks/on_policy_on_sprites.py --table                  # what is there, as Markdown
    python benchmarks/on_policy_on_sprites.py --paired foreign-dpo own-dpo   # their difference, from the runs' folders

Every method may take as many rows of the network for sampling as `--images` pictures cost (20 steps), on prompts of
two objects, judged by the gold judge. All have one learning rate and schedule (a hundred pictures for tuning told rates
apart no better than chance, and more would cost more than the runs), every seed is trained and measured on held-out
prompts, with the base's noise.
Offline DPO samples its pictures from the base beforehand and trains on all pairs of them for as many optimizer steps as
its row says; `offline-dpo-seconds` goes on as long as the slowest method took. SePPO and its relatives learn from
offline DPO's pairs and sample a rival for each record on top of them: their row says how many pictures. In the rows
`rendered` the records are datasets_prep/sprites.py's, whose winners are better than what the model makes, as in SePPO's
paper.
Seconds are of the processor, so that other work on the machine does not count.

SPO judges previews: `spo` by the learned `sprites_clip`, `spo-step-aware` by one that is told the time, `spo-gold` by
the exact judge of finished pictures. Controls: `spo-winner` goes on from the winner instead of a random candidate,
`own-dpo` and `foreign-dpo` differ in whose pictures they learn from alone; `d3po` propagates a picture's label to all
its steps, while `spo` labels each step.

A result is a file per method in benchmarks/results/on-policy-<model>/, and a method that has one is not done again. A
killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from methods_data import GOLD, SCORERS
from methods_on_sprites import diversity, pictures, sampling, with_adapter
from on_policy_methods import METHODS, OF_MODEL, STEPS, sections_of

from diffalign import _statistics
from diffalign._json import read_json, write_json
from diffalign.config import Config, resolve
from diffalign.metrics import read_metrics
from diffalign.recipes._run import environment
from diffalign.recipes.generate import generate
from diffalign.recipes.label import label
from diffalign.recipes.score import score
from diffalign.recipes.train import train
from diffalign.sprites.scene import prompts

NUM_SEEDS_SAMPLED = 2  # pictures per final prompt
TRAIN_PROMPTS = "sprites:train:400:two"
RENDERER = Path(__file__).parents[1] / "datasets_prep" / "sprites.py"
SAMPLER = {"num_steps": STEPS, "cfg_scale": 1.0, "batch_size": 32}  # as the evaluation: guidance alone lifts the base


@dataclass(frozen=True)
class Bench:
    """What all methods share."""

    arguments: argparse.Namespace
    root: Path
    results: Path
    final: Sequence[str]
    base: dict[str, np.ndarray]

    @property
    def offline(self) -> Path:
        """Pictures and pairs that were sampled beforehand."""
        return self.root / f"offline-{self.arguments.images}"

    def folder(self, name: str, seed: int) -> Path:
        """What one run keeps."""
        return self.root / f"{name}-{self.arguments.images}" / f"lr-{self.arguments.lr:g}-seed-{seed}"

    @property
    def prompt_groups(self) -> list[str]:
        """The prompt of every final picture."""
        return [text for text in self.final for _ in range(NUM_SEEDS_SAMPLED)]


def prepare(arguments: argparse.Namespace) -> Bench:
    """Prompts and the base's pictures."""
    root = arguments.out / arguments.model
    final = prompts(200, split="heldout", kind="two")
    config = resolve([arguments.model, {"sampling": sampling()}])
    base = pictures(with_adapter(config, None), config, final, root / "base", NUM_SEEDS_SAMPLED)
    results = arguments.results / f"on-policy-{arguments.model}"
    return Bench(arguments, root, results, final, base)


def rendered_pairs(bench: Bench) -> Path:
    """A right and a wrong drawing for each prompt that the others sample."""
    out = bench.root.parent / "rendered"
    _, split, num, kind = TRAIN_PROMPTS.split(":")
    subprocess.run([sys.executable, RENDERER, out, "--split", split, "--num", num, "--kind", kind], check=True)
    return out


def offline_pairs(bench: Bench) -> Path:
    """All pairs of as many pictures as the others sample, four a prompt, from the base with the same sampler."""
    root, num = bench.offline, bench.arguments.images // 4
    spec = {"prompts": f"sprites:train:{num}:two", "images_per_prompt": 4, "out": str(root / "images")}
    how = {"num_steps": STEPS, "cfg_scale": SAMPLER["cfg_scale"], "batch_size": SAMPLER["batch_size"]}
    config = resolve([bench.arguments.model, {"generate": spec, "sampling": how, "score": {"scorers": [GOLD]}}])
    images = generate(config, quiet=True)
    scores = score(replace(config, score=replace(config.score, images=str(images))), quiet=True)
    settings = replace(config.label, scores=str(scores), scorer=GOLD, rule="all-pairs", out=str(root / "pairs"))
    return label(replace(config, label=settings), quiet=True)


def config_of(bench: Bench, name: str, seed: int, out: Path) -> Config:
    """One run."""
    method, model = METHODS[name], bench.arguments.model
    fixed: dict[str, Any] = {
        "sampling": sampling(),
        "train": {
            "out": str(out),
            "lr": bench.arguments.lr,
            "seed": seed,
            "steps": num_steps(bench, name),
            "warmup_steps": 10,
            "lr_schedule": "cosine",
            "validate_every": 0,
            "sample_every": 0,
            "weight_decay": 0.0,
            "checkpoint_every": 100000,
        },
        "source": {"cache_dir": str(bench.root / "cache")},
        "log": {"trackers": []},
    }
    if method.records:
        records = rendered_pairs(bench) if method.records == "rendered" else bench.offline / "pairs"
        fixed["source"] |= {"data": {"path": str(records)}, "prompt_dropout": 0.0}
    else:
        fixed["source"] |= {"prompts": TRAIN_PROMPTS, "scorers": [GOLD], "steps_per_round": method.steps}
    if method.images:
        fixed["source"] |= {"sampling": SAMPLER}
    return resolve([model, method.config, fixed, sections_of(method, model)])


def num_steps(bench: Bench, name: str) -> int:
    """Optimizer steps: of the rounds that `--images` pays for, rounds of 64 where nothing is sampled."""
    if name == "offline-dpo-seconds":
        results = [read_json(path) for path in bench.results.glob("*.json")]
        slowest = max(row["seconds"] for row in results if METHODS[row["method"]].images)
        offline = read_json(bench.results / "offline-dpo.json")
        return max(1, int((slowest - offline["beforehand_seconds"]) / offline["seconds_per_step"]))
    return max(1, round(bench.arguments.images / (METHODS[name].images or 64))) * METHODS[name].steps


def trained(bench: Bench, name: str, seed: int) -> Path:
    """The folder of one run, trained and timed if it was not."""
    folder = bench.folder(name, seed)
    if not (folder / "seconds.json").is_file():
        begun = time.process_time()
        train(config_of(bench, name, seed, folder / "run"), quiet=True)
        write_json(folder / "seconds.json", {"seconds": time.process_time() - begun})
    return folder


def measured(bench: Bench, name: str, seed: int) -> dict[str, Any]:
    """One run and its scores on the final prompts."""
    folder = trained(bench, name, seed)
    done = folder / "measured.json"
    if not done.is_file():
        config = config_of(bench, name, seed, folder / "run")
        final = pictures(with_adapter(config, folder / "run"), config, bench.final, folder / "final", NUM_SEEDS_SAMPLED)
        rows = read_metrics(folder / "run")

        def summed(key: str, rows: Sequence[dict[str, Any]] = rows) -> float:
            return sum(row.get(f"rollout/{key}", 0.0) for row in rows)

        write_json(
            done,
            {
                "seconds": read_json(folder / "seconds.json")["seconds"],
                "network_rows": summed("network_rows"),
                "units": summed("units"),
                "steps": config.train.steps,
                "diversity": diversity(folder / "final"),
                "clip_fraction": statistics.mean(
                    [row["clip_fraction"] for row in rows if "clip_fraction" in row] or [0]
                ),
                "scores": {scorer: final[scorer].tolist() for scorer in SCORERS},
            },
        )
    return dict(read_json(done))


def run_method(bench: Bench, name: str) -> None:
    """Trains with every seed, writes the method's file."""
    beforehand = 0.0
    if METHODS[name].records == "base's":
        kept = bench.offline / "seconds.json"  # of the first time, when there was something to do
        begun = time.process_time()
        offline_pairs(bench)
        if not kept.is_file():
            write_json(kept, {"seconds": time.process_time() - begun})
        beforehand = read_json(kept)["seconds"]
    rows = [measured(bench, name, seed) for seed in range(bench.arguments.seeds)]
    summary: dict[str, Any] = {}
    for scorer in SCORERS:
        ours = np.concatenate([np.array(row["scores"][scorer]) for row in rows])
        base, groups = np.tile(bench.base[scorer], len(rows)), bench.prompt_groups * len(rows)
        gain = _statistics.mean_difference(ours, base, groups)
        win = _statistics.win_rate(ours, base, groups=groups)
        summary[scorer] = {
            "base": float(base.mean()),
            "gain": [gain.mean, gain.low, gain.high],
            "win_rate": [win.rate, win.low, win.high],
            "gain_of_seed": [float(np.mean(row["scores"][scorer]) - bench.base[scorer].mean()) for row in rows],
        }
    mean = {
        key: statistics.mean(row[key] for row in rows)
        for key in ("diversity", "network_rows", "units", "steps", "clip_fraction")
    }
    training = statistics.mean(row["seconds"] for row in rows)
    images = mean["network_rows"] / STEPS + (bench.arguments.images if METHODS[name].records == "base's" else 0)
    write_json(
        bench.results / f"{name}.json",
        {
            "method": name,
            "images": images,
            "seconds": training + beforehand,
            "beforehand_seconds": beforehand,
            "seconds_per_step": training / mean["steps"],
            "lr": bench.arguments.lr,
            "seeds": bench.arguments.seeds,
            **mean,
            **summary,
            "environment": environment("cpu"),
        },
    )


def paired(bench: Bench, first: str, second: str) -> str:
    """How much better `first` is than `second` on the same prompts, noise and seeds; kept in results/.../paired.

    Raises:
        SystemExit: no results of one, or its runs in the folder are not those of its results.
    """
    num = min(read_json(bench.results / f"{name}.json").get("seeds", 0) for name in (first, second))
    if not num:
        raise SystemExit(f"{first} and {second} need their results first: leave --paired out")
    scores = [np.concatenate([_gold_of_result(bench, name, seed) for seed in range(num)]) for name in (first, second)]
    gain = _statistics.mean_difference(*scores, bench.prompt_groups * num)
    row = {"first": first, "second": second, "seeds": num, GOLD: [gain.mean, gain.low, gain.high]}
    write_json(bench.results / "paired" / f"{first}-against-{second}.json", {**row, "environment": environment("cpu")})
    return f"{first} - {second}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def _gold_of_result(bench: Bench, name: str, seed: int) -> np.ndarray:
    """A run's gold scores, if it is the run that the results are of: a row may have been trained anew since."""
    if not (bench.folder(name, seed) / "measured.json").is_file():
        raise SystemExit(f"{name}, seed {seed}: no run in {bench.folder(name, seed)}")
    scores = np.array(measured(bench, name, seed)["scores"][GOLD])
    told = read_json(bench.results / f"{name}.json")[GOLD]["gain_of_seed"][seed]
    if not np.isclose(scores.mean() - bench.base[GOLD].mean(), told):
        raise SystemExit(f"{name}, seed {seed}: the run below --out is another one than that of the results")
    return scores


def table(results: Path) -> str:
    """The results as Markdown, best gold score first."""
    rows = sorted((read_json(path) for path in results.glob("*.json")), key=lambda row: -row[GOLD]["gain"][0])
    lines = [
        "| method | gold gain (95 %) | win rate | proxy gain | diversity | pictures | steps | lr | seeds | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain, win, proxy = row[GOLD]["gain"], row[GOLD]["win_rate"], row[SCORERS[1]]["gain"]
        lines.append(
            f"| {row['method']} | {gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f}) |"
            f" {100 * win[0]:.0f} % ({100 * win[1]:.0f} to {100 * win[2]:.0f}) | {proxy[0]:+.3f} |"
            f" {row['diversity']:.2f} | {row['images']:.0f} | {row['steps']:.0f} | {row['lr']:g} |"
            f" {row['seeds']} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl", choices=OF_MODEL)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, default=768, help="pictures that a method may sample")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/on-policy"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--paired", nargs=2, choices=METHODS, metavar=("METHOD", "OTHER"))
    arguments = parser.parse_args()
    results = arguments.results / f"on-policy-{arguments.model}"  # as in prepare
    if arguments.paired:
        print(paired(prepare(arguments), *arguments.paired))
        return
    if not arguments.table:
        bench = prepare(arguments)
        for name in arguments.methods:
            if not (results / f"{name}.json").is_file():
                run_method(bench, name)
                print(f"{name}: done", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
