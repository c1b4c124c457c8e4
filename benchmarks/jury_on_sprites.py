"""Labels of a jury of noisy scorers against labels of one of them: how right they are, and what training on them gives.

    python benchmarks/jury_on_sprites.py --scores runs/methods/sprites-sdxl/data/images/scores.jsonl    # seconds
    python benchmarks/jury_on_sprites.py                   # samples the pictures first: some minutes on one core
    python benchmarks/jury_on_sprites.py --train           # and trains on the labels: an hour on one core

Five scorers are copies of the gold judge, each with noise of its own, of standard deviation `scale` in gold's unit; a
share of its variance is common to all five where `shared` is above 0, since real scorers err alike. All pairs of
each prompt's four pictures are labelled by `diffalign label`'s rules. Accuracy is the share of right labels among the
pairs that gold does not tie; coverage the share of all pairs that get a label; `in gold ties` the share of the labels
that gold ties. `single, as few` is one scorer that labels only its largest gaps, as many as the jury of four fifths,
and `sum, as few` the sum of the five: what a filter by margin gives at the same coverage. Intervals resample prompts.

With --train, Diffusion-DPO learns from some of the label sets at one scale, with equal steps, and gold judges pictures
of held-out prompts; differences are paired by prompt and noise. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from methods_data import GOLD
from methods_on_sprites import DPO_BETA, NUM_SEEDS_SAMPLED, RATE, config_of, pictures, sampling, with_adapter
from numpy.typing import NDArray

from diffalign import _statistics, randomness
from diffalign._atomic import write_atomic
from diffalign._json import read_json, write_json
from diffalign.agreement import kappa, verdict_tables
from diffalign.config import Config, resolve
from diffalign.recipes._run import environment
from diffalign.recipes.generate import generate, read_manifest
from diffalign.recipes.label import label
from diffalign.recipes.label._rules import choices
from diffalign.recipes.score import score
from diffalign.recipes.train import train
from diffalign.sections import Generate, Label, Score
from diffalign.sprites.scene import prompts

JURORS = tuple(f"juror_{number}" for number in range(5))
SETS: dict[str, dict[str, Any]] = {
    "single": {"scorer": JURORS[0]},
    "single, as few": {"scorer": JURORS[0]},  # the largest gaps alone
    "sum": {"scorers": JURORS},
    "sum, as few": {"scorers": JURORS},
    "votes": {"scorers": JURORS, "prefer": "votes"},
    "maximin": {"scorers": JURORS, "prefer": "maximin"},
    "pareto": {"scorers": JURORS, "prefer": "pareto"},
    "jury": {"scorers": JURORS, "prefer": "jury"},
    "jury, 4 of 5": {"scorers": JURORS, "prefer": "jury", "min_agreement": 0.8},
}
TRAINED = ("gold", "single", "sum", "jury", "jury, 4 of 5")
Group = tuple[str, Float[NDArray[np.float64], " K"], Float[NDArray[np.float64], "K J"]]


def noisy(gold: float, file: str, scale: float, shared: float, seed: int) -> list[float]:
    """What the jurors say of a picture."""

    def noise(who: str) -> float:
        return float(np.random.default_rng(randomness.address("juror", seed, who, file)).normal())

    common = noise("all")
    return [gold + scale * (shared**0.5 * common + (1 - shared) ** 0.5 * noise(name)) for name in JURORS]


def groups_of(scores: Path, scale: float, shared: float, seed: int) -> Iterator[Group]:
    """(prompt, gold scores, jurors' scores) of each prompt."""
    for _, rows in itertools.groupby(read_manifest(scores), key=lambda row: row["prompt_id"]):
        group = list(rows)
        gold = np.array([row["scores"][GOLD] for row in group])
        said = [noisy(row["scores"][GOLD], row["file"], scale, shared, seed) for row in group]
        yield group[0]["prompt"], gold, np.array(said)


def labelled_gaps(group: Group, settings: Label) -> list[tuple[float, float]]:
    """(certainty, gold's gap winner - loser) of each pair that gets a label."""
    _, gold, values = group
    columns = [JURORS.index(name) for name in settings.scorers or (settings.scorer,)]
    made = choices(values[:, columns], settings, (1.0,) * len(columns))
    return [(choice.certainty, gold[choice.places[0]] - gold[choice.places[1]]) for choice in made if choice.is_decided]


def measured(groups: list[Group], name: str, share: float | None) -> dict[str, Any]:
    """How right a label set is; with `share`, only so many of all pairs, the most certain ones."""
    settings = Label(rule="all-pairs", **SETS[name])
    found = [(number, *gap) for number, group in enumerate(groups) for gap in labelled_gaps(group, settings)]
    num_pairs = sum(len(gold) * (len(gold) - 1) // 2 for _, gold, _ in groups)
    if share is not None:
        found = sorted(found, key=lambda row: -row[1])[: round(share * num_pairs)]
    gaps = np.array([gap for _, _, gap in found])
    is_told = gaps != 0
    if not is_told.any():
        return {"labels": len(gaps), "coverage": len(gaps) / num_pairs, "accuracy": None}
    of_prompt = [number for (number, _, _), told in zip(found, is_told, strict=True) if told]
    rate = _statistics.win_rate(gaps[is_told], np.zeros(is_told.sum()), groups=of_prompt)
    return {
        "labels": len(gaps),
        "coverage": len(gaps) / num_pairs,
        "in_gold_ties": float((~is_told).mean()),
        "accuracy": rate.rate,
        "low": rate.low,
        "high": rate.high,
    }


def labels_table(scores: Path, scales: list[float], shares: list[float], seed: int) -> list[dict[str, Any]]:
    """A row per noise level."""
    rows = []
    for shared, scale in itertools.product(shares, scales):
        groups = list(groups_of(scores, scale, shared, seed))  # numbers of some thousand pictures
        tables = sum(verdict_tables(values) for _, _, values in groups)
        both = list(itertools.combinations(range(len(JURORS)), 2))
        row: dict[str, Any] = {"scale": scale, "shared": shared, "seed": seed}
        row["kappa"] = float(np.mean([kappa(tables[pair]) for pair in both]))
        few = measured(groups, "jury, 4 of 5", None)["coverage"]
        row["sets"] = {name: measured(groups, name, few if name.endswith("as few") else None) for name in SETS}
        rows.append(row)
        shown = "  ".join(
            f"{name} {of['accuracy']:.3f} ({of['coverage']:.2f})"
            for name, of in row["sets"].items()
            if of["accuracy"] is not None
        )
        print(f"scale {scale:g}, shared {shared:g}, kappa {row['kappa']:.2f}: {shown}", flush=True)
    return rows


def scores_of(arguments: argparse.Namespace, root: Path) -> Path:
    """Gold scores of the base's pictures: those that --scores names, or sampled."""
    if arguments.scores is not None:
        return Path(arguments.scores)
    spec = f"sprites:train:{arguments.prompts}:two"
    config = resolve([arguments.model, "demo"])
    how = Generate(prompts=spec, out=str(root / "images"), images_per_prompt=4, seed=1)
    images = generate(replace(config, generate=how))
    return score(replace(config, score=Score(images=str(images), scorers=(GOLD,))))


def label_sets(arguments: argparse.Namespace, root: Path, scores: Path) -> dict[str, Path]:
    """Records of the label sets that are trained on, by the verb itself."""
    path = root / f"scores-{arguments.train_scale:g}-{arguments.train_shared:g}" / "scores.jsonl"
    if not path.is_file():
        told = (arguments.train_scale, arguments.train_shared, arguments.seed)
        lines = []
        for row in read_manifest(scores):
            gold = row["scores"][GOLD]
            said = dict(zip(JURORS, noisy(gold, row["file"], *told), strict=True))
            lines.append(json.dumps(row | {"scores": {GOLD: gold} | said}))
        facts = [{"key": name, "name": name, "version": "1"} for name in (GOLD, *JURORS)]
        images = read_json(scores.with_suffix(".json")).get("images", str(scores.parent))
        write_json(path.with_suffix(".json"), {"images": images, "scorers": facts})
        write_atomic(path, "".join(line + "\n" for line in lines))
    made = {}
    for name in arguments.sets:
        how = {"scorer": GOLD} if name == "gold" else SETS[name]
        settings = Label(
            scores=str(path), out=str(path.parent / name.replace(", ", "-").replace(" ", "-")), sheet=0, **how
        )
        made[name] = label(Config(label=replace(settings, rule="all-pairs")), quiet=True)
    return made


def train_table(arguments: argparse.Namespace, root: Path, scores: Path) -> dict[str, Any]:
    """Gold on held-out prompts after training on each label set."""
    made = label_sets(arguments, root, scores)
    final = prompts(arguments.final, split="heldout", kind="two")
    plain = resolve([arguments.model, {"sampling": sampling()}])
    base = pictures(with_adapter(plain, None), plain, final, root / "base", NUM_SEEDS_SAMPLED)[GOLD]
    setting = {"objective": {"name": "pair", "beta": arguments.beta}, "train": {"lr": RATE}}
    found: dict[str, list[Any]] = {name: [] for name in made}
    for seed, (name, path) in itertools.product(range(arguments.seeds), made.items()):
        folder = root / f"{path.name}-{arguments.train_scale:g}-{arguments.train_shared:g}-{arguments.steps}"
        done = folder / f"seed-{seed}.json"
        if not done.is_file():
            config = config_of(
                arguments.model,
                "diffusion-dpo",
                {"all-pairs": path},
                setting,
                seed,
                arguments.steps,
                folder / f"seed-{seed}",
            )
            train(config, quiet=True)
            model = with_adapter(config, folder / f"seed-{seed}")
            gold = pictures(model, config, final, folder / f"seed-{seed}-images", NUM_SEEDS_SAMPLED)[GOLD]
            write_json(done, {"gold": gold.tolist()})
        found[name].append(read_json(done)["gold"])
        print(f"{name}, seed {seed}: gold {np.mean(found[name][-1]):.4f} (base {base.mean():.4f})", flush=True)
    return compared(found, base, len(final)) | {
        key: getattr(arguments, key) for key in ("train_scale", "train_shared", "steps", "beta", "seeds", "final")
    }


def compared(found: dict[str, list[Any]], base: NDArray[Any], num_prompts: int) -> dict[str, Any]:
    """Gains over the base and over the single scorer's labels, paired by prompt and noise."""
    pooled = {name: np.concatenate(rows) for name, rows in found.items()}
    result: dict[str, Any] = {"base": float(base.mean()), "sets": {}}
    for name, values in pooled.items():
        of_prompt = np.tile(np.repeat(np.arange(num_prompts), NUM_SEEDS_SAMPLED), len(found[name])).tolist()
        gain = _statistics.mean_difference(values, np.tile(base, len(found[name])), of_prompt)
        row = {"gold": float(values.mean()), "gain": [gain.mean, gain.low, gain.high]}
        row["of_seeds"] = [float(np.mean(of)) for of in found[name]]
        if name != "single" and "single" in pooled:
            more = _statistics.mean_difference(values, pooled["single"], of_prompt)
            row["against_single"] = [more.mean, more.low, more.high]
        result["sets"][name] = row
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites-sdxl")
    parser.add_argument("--prompts", type=int, default=500, help="training prompts, four pictures each")
    parser.add_argument("--scores", type=Path, help="scores.jsonl with gold scores of pictures that are there already")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 0.8])
    parser.add_argument("--shared", type=float, nargs="+", default=[0.0, 0.5], help="shares of the noise's variance")
    parser.add_argument("--seed", type=int, default=0, help="of the jurors' noise")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--sets", nargs="+", choices=TRAINED, default=list(TRAINED), help="label sets to train on")
    parser.add_argument("--train-scale", type=float, default=0.2)
    parser.add_argument("--train-shared", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--beta", type=float, default=DPO_BETA)
    parser.add_argument("--final", type=int, default=200, help="held-out prompts, two pictures each")
    parser.add_argument("--out", type=Path, default=Path("runs/jury"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "jury-sprites.json")
    arguments = parser.parse_args()
    root = arguments.out / arguments.model
    scores = scores_of(arguments, root)
    result = read_json(arguments.results) | {"model": arguments.model, "jurors": len(JURORS)}
    result["labels"] = labels_table(scores, arguments.scales, arguments.shared, arguments.seed)
    write_json(arguments.results, result | {"stamp": environment("cpu")})
    if arguments.train:
        result["training"] = train_table(arguments, root, scores)
        write_json(arguments.results, result | {"stamp": environment("cpu")})
        for name, row in result["training"]["sets"].items():
            print(f"{name}: gold gain {row['gain'][0]:+.4f} [{row['gain'][1]:+.4f}, {row['gain'][2]:+.4f}]")


if __name__ == "__main__":
    main()
