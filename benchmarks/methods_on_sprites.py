"""Every method from the same base on the same sprites pictures, tuned with the same small budget: one table.

    python benchmarks/methods_on_sprites.py                # all methods, three seeds: five minutes each on one core
    python benchmarks/methods_on_sprites.py --methods diffusion-dpo sft rankdpo --steps 300
    python benchmarks/methods_on_sprites.py --flips 0.2 --tuned-on benchmarks/results/methods-sprites-sdxl --methods kto
    python benchmarks/methods_on_sprites.py --seconds      # what a step of each costs, on one core
    python benchmarks/methods_on_sprites.py --table        # the table of what is there, as Markdown
    python benchmarks/methods_on_sprites.py --table --by-flips    # gold gain by share of wrong labels

One set of pictures (prompts x images) is sampled from the base and judged once, and read as pairs (with or without the
judge's scores), as ranked lists or as single pictures liked or not; `--flips` turns a share of the pairs, or of the
likes, round. Each method trains once with each of three strengths (its beta, times 1/5, 1, 5; without one, the learning
rate times 1/3, 1, 3). The strength with the best gold score on tuning prompts is trained with every seed and measured
on other held-out prompts, with the base's noise. `--tuned-on` takes the strength that a folder of results chose, such
as that of the right labels, instead of tuning.

A result is a file per method in benchmarks/results/methods-<model>[-flips-<share>]/, and a method that has one is not
done again; several processes may share the work by naming different methods. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from methods_data import GOLD, SCORERS, data_of, labelled
from methods_table import seconds_file, strength_of, table, table_by_flips
from PIL import Image

from diffalign import _statistics, diagnostics
from diffalign._json import read_json, write_json
from diffalign.config import Config, Generate, config_folder, config_names, resolve
from diffalign.distributed import World
from diffalign.recipes._run import environment
from diffalign.recipes.evaluate import score_folder
from diffalign.recipes.generate import read_manifest, write_images
from diffalign.recipes.train import set_up, train, train_step
from diffalign.registry import build
from diffalign.scorers._build import build_scorers
from diffalign.sprites.scene import prompts
from diffalign.types import Setting

RATE = 1e-3
NUM_SEEDS_SAMPLED = 2  # pictures per final prompt
DRAWS = 4  # noise levels per held-out pair for the likelihood columns
NATS = 8.0 * 4 * 16 * 16  # of a unit of logp at the embedded model's latent size

LEFT_OUT = {
    "dcpo": "needs a caption per image",
    "flow-dpo": "is diffusion-dpo with another beta",
    "soft-dpo": "needs votes",
    "sppo": "needs win rates against own samples",
    "general-po": "needs general-preference scores",
    "curry-dpo": "trains in stages: stages_on_sprites.py",
    "ppd": "needs users: personal_on_sprites.py",
    "fspo": "needs users: personal_on_sprites.py",
    "near-miss": "needs a near-miss prompt per record",
    "triple": "needs a gold picture per record",
    "cross-prompt": "needs pairs across prompts",
}
LISTWISE = ("rankdpo", "lipo-lambda", "plackett-luce", "pro", "all-pairs")
SINGLES = ("kto",)
SCORED = ("smpo-labels",)
TEMPERATURE = 0.25  # of their Bradley-Terry labels: about the mean gap of a pair


@dataclass(frozen=True)
class Strength:
    """What tuning varies: a key of the objective's section around a value; none: the learning rate."""

    key: str | None
    value: float


# 1000 is the demo's for the SDXL-architecture model. KTO's beta counts double, JS has slope 1/2. Without a reference a
# unit of margin is a difference of whole errors, which is some twenty times larger. Of SmPO's labels a certain one has
# ten times its beta.
DPO_BETA = 1000.0
STRENGTHS = {
    "kto": Strength("beta", 2 * DPO_BETA),
    "f-dpo-js": Strength("beta", 2 * DPO_BETA),
    "smpo-labels": Strength("beta", DPO_BETA / 10),
    "simpo": Strength("beta", 50.0),
    "cpo": Strength("beta", 50.0),
    "orpo": Strength("weight", 0.1),
    "asft": Strength("weight", 0.1),
    "mapo": Strength("beta", 0.1),
    "mapo-paper": Strength("beta", 8.0),
    "sft": Strength(None, RATE),
}


