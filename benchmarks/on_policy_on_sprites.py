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

SPO judges previews, for which the exact judge of finished pictures is a poor one (`spo-gold`): its row is judged by the
learned `sprites_clip`. Controls: `spo-winner` goes on from the winner instead of a random candidate, `own-dpo` and
`foreign-dpo` differ in whose pictures they learn from alone; `d3po` propagates a picture's label to all its steps,
while `spo` labels each step.

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
from typing import Any, Literal

import numpy as np
from methods_on_sprites import GOLD, SCORERS, diversity, pictures, sampling, with_adapter

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

STEPS = 20  # of the sampler, in training
NUM_SEEDS_SAMPLED = 2  # pictures per final prompt
TRAIN_PROMPTS = "sprites:train:400:two"
RENDERER = Path(__file__).parents[1] / "datasets_prep" / "sprites.py"
BETA, NOISE = "beta of the model", "noise of the model"  # in a method's sections, for a value of OF_MODEL
# beta of likelihoods over noise levels is the demos': velocity errors exceed noise errors. The noise of steps is that
# of ancestral sampling: DDIM's eta 1, the flow SDE's sqrt 2
OF_MODEL = {"sprites-sdxl": {BETA: 1000.0, NOISE: 1.0}, "sprites-sd3": {BETA: 100.0, NOISE: 2**0.5}}
SAMPLER = {"num_steps": STEPS, "cfg_scale": 1.0, "batch_size": 32}  # as the evaluation: guidance alone lifts the base


@dataclass(frozen=True)
class Method:
    """A shipped config, and what the small world changes in it."""

    config: str
    images: int  # of a round, in pictures of STEPS steps; 0 where nothing is sampled while training
    steps: int  # optimizer steps of a round
    sections: dict[str, Any]
    records: Literal["base's", "rendered"] | None = None  # pictures it learns from besides its own


def _pool(every: int) -> dict[str, Any]:
    return {"name": "checkpoint_pool", "strategy": "last", "every": every, "size": 2}


