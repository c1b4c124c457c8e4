"""Training a CLIP-type preference scorer on pairs: on the pictures, or step-aware on noisy previews of them.

Bradley-Terry as PickScore (arXiv 2305.01569) and SPO's step-aware preference model (arXiv 2406.04314) train it: every
parameter, weights by prompt, ties known. A general preference (arXiv 2410.02197) has the same loss of other log-odds.
One process. The same command resumes: the pairs, noise levels and noises of a step are addressed, so weights and
optimizer are the whole state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign import randomness
from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.metrics import MetricsLog
from diffalign.progress import Progress
from diffalign.recipes._optim import learning_rate
from diffalign.recipes.train_scorer._data import PairBatch
from diffalign.recipes.train_scorer._loss import pair_loss
from diffalign.recipes.train_scorer._previews import time_of
from diffalign.recipes.train_scorer._setup import ScorerTrainer, load_towers, save, set_up
from diffalign.scorers import _clip_files as files
from diffalign.scorers import _preference_head as heads
from diffalign.scorers._clip import tokenize


@dataclass(frozen=True)
class ScorerResult:
    """Where the run is and how it ended."""

    folder: Path
    steps: int
    holdout: Mapping[str, float]  # the last validation: holdout/accuracy, or one per timestep
    base: Mapping[str, float]  # the same of the base, before the first step


def scores_of(
    trainer: ScorerTrainer, batch: PairBatch, rows: slice, t: Tensor | None = None, stream: str = "train"
) -> Tensor:
    """Scores [b, 2] of some rows, in a general preference plus and minus half the log-odds of the pair.

    `t` [b] overrides the drawn noise levels.
    """
    device, prompts = trainer.world.device, batch.prompts[rows]
    pixels, timestep = batch.pixels, None
    if trainer.previews is not None:
        assert batch.latents is not None
        ids, visits = batch.ids[rows], batch.visits[rows]
        latents = {
            name: {key: value[rows] for key, value in part.items()} if isinstance(part, Mapping) else part[rows]
            for name, part in batch.latents.items()
            if name in ("mean", "std", "text")
        }
        t = trainer.previews.draw(ids, visits) if t is None else t
        seen, timestep = trainer.previews(latents, ids, visits, t, stream)
        inputs = trainer.preprocess.tensor(seen.flatten(0, 1).to(device), trainer.settings.resize)
        timestep = timestep.repeat_interleave(2).to(device)
    else:
        assert pixels is not None
        inputs = pixels[rows].flatten(0, 1).to(device)
    distinct = list(dict.fromkeys(prompts))
    places = torch.tensor([distinct.index(prompt) for prompt in prompts for _ in range(2)], device=device)
    tokens = tokenize(trainer.tokenizer, distinct, trainer.towers.clip).to(device)
    with trainer.world.autocast():
        scores = trainer.module(inputs, tokens, places, timestep)
    scores = scores.float().unflatten(0, (-1, 2))
    return scores if trainer.settings.head == "score" else heads.halves(scores)


def train_step(trainer: ScorerTrainer, batch: PairBatch, step: int) -> dict[str, float]:
    """One optimizer step; returns the batch's loss, accuracy, gradient norm and logit scale."""
    settings, world = trainer.settings, trainer.world
    size = settings.micro_batch_size or len(batch)
    losses, hits = [], []
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        scores = scores_of(trainer, batch, rows)
        label, weight = (values[rows].to(scores.device) for values in (batch.label, batch.weight))
        loss = (weight * pair_loss(scores, label)).sum()
        world.backward(loss)
        losses.append(loss.detach())
        hits.append(_hits(scores.detach(), label))
    grad_norm = float(world.clip(trainer.towers.parameters(), settings.max_grad_norm))
    rate = learning_rate(trainer.loop, step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)  # checkpoints from before shares have none
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    value = float(torch.stack(losses).sum())
    if not math.isfinite(value) or (not math.isfinite(grad_norm) and world.precision != "fp16"):
        raise FloatingPointError(
            f"loss {value} and gradient norm {grad_norm} at step {step}: lower train_scorer.lr, or use another"
            " train_scorer.precision; the newest checkpoint is kept"
        )
    if grad_norm == 0 and step == 0 and bool((batch.label != 0.5).any()):
        raise RuntimeError("the first gradient is exactly 0: nothing would be trained")
    return {
        "loss": value,
        "accuracy": float(torch.cat(hits).nanmean()),
        "tie_rate": float((batch.label == 0.5).float().mean()),
        "logit_scale": float(trainer.towers.clip.logit_scale.detach().exp()),
        "grad_norm": grad_norm,
        "lr": rate,
    }


def _hits(scores: Tensor, label: Tensor) -> Tensor:
    """1 where the preferred picture has the higher score, 1/2 where the scores are equal, NaN for a tie."""
    hit = 0.5 * (1 + torch.sign(scores[:, 0] - scores[:, 1]) * torch.sign(label - 0.5))
    return torch.where(label == 0.5, torch.nan, hit).cpu()