def offline_methods() -> list[str]:
    """All that learn from recorded pictures and are not left out."""
    files = {name: config_folder() / "methods" / f"{name}.yaml" for name in config_names("methods")}
    sources = {name: yaml.safe_load(path.read_text())["source"]["name"] for name, path in files.items()}
    return [name for name, source in sources.items() if source == "offline" and name not in LEFT_OUT]


def settings_of(method: str, flips: float) -> Iterator[dict[str, Any]]:
    """The three settings of a method, as config sections."""
    section = yaml.safe_load((config_folder() / "methods" / f"{method}.yaml").read_text())["objective"]
    strength = STRENGTHS.get(method, Strength("beta", DPO_BETA))
    if flips and "flip_rate" in section:
        section["flip_rate"] = flips
    if strength.key is None:
        yield from ({"objective": section, "train": {"lr": strength.value * factor}} for factor in (1 / 3, 1, 3))
        return
    for factor in (0.2, 1.0, 5.0):
        objective = dict(section)
        value = strength.value * factor
        if section["name"] == "sum":
            first, *rest = section["terms"]
            objective["terms"] = [{**first, strength.key: value}, *rest]
        else:
            objective[strength.key] = value
        if "beta_loser" in section:
            objective["beta_loser"] = section["beta_loser"] * value / section["beta"]
        if "nats" in objective:
            objective["nats"] = NATS
        if method in SCORED:
            objective["temperature"] = TEMPERATURE
        yield {"objective": objective, "train": {"lr": RATE}}


def config_of(
    model: str, method: str, data: dict[str, Path], setting: dict[str, Any], seed: int, steps: int, out: Path
) -> Config:
    """One run."""
    kinds = {"ranking": LISTWISE, "singles": SINGLES, "scored": SCORED}
    kind = next((kind for kind, methods in kinds.items() if method in methods), "all-pairs")
    fixed = {
        "source": {
            "data": {"path": str(data[kind])},
            "cache_dir": str(out.parents[1] / "cache"),
            "cache_dtype": "float32",
            "prompt_dropout": 0.0,
        },
        "train": {
            "out": str(out),
            "steps": steps,
            "batch_size": {"ranking": 8, "singles": 32}.get(kind, 16),  # 32 pictures a step
            "seed": seed,
            "sample_every": 0,
            "validate_every": 0,
            "warmup_steps": 20,
            "lr_schedule": "cosine",
        },
        "log": {"trackers": []},
    }
    return resolve([model, method, {"sampling": sampling()}, fixed, setting])


def sampling() -> dict[str, Any]:
    """The demo's sampler."""
    return yaml.safe_load((config_folder() / "runs" / "demo.yaml").read_text())["sampling"]


def with_adapter(config: Config, run: Path | None) -> Any:
    """The model; with a run's weights as its adapter, so that switching it off gives the base."""
    if run is not None:
        config = replace(config, model=replace(config.model, lora=replace(config.model.lora, init=str(run / "export"))))
    return config.model.load()


def pictures(model: Any, config: Config, texts: Sequence[str], out: Path, per_prompt: int) -> dict[str, np.ndarray]:
    """Scores of the model's pictures for these prompts, sampled once."""
    how = Generate(images_per_prompt=per_prompt, seed=1000)
    world = World("auto", "auto")
    write_images(model, list(texts), out, how, config.sampling, world, True, out.name)
    return score_folder(out, build_scorers(SCORERS), config.score, world, out.name, True)


def diversity(folder: Path) -> float:
    """Effective number of pictures among a prompt's two (Vendi score on layout and colour), mean over prompts."""
    groups: dict[str, list[np.ndarray]] = {}
    for row in read_manifest(folder):
        groups.setdefault(row["prompt"], []).append(np.asarray(Image.open(folder / row["file"]).convert("RGB")))
    return statistics.mean(diagnostics.vendi(diagnostics.pixel_kernel(np.stack(group))) for group in groups.values())