def _dpo(whose: str) -> Method:
    source = {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all", "sample_from": whose}
    sections = {"source": source, "reference": {"name": "adapter_off"}, "objective": {"beta": BETA}}
    return Method("online-dpo", 64, 16, {**sections, "train": {"batch_size": 16}})


def _rivals(config: str, records: Literal["base's", "rendered"] = "base's", **sections: Any) -> Method:
    source = {"steps_per_round": 16}
    return Method(config, 64, 16, {"source": source, "train": {"batch_size": 8}, **sections}, records)


def _seppo(config: str, records: Literal["base's", "rendered"] = "base's", **sections: Any) -> Method:
    return _rivals(config, records, **{"reference": _pool(16), "objective": {"beta": BETA}, **sections})


def _offline(config: str, records: Literal["base's", "rendered"], batch_size: int, **sections: Any) -> Method:
    return Method(config, 0, 16, {"train": {"batch_size": batch_size}, **sections}, records)


def _normalized(config: str, steps: int, source: dict[str, Any], batch_size: int) -> Method:
    """The ratios are smaller by the steps' stds, so beta is larger."""
    sections = {"source": source, "likelihood": {"ratio": "normalized"}, "objective": {"beta": 10.0}}
    return Method(config, 64, steps, {**sections, "train": {"batch_size": batch_size}})


EXPLORE = {"name": "explore", "beta": BETA, "weight": 0.01, "candidates": [1]}
SOFT_PAIR = {"name": "pair", "beta": BETA, "labels": "soft", "temperature": 0.1}
KL_ON_RIVALS = {"name": "kl", "weight": 100.0, "candidates": [2]}
# Steps that are recorded or branch: the noisier. A log-density counts in units of its step's own noise, so that the
# last, nearly noiseless steps outweigh the rest: `d3po-every-step` shows it.
EARLY = {"noisy": [0.0, 0.6]}
LAST = 11
D3PO = {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}
SPO = {"prompts_per_round": 20, "scorers": ["sprites_clip"]}
GOLD_ON_PREVIEWS = {"prompts_per_round": 20, "temperature": 0.1}
GROUPS = {"images_per_prompt": 8, "prompts_per_round": 8}
# GRPO-Guard's ratios in other methods: every step counts alike, so that none has to be left out
MEANS = {"record_means": True, "sampling": {"eta": NOISE}}
EARLY_MEANS = {"record_means": True, "sampling": {"eta": NOISE, **EARLY}}
METHODS = {
    "d3po": Method("d3po", 64, 16, {"source": {**D3PO, "sampling": EARLY}, "train": {"batch_size": 32}}),
    "d3po-every-step": Method("d3po", 64, 16, {"source": D3PO, "train": {"batch_size": 32}}),
    # at beta 0.1 the gradients are of the size of Adam's usual epsilon
    "d3po-adam-1e-12": Method(
        "d3po", 64, 16, {"source": {**D3PO, "sampling": EARLY}, "train": {"batch_size": 32, "adam_eps": 1e-12}}
    ),
    "d3po-every-step-adam-1e-12": Method(
        "d3po", 64, 16, {"source": D3PO, "train": {"batch_size": 32, "adam_eps": 1e-12}}
    ),
    "d3po-normalized": _normalized("d3po", 16, {**D3PO, **EARLY_MEANS}, 32),
    "d3po-normalized-every-step": _normalized("d3po", 16, {**D3PO, **MEANS}, 32),
    # 4 + 1 + 4 * 15 of 80 rows are one chain's and its candidates': 65/20 pictures a prompt
    "spo": Method("spo", 65, 16, {"source": SPO, "train": {"batch_size": 32}}),
    # the same from a learned scorer that is told how noisy the preview's state was
    "spo-step-aware": Method(
        "spo", 65, 16, {"source": {**SPO, "scorers": ["sprites_step_aware"]}, "train": {"batch_size": 32}}
    ),
    "spo-gold": Method("spo", 65, 16, {"source": GOLD_ON_PREVIEWS, "train": {"batch_size": 32}}),
    "spo-gold-early": Method(
        "spo", 37, 16, {"source": {**GOLD_ON_PREVIEWS, "last_step": LAST}, "train": {"batch_size": 32}}
    ),
    # the exact judge on what a candidate leads to: 133/20 pictures a prompt
    "spo-gold-ahead": Method(
        "spo",
        66,
        16,
        {
            "source": {**GOLD_ON_PREVIEWS, "prompts_per_round": 10, "last_step": LAST, "preview_steps": 4},
            "train": {"batch_size": 32},
        },
    ),
    "step-dpo": Method(
        "step-dpo",
        42,
        8,
        {"source": {"prompts_per_round": 40, "temperature": 0.1, "last_step": LAST}, "train": {"batch_size": 16}},
    ),
    "m-dpo": Method(
        "m-dpo",
        64,
        8,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all", "sampling": EARLY}}
        | {"train": {"batch_size": 8}},
    ),
    "m-dpo-normalized": _normalized("m-dpo", 8, {**D3PO, **EARLY_MEANS}, 8),
    "tree-po": Method(
        "tree-po",
        64,
        8,
        {"source": {"prompts_per_round": 16, "steps_used": 5, "sampling": EARLY}, "train": {"batch_size": 4}},
    ),
    "tree-po-normalized": _normalized(
        "tree-po", 8, {"prompts_per_round": 16, "steps_used": 5, "branch_at": 1, **EARLY_MEANS}, 4
    ),
    "flow-grpo": Method(
        "flow-grpo",
        64,
        16,
        {"source": {**GROUPS, "sampling": {"num_steps": STEPS, **EARLY}}, "train": {"batch_size": 8}},
    ),
    "grpo-guard": Method(
        "grpo-guard",
        64,
        16,
        {
            "source": {**GROUPS, "sampling": {"num_steps": STEPS, "eta": NOISE, **EARLY}},
            "objective": {"terms": [{"name": "grpo", "clip": 1e-4}, {"name": "kl", "weight": 0.004}]},
            "train": {"batch_size": 8},
        },
    ),
    "ddpo": Method("ddpo", 64, 16, {"source": {**GROUPS, "sampling": EARLY}, "train": {"batch_size": 8}}),
    "online-dpo": Method(
        "online-dpo",
        64,
        16,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}, "reference": _pool(16)}
        | {"objective": {"beta": BETA}, "train": {"batch_size": 16}},
    ),
    "sppo-iterative": Method(
        "sppo-iterative",
        64,
        16,
        {"source": {"images_per_prompt": 4, "prompts_per_round": 16, "pairs": "all"}, "reference": _pool(16)}
        | {"objective": {"beta": BETA, "nats": BETA}, "train": {"batch_size": 16}},
    ),
    "rso": Method(
        "rso",
        64,
        16,
        {"source": {"images_per_prompt": 8, "prompts_per_round": 8, "reject": 0.1}, "objective": {"beta": BETA}}
        | {"train": {"batch_size": 16}},
    ),
    "nft": Method(
        "nft",
        64,
        16,
        {
            "source": {"images_per_prompt": 8, "prompts_per_round": 8},
            "reference": _pool(16),
            "train": {"batch_size": 4},
        },
    ),
    "spo-winner": Method("spo", 65, 16, {"source": {**SPO, "go_on": "winner"}, "train": {"batch_size": 32}}),
    # the same pairs and reference, from the policy's pictures and from the base's
    "own-dpo": _dpo("policy"),
    "foreign-dpo": _dpo("reference"),
    "xpo": Method(
        "xpo",
        64,
        16,
        {"source": {"prompts_per_round": 32}, "train": {"batch_size": 8}}
        | {"objective": {"terms": [{"name": "pair", "beta": BETA}, EXPLORE]}},
    ),
    "seppo": _seppo("seppo"),
    # the anchor's sign of eight draws in place of one, and no flip at all, which is Diffusion-DPO against the rivals
    "seppo-draws": _seppo("seppo", likelihood={"draws": 8}),
    "seppo-no-flip": _seppo("seppo", objective={"beta": BETA, "flip": "none"}),
    "sspo": _seppo("sspo"),
    "seppo-rendered": _seppo("seppo", "rendered"),
    "seppo-no-flip-rendered": _seppo("seppo", "rendered", objective={"beta": BETA, "flip": "none"}),
    "sspo-rendered": _seppo("sspo", "rendered"),
    # what of it is fine-tuning on the winners
    "sft": _offline("sft", "base's", 8),
    "sft-rendered": _offline("sft", "rendered", 8),
    "reward-po": _rivals(
        "reward-po",
        source={"steps_per_round": 16, "scorers": [GOLD]},
        objective={"terms": [SOFT_PAIR, {"name": "sft", "candidates": [0], "weight": 1.0}]},
    ),
    "hypo": _rivals("hypo", objective={"terms": [{"name": "pair", "beta": BETA, "candidates": [0, 1]}, KL_ON_RIVALS]}),
    "offline-dpo": _offline("diffusion-dpo", "base's", 16, objective={"beta": BETA}),
    "offline-dpo-seconds": _offline("diffusion-dpo", "base's", 16, objective={"beta": BETA}),
}


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
    return resolve([model, method.config, fixed, _of_model(method.sections, OF_MODEL[model])])


def _of_model(value: Any, values: dict[str, float]) -> Any:
    if isinstance(value, dict):
        return {key: _of_model(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [_of_model(item, values) for item in value]
    return values.get(value, value) if isinstance(value, str) else value


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
    folder = bench.root / f"{name}-{bench.arguments.images}" / f"lr-{bench.arguments.lr:g}-seed-{seed}"
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
    """How much better `first` is than `second` on the same prompts, noise and seeds; kept in results/.../paired."""
    seeds = range(bench.arguments.seeds)
    scores = [
        np.concatenate([np.array(measured(bench, name, seed)["scores"][GOLD]) for seed in seeds])
        for name in (first, second)
    ]
    gain = _statistics.mean_difference(*scores, bench.prompt_groups * len(seeds))
    row = {"first": first, "second": second, "seeds": len(seeds), GOLD: [gain.mean, gain.low, gain.high]}
    write_json(bench.results / "paired" / f"{first}-against-{second}.json", {**row, "environment": environment("cpu")})
    return f"{first} - {second}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


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