@torch.no_grad()
def validate(trainer: ScorerTrainer) -> dict[str, float]:
    """Held-out accuracy over decided pairs: of the pictures, or of previews at each of `validate_timesteps`."""
    hits: dict[str, list[Tensor]] = {}
    for batch in trainer.pairs.holdout():
        rows = slice(0, len(batch))
        if trainer.previews is None:
            hits.setdefault("holdout/accuracy", []).append(
                _hits(scores_of(trainer, batch, rows), batch.label.to(trainer.world.device))
            )
            continue
        for timestep in trainer.settings.validate_timesteps:
            t = torch.full((len(batch),), time_of(trainer.previews.model.schedule, timestep))
            scores = scores_of(trainer, batch, rows, t, f"holdout {timestep}")
            label = batch.label.to(scores.device)
            hits.setdefault(f"holdout/accuracy_t{timestep}", []).append(_hits(scores, label))
    found = {name: float(torch.cat(parts).nanmean()) for name, parts in hits.items()}
    if trainer.previews is not None and found:
        found["holdout/accuracy"] = sum(found.values()) / len(found)
    return found


def train_scorer(config: Config, quiet: bool = False) -> ScorerResult:
    """Trains, or goes on training, the scorer that section `train_scorer` describes, and exports it to <out>/export.

    Raises:
        UserError: the user's input was wrong; nothing was overwritten.
        FloatingPointError: the loss is not finite any more.
    """
    trainer = set_up(config, quiet)
    settings, folder = trainer.settings, trainer.run.folder
    log = MetricsLog(folder, config.log.trackers, config.log.project)
    log.resume(trainer.first_step - 1)
    base = _of_base(trainer)
    validated: dict[str, float] = {}
    with (
        Progress("train-scorer", settings.steps, trainer.first_step, "step", quiet) as progress,
        ThreadPoolExecutor(max_workers=1) as loader,
    ):
        following = (
            loader.submit(trainer.pairs.batch, trainer.first_step) if trainer.first_step < settings.steps else None
        )
        for step in range(trainer.first_step, settings.steps):
            begun = time.perf_counter()
            assert following is not None
            batch = following.result()
            if step + 1 < settings.steps:
                following = loader.submit(trainer.pairs.batch, step + 1)
            scalars = train_step(trainer, batch, step)
            scalars["pairs_per_second"] = len(batch) / (time.perf_counter() - begun)
            done, is_last = step + 1, step + 1 == settings.steps
            is_due = bool(settings.validate_every) and (is_last or done % settings.validate_every == 0)
            if is_due:
                validated = validate(trainer)
                scalars |= validated
            if step % config.log.every == 0 or is_last or is_due:
                log.log(step, scalars)
            if is_last or done % settings.checkpoint_every == 0:
                save(trainer, done)
            progress.advance(note=f"loss {scalars['loss']:.4f}")
    log.close()
    result = _finish(trainer, validated, base)
    trainer.pairs.close()
    return result


def _of_base(trainer: ScorerTrainer) -> Mapping[str, float]:
    """What the base reaches held out: without it nobody sees a training that only harms."""
    path = trainer.run.folder / "base_holdout.json"
    if trainer.first_step == 0 and trainer.settings.validate_every and not path.is_file():
        write_json(path, validate(trainer))
    return read_json(path)


def _finish(trainer: ScorerTrainer, validated: Mapping[str, float], of_base: Mapping[str, float]) -> ScorerResult:
    """Exports once, and says what the last validation measured.

    Raises:
        RuntimeError: no weight differs from the base's: nothing was trained.
    """
    folder, settings = trainer.run.folder, trainer.settings
    result = read_json(folder / "export_check.json")
    if not result:
        torch.manual_seed(randomness.address(settings.seed, "initial weights"))
        base = dict(load_towers(settings).named_parameters())
        moved = [
            name for name, value in trainer.parameters.items() if not torch.equal(value.detach().cpu(), base[name])
        ]
        if not moved:
            raise RuntimeError("no weight differs from the base's after training: nothing was exported")
        files.save_folder(
            folder / "export",
            trainer.towers.clip,
            trainer.towers.modulation,
            trainer.tokenizer,
            trainer.preprocess.processor,
        )
        if isinstance(trainer.towers, heads.PreferenceTowers):
            heads.save(folder / "export", trainer.towers.head)
        holdout = validated or (validate(trainer) if settings.validate_every else {})
        result = {"steps": settings.steps, "tensors": len(base), "tensors_moved": len(moved), "holdout": holdout}
        write_json(folder / "export_check.json", result)
    trainer.world.close()
    return ScorerResult(folder, settings.steps, result["holdout"], of_base)