@torch.no_grad()
def likelihood_facts(model: Any, config: Config, pairs: Path, cache: Path) -> dict[str, float]:
    """Of held-out pairs that the base sampled: how far the denoiser moved, and what became of winners and ranking.

    drift: mean squared difference of policy's and base's predictions; displacement: mean e_w - k_w. Both in shares of
    the base's mean error.
    """
    section = {"name": "offline", "data": {"path": str(pairs)}, "holdout": 0.9, "cache_dir": str(cache)}
    source = build("source", section)
    batches = source.prepare(model, None, Setting(seed=0, steps=1, batch_size=32))
    reference = build("reference", {"name": "adapter_off"}).bind(model)
    likelihood = build("likelihood", {"name": "elbo", "draws": DRAWS})
    parts = [likelihood(model, reference, batch) for batch in batches.holdout(1000, 32)]
    utility = torch.cat([part.utility for part in parts])
    order = utility.argsort(dim=1, descending=True)

    def sorted_errors(name: str) -> torch.Tensor:
        return (-2 * torch.cat([getattr(part, name) for part in parts])).gather(1, order)

    error, base = sorted_errors("logp"), sorted_errors("logp_ref")
    gap = error - base
    unit = float(base.mean())
    return {
        "drift": 2 * float(torch.cat([part.step_kl for part in parts]).mean()) / unit,
        "displacement": float(gap[:, 0].mean()) / unit,
        "loser_displacement": float(gap[:, 1].mean()) / unit,
        "implicit_accuracy": _statistics.holdout_accuracy((gap[:, 1] - gap[:, 0]).numpy()).rate,
        "ranking_accuracy": diagnostics.ranking_accuracy(error[:, 0], error[:, 1]),
    }


@dataclass(frozen=True)
class Bench:
    """What all methods share: prompts, the base's scores, the held-out pairs."""

    arguments: argparse.Namespace
    root: Path
    data: dict[str, Path]
    tuning: Sequence[str]
    final: Sequence[str]
    base_tuning: dict[str, np.ndarray]
    base_final: dict[str, np.ndarray]
    holdout: Path


def prepare(arguments: argparse.Namespace) -> Bench:
    """Data, prompts and the base's pictures."""
    root = arguments.out / arguments.model
    data = data_of(arguments.model, root / "data", arguments.prompts, arguments.flips)
    heldout = prompts(300, split="heldout", kind="two")
    final, tuning = heldout[:200], heldout[200:]
    config = resolve([arguments.model, {"sampling": sampling()}])
    base = with_adapter(config, None)
    base_tuning = pictures(base, config, tuning, root / "base-tuning", 1)
    base_final = pictures(base, config, final, root / "base-final", NUM_SEEDS_SAMPLED)
    holdout = labelled(resolve([arguments.model, "demo"]), root / "base-final", root / "heldout")["all-pairs"]
    return Bench(arguments, root, data, tuning, final, base_tuning, base_final, holdout)


def tuned(bench: Bench, method: str, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Gold score on the tuning prompts of each setting (none where --tuned-on has it), and which is best."""
    rows: list[dict[str, Any]] = []
    if bench.arguments.tuned_on:
        rows = [{"setting": setting} for setting in settings_of(method, bench.arguments.flips)]
        return rows, strength_of(read_json(bench.arguments.tuned_on / f"{method}.json"))
    for number, setting in enumerate(settings_of(method, bench.arguments.flips)):
        out = folder / f"tune-{number}"
        config = config_of(bench.arguments.model, method, bench.data, setting, 0, bench.arguments.steps, out)
        train(config, quiet=True)
        scores = pictures(with_adapter(config, out), config, bench.tuning, folder / f"tune-{number}-images", 1)
        rows.append({"setting": setting, "gold": float(scores[GOLD].mean())})
    return rows, max(range(len(rows)), key=lambda number: float(rows[number]["gold"]))


def measured(bench: Bench, method: str, setting: dict[str, Any], folder: Path, seed: int, run: Path) -> dict[str, Any]:
    """One seed's run on the final prompts; `scores` holds every picture's, for the pooled intervals."""
    done = folder / f"seed-{seed}.json"
    if not done.is_file():
        config = config_of(bench.arguments.model, method, bench.data, setting, seed, bench.arguments.steps, run)
        train(config, quiet=True)
        model = with_adapter(config, run)
        images = folder / f"seed-{seed}-images"
        scores = pictures(model, config, bench.final, images, NUM_SEEDS_SAMPLED)
        row: dict[str, Any] = {"diversity": diversity(images)}
        row |= likelihood_facts(model, config, bench.holdout, bench.root / "cache")
        write_json(done, row | {"scores": {name: values.tolist() for name, values in scores.items()}})
    return dict(read_json(done))


def run_method(bench: Bench, method: str, result: Path) -> None:
    """Tunes, trains with every seed, measures, writes the method's file."""
    suffix = f"-flips-{bench.arguments.flips}" if bench.arguments.flips else ""
    folder = bench.root / f"{method}{suffix}"
    tuning, best = tuned(bench, method, folder)
    rows = []
    for seed in range(bench.arguments.seeds):
        # the tuning run of the chosen setting is seed 0's
        run = folder / (f"tune-{best}" if seed == 0 and not bench.arguments.tuned_on else f"seed-{seed}")
        rows.append(measured(bench, method, tuning[best]["setting"], folder, seed, run))
    groups = [text for text in bench.final for _ in range(NUM_SEEDS_SAMPLED)]
    summary: dict[str, Any] = {}
    for name in SCORERS:
        ours = np.concatenate([np.array(row["scores"][name]) for row in rows])
        base, of_prompt = np.tile(bench.base_final[name], len(rows)), groups * len(rows)
        win = _statistics.win_rate(ours, base, groups=of_prompt)
        gain = _statistics.mean_difference(ours, base, of_prompt)
        summary[name] = {
            "mean": float(ours.mean()),
            "base": float(base.mean()),
            "gain": [gain.mean, gain.low, gain.high],
            "win": [win.rate, win.low, win.high],
            "of_seeds": [float(np.mean(row["scores"][name])) for row in rows],
            "of_prompts": ours.reshape(len(rows), -1, NUM_SEEDS_SAMPLED).mean(axis=(0, 2)).round(5).tolist(),
        }
    facts = {key: getattr(bench.arguments, key) for key in ("model", "steps", "prompts", "flips", "seeds")}
    facts["tuned_on"] = bench.arguments.tuned_on and bench.arguments.tuned_on.name
    others = [{key: value for key, value in row.items() if key != "scores"} for row in rows]
    stamp = environment(str(World("auto", "auto").device))
    chosen = {"method": method, "setting": tuning[best]["setting"], "tuning": tuning}
    write_json(result, facts | chosen | summary | {"runs": others, "stamp": stamp})


def time_steps(bench: Bench, methods: Sequence[str], path: Path) -> None:
    """Processor time of a step of each method (its median over ten), which other work on the machine hardly changes."""
    seconds: dict[str, float] = {}
    for method in methods:
        out = bench.root / "timing" / method
        shutil.rmtree(out, ignore_errors=True)
        setting = next(settings_of(method, 0.0))
        trainer = set_up(config_of(bench.arguments.model, method, bench.data, setting, 0, 12, out))
        times = []
        for step in range(12):
            batch = trainer.batches.batch(step)
            begun = time.process_time()
            train_step(trainer, batch, step)
            times.append(time.process_time() - begun)
        seconds[method] = statistics.median(times[2:])
        print(f"{method:18s} {1000 * seconds[method]:.0f} ms", flush=True)
    write_json(path, {"seconds_per_step": seconds, "stamp": environment(str(World("auto", "auto").device))})


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl")
    parser.add_argument("--methods", nargs="*", default=offline_methods())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--flips", type=float, default=0.0, help="share of pairs with a wrong label")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/methods-<model>[-flips-<share>]")
    parser.add_argument("--seconds", action="store_true", help="measure the steps' processor time alone")
    parser.add_argument("--against", default="diffusion-dpo", help="the method that the table compares with")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--by-flips", action="store_true", help="with --table: gold gain by share of wrong labels")
    parser.add_argument("--tuned-on", type=Path, help="folder of results whose strengths are taken instead of tuning")
    arguments = parser.parse_args()
    suffix = f"-flips-{arguments.flips}" if arguments.flips else ""
    results = arguments.results or Path(__file__).parent / "results" / f"methods-{arguments.model}{suffix}"
    if arguments.seconds:
        time_steps(prepare(arguments), arguments.methods, seconds_file(results))
    elif not arguments.table:
        bench = prepare(arguments)
        for method in arguments.methods:
            result = results / f"{method}.json"
            if not result.is_file():
                run_method(bench, method, result)
                gold = read_json(result)[GOLD]
                print(
                    f"{method:18s} gold {gold['mean']:.4f} (base {gold['base']:.4f}), gain {gold['gain']}", flush=True
                )
    print((table_by_flips if arguments.by_flips else table)(results, arguments.against))


if __name__ == "__main__":
    main()
