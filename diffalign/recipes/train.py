"""Fine-tuning on preferences: the one loop of every method, model and number of devices.

The same command resumes a run: all randomness is addressed by (seed, record, visit) and the learning rate is a function
of the step, so that weights and optimizer state are the whole state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import _run_lock, checkpoint, randomness
from diffalign._json import read_json, write_json
from diffalign.config import TRAINING_SECTIONS, Config
from diffalign.distributed import World
from diffalign.metrics import MetricsLog
from diffalign.progress import Progress
from diffalign.recipes import _exported, _run, _samples
from diffalign.recipes._baseline import RunningBaseline
from diffalign.recipes._fit import check_data, check_needs
from diffalign.recipes._interrupts import Interrupts
from diffalign.recipes._optim import Ema, adam_damping, build_optimizer, learning_rate
from diffalign.recipes._preferences import holdout_margins, holdout_metrics, preference_metrics, summarize
from diffalign.recipes._stopping import Decision, Watch, check_stop
from diffalign.sections import Stages
from diffalign.types import EndpointBatch, Likelihoods, LossOutput, Setting, UserError

Callback = Callable[[int, Mapping[str, float]], None]

DAMPING_AT = 9  # the step after which Adam's second moments are looked at
MAX_DAMPING = 0.1
MAX_VISITS = 8  # of a round's pair: at 15 runs on the embedded SD3-architecture model diverged, at 5 they did not


@dataclass(frozen=True)
class TrainResult:
    """Where the run is and how it ended."""

    folder: Path
    steps: int  # done; fewer than asked for where section `stop` ended it
    metrics: Mapping[str, Any]  # the last step's
    check: Mapping[str, Any]  # the export's self-check


@dataclass
class Trainer:
    """Everything of a run that lives on the devices."""

    config: Config
    world: World
    run: _run.Run
    model: Any
    reference: Any
    batches: Any
    parameters: dict[str, Tensor]
    optimizer: Any
    ema: Ema
    baseline: RunningBaseline
    first_step: int = 0
    done: int = 0  # steps
    saved: int = 0  # steps of the last checkpoint
    scorers: dict[str, Any] = field(default_factory=dict)  # of the sample grids, on the main process
    last_metrics: dict[str, Any] = field(default_factory=dict)


def run_folder(config: Config) -> Path:
    """`train.out`, or runs/<names of the config files>."""
    return Path(config.train.out or f"runs/{config.title}")


def micro_batch_size(config: Config, world: World) -> int:
    """Prompts per forward call on this device.

    Raises:
        UserError: batch_size does not divide into processes and micro-batches.
    """
    share, rest = divmod(config.train.batch_size, world.size)
    size = config.train.micro_batch_size or share
    if rest or share == 0:
        raise UserError(f"train.batch_size={config.train.batch_size} does not divide by {world.size} processes")
    if share % size:
        raise UserError(f"train.micro_batch_size={size} does not divide a device's share of {share} prompts")
    if size < config.train.batch_size and "whole-batch" in config.objective.needs:
        raise UserError(
            "the objective takes a mean over the step's own batch, so one process must see it in one call: leave"
            " train.micro_batch_size empty, or use a running mean (objective.zero_from=running for kto,"
            " objective.shift=running for bco)"
        )
    return size


def set_up(config: Config, on_open: Callable[[Path], Any] | None = None) -> Trainer:
    """Builds and, where the run folder holds a checkpoint, restores everything.

    `on_open` is called with the run folder, on the main process, before anything is built.
    """
    check_needs(config)
    check_stop(config)
    train = config.train
    world = World(train.device, train.precision)
    micro_batch_size(config, world)
    check_data(config)
    run = _run.open_together(run_folder(config), config, TRAINING_SECTIONS, world)
    if on_open is not None and world.is_main:
        on_open(run.folder)
    torch.manual_seed(randomness.address(train.seed, "initial weights"))
    model = config.model.load()
    model.to(world.device)
    place = (world.rank, world.size, world.barrier, run.folder, world.autocast)
    setting = Setting(train.seed, train.steps, train.batch_size, *place)
    reference = config.reference.bind(model, setting)
    batches = config.source.prepare(model, reference, setting)
    if config.source.encoders != "needed":
        model.offload_encoders(keep_vae=config.source.encoders == "decoder")
    _check_data(run, batches.facts(), world)
    parameters = model.trainable_parameters()
    optimizer = build_optimizer(train, list(parameters.values()))
    ema = Ema(train.ema, parameters)
    model.denoiser, optimizer = world.prepare(model.denoiser, optimizer)
    baseline = RunningBaseline(config.objective)
    trainer = Trainer(config, world, run, model, reference, batches, parameters, optimizer, ema, baseline)
    found = checkpoint.newest(run.folder)
    if found is not None:
        _restore(trainer, checkpoint.load(found, run.fingerprint))
    reference.after_step(trainer.first_step - 1)
    return trainer


def _check_data(run: _run.Run, facts: Mapping[str, Any], world: World) -> None:
    """Writes run.json, and refuses to resume on data that changed since the run began."""
    path = run.folder / "run.json"
    old = read_json(path)
    if old and old["data"]["fingerprint"] != facts["fingerprint"]:
        raise UserError(
            f"the data changed since {run.folder} began: choose another train.out (nothing was overwritten)"
        )
    world.barrier()
    if world.is_main and not old:
        facts_of_run = _run.environment(str(world.device))
        write_json(path, facts_of_run | {"processes": world.size, "precision": world.precision, "data": dict(facts)})


def _restore_weights(trainer: Trainer, state: checkpoint.Checkpoint) -> None:
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(state.weights[name])
    trainer.ema.load(state.ema)


def _restore(trainer: Trainer, state: checkpoint.Checkpoint) -> None:
    _restore_weights(trainer, state)
    trainer.optimizer.load_state_dict(state.optimizer)
    trainer.world.load_scaler_state(state.scaler)
    trainer.baseline.load(state.baseline)
    trainer.first_step = trainer.done = trainer.saved = state.step


def _save(trainer: Trainer, step: int, kind: checkpoint.Kind = "step") -> None:
    if trainer.world.is_main:
        keep = trainer.config.train.keep_checkpoints if kind == "step" else 1
        state = checkpoint.Checkpoint(
            step=step,
            weights=checkpoint.as_tensors(trainer.parameters),
            ema=checkpoint.as_tensors(trainer.ema.shadow),
            optimizer=trainer.optimizer.state_dict(),
            scaler=trainer.world.scaler_state(),
            baseline=trainer.baseline.state(),
        )
        checkpoint.save(trainer.run.folder, state, trainer.run.fingerprint, keep, kind)
    if kind == "step":
        trainer.saved = step
    trainer.world.barrier()


def _save_done(trainer: Trainer) -> None:
    if trainer.done > trainer.saved:
        _save(trainer, trainer.done)


def train_step(trainer: Trainer, batch: EndpointBatch, step: int) -> dict[str, float]:
    """One optimizer step on this process's share of the global batch; returns the global batch's metrics."""
    config, world = trainer.config, trainer.world
    size = micro_batch_size(config, world)
    # LoRA dropout is the only draw that is not addressed by record
    torch.manual_seed(randomness.address(config.train.seed, "step", step, world.rank))
    collected: list[dict[str, Tensor]] = []
    for start in range(0, len(batch), size):
        micro = batch[start : start + size].to(world.device)
        with world.accumulate(trainer.model.denoiser, is_last=start + size >= len(batch)):
            with world.autocast():
                likelihoods = config.likelihood(trainer.model, trainer.reference, micro)
                output = config.objective(trainer.baseline.give(likelihoods))
            world.backward(output.per_prompt.sum() / config.train.batch_size)
        collected.append(preference_metrics(likelihoods, output) | trainer.baseline.observe(likelihoods))
    grad_norm = world.clip(trainer.parameters.values(), config.train.max_grad_norm)
    rate = learning_rate(config.train, step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    damping = adam_damping(trainer.optimizer) if step == DAMPING_AT else None
    trainer.reference.after_step(step)
    trainer.ema.update()
    gathered = world.gather({name: torch.cat([part[name] for part in collected]) for name in collected[0]})
    trainer.baseline.update(gathered)
    scalars = summarize(gathered) | {"grad_norm": float(grad_norm), "lr": rate}
    if damping is not None:
        scalars["adam_damping"] = damping
    if not math.isfinite(scalars["loss"]) or (not math.isfinite(scalars["grad_norm"]) and world.precision != "fp16"):
        raise FloatingPointError(
            f"loss {scalars['loss']} and gradient norm {scalars['grad_norm']} at step {step}: lower train.lr or"
            " objective.beta, or use another train.precision; the newest checkpoint is kept"
        )
    if scalars["grad_norm"] == 0 and step == 0 and scalars["tie_rate"] < 1:
        raise RuntimeError("the first gradient is exactly 0: nothing would be trained (check the LoRA targets)")
    return scalars


def validate(trainer: Trainer) -> dict[str, float]:
    """Held-out accuracy and ranking of the weights as they are; nothing where the objective has no margin."""
    train = trainer.config.train
    if "pair" not in trainer.config.objective.needs or trainer.config.likelihood.takes != "images":
        return {}  # recorded steps have no held-out ones: the policy draws them anew in every round
    likelihood = replace(trainer.config.likelihood, draws=train.validate_draws)
    batches = trainer.batches.holdout(train.validate_prompts, train.batch_size)

    def objective(likelihoods: Likelihoods) -> LossOutput:
        return trainer.config.objective(trainer.baseline.give(likelihoods))

    def measure(rows: Any) -> dict[str, float]:
        return holdout_metrics(
            holdout_margins(trainer.world, trainer.model, trainer.reference, likelihood, objective, rows)
        )

    measured = measure(batches)
    if getattr(trainer.batches, "users", None) is not None:
        unseen = trainer.batches.holdout(train.validate_prompts, train.batch_size, of_unseen=True)
        measured |= {name.replace("/", "/unseen_users/", 1): value for name, value in measure(unseen).items()}
    return measured


def train(config: Config, callbacks: Sequence[Callback] = (), quiet: bool = False, stage: str = "") -> TrainResult:
    """Trains, or goes on training, what the config describes, and exports the result into the run folder.

    `stage` names one of several runs, for the progress; the processes then stay together for the next one. SIGINT and
    SIGTERM end the run after the step they come in, with a checkpoint (one process; of several, since the last one).

    Raises:
        UserError: the user's input was wrong, or another process trains in the folder; nothing was overwritten.
        FloatingPointError: the loss is not finite any more.
    """
    if config.stages != Stages():
        raise UserError("section stages is for `diffalign stages`, which takes the same words as train")
    with ExitStack() as held:
        trainer = set_up(config, lambda folder: held.enter_context(_run_lock.hold(folder)))
        result = _train(trainer, callbacks, quiet, stage)
    if not stage:
        trainer.world.close()
    return result


def _train(trainer: Trainer, callbacks: Sequence[Callback], quiet: bool, stage: str) -> TrainResult:
    config, world = trainer.config, trainer.world
    train_config = config.train
    log = MetricsLog(trainer.run.folder, config.log.trackers, config.log.project) if world.is_main else None
    if log is not None:
        log.resume(trainer.first_step - 1)
    watch = Watch(config.stop, world, trainer.run.folder)
    last_step = trainer.first_step if watch.decision.ends else train_config.steps
    is_unfinished = trainer.first_step < last_step
    if is_unfinished and world.is_main:
        trainer.scorers = _samples.prepare_scorers(config, trainer.batches, trainer.model)
    with (
        Progress(
            stage or "train", train_config.steps, trainer.first_step, "step", quiet or not world.is_main
        ) as progress,
        ThreadPoolExecutor(max_workers=1) as loader,
        Interrupts(world.size == 1, lambda: _save_done(trainer)) as interrupts,
    ):
        following: Future[Any] | None = None
        for step in range(trainer.first_step, last_step):
            begun = time.perf_counter()
            made = _refresh(trainer, step, progress)
            batch = following.result() if following is not None else trainer.batches.batch(step)
            is_next_ready = step + 1 < last_step and trainer.batches.is_ready(step + 1)
            following = loader.submit(trainer.batches.batch, step + 1) if is_next_ready else None
            with interrupts.step():
                scalars = {**train_step(trainer, batch, step), **made}
                scalars["pairs_per_second"] = train_config.batch_size / (time.perf_counter() - begun)
                decision = _after_step(trainer, watch, log, step, scalars, has_sampled=bool(made))
            for callback in callbacks:
                callback(step, scalars)
            progress.advance(note=f"loss {scalars['loss']:.4f}")
            if world.is_main and scalars.get("adam_damping", 0.0) > MAX_DAMPING:
                progress.say(_damped(scalars["adam_damping"], train_config.adam_eps))
            if decision.alarm:
                progress.say(f"diffalign train: alarm after step {step + 1}: {decision.alarm}")
            if decision.ends:
                break
    if log is not None:
        log.close()
    return finish(trainer, watch)


def _damped(damping: float, eps: float) -> str:
    return (
        f"diffalign train: warning: the gradients are so small that Adam's epsilon {eps:g} takes {100 * damping:.0f} %"
        " of the updates away, and most of the smallest ones: raise the objective's beta or weight, or lower"
        " train.adam_eps, and look at train.lr again"
    )


def _refresh(trainer: Trainer, step: int, progress: Progress) -> Mapping[str, float]:
    """Lets a source that samples with the policy do so before `step`, from a checkpoint to which a kill goes back."""
    if trainer.batches.is_ready(step):
        return {}
    if step > trainer.saved:
        _save(trainer, step)
    made = trainer.batches.refresh(step)
    told = ", ".join(f"{name.rpartition('/')[2]} {value:.4g}" for name, value in made.items() if name.count("/") == 1)
    if not progress.quiet:
        progress.say(f"diffalign train: step {step}: {told}")
        if made.get("rollout/visits_per_unit", 0.0) > MAX_VISITS:
            progress.say(
                "diffalign train: warning: this round found so few that each is learned"
                f" {made['rollout/visits_per_unit']:.0f} times: raise source.prompts_per_round or lower"
                " source.steps_per_round, or let more of it count (source.reject, min_margin, threshold)"
            )
    return made


def _after_step(
    trainer: Trainer, watch: Watch, log: MetricsLog | None, step: int, scalars: dict[str, float], has_sampled: bool
) -> Decision:
    """Measures what is due after `step`, decides, logs and saves, in this order: who resumes from a checkpoint then has
    the rows that were decided from."""
    config, done = trainer.config, step + 1
    is_measured = _measure(trainer, watch, done, scalars)
    decision = watch.after(step, scalars) if is_measured else Decision()
    is_last = done == config.train.steps
    if log is not None and (step % config.log.every == 0 or is_last or is_measured or has_sampled):
        log.log(step, scalars)
    if decision.is_best:
        _save(trainer, done, kind="best")
    if is_last or decision.ends or done % config.train.checkpoint_every == 0:
        _save(trainer, done)
    trainer.done, trainer.last_metrics = done, scalars
    return decision


def _measure(trainer: Trainer, watch: Watch, done: int, scalars: dict[str, float]) -> bool:
    """Validation and samples that are due after `done` steps, added to the metrics; whether any were measured."""
    config, judges = trainer.config.train, bool(trainer.config.stop.scorers)
    is_last = done == config.steps
    validates = bool(config.validate_every) and (is_last or done % config.validate_every == 0)
    if validates:
        validated = validate(trainer)
        watch.check(validated)
        scalars |= validated
    # the export samples the last step anyway, but to choose between weights its scores must be known before
    samples = bool(config.sample_every) and (judges if is_last else done % config.sample_every == 0)
    if samples and trainer.world.is_main:
        with trainer.ema.swapped_in():
            scalars |= _samples.sample_and_judge(
                trainer.model, trainer.config, trainer.batches, trainer.run.folder, done, trainer.scorers
            )
    return validates or (samples and judges)


def finish(trainer: Trainer, watch: Watch) -> TrainResult:
    """Exports the trained weights and checks that they are there, cover their targets and change a picture."""
    world, folder = trainer.world, trainer.run.folder
    trainer.model.denoiser = world.unwrap(trainer.model.denoiser)
    result = read_json(folder / "export_check.json")
    if world.is_main and not result:
        step = trainer.done
        facts: dict[str, Any] = {"steps": step}
        if watch.exported_step:
            step = facts["exported_step"] = watch.exported_step
            _restore_best(trainer, step)
        if watch.decision.ends and trainer.done < trainer.config.train.steps:
            facts["ended_early"] = watch.decision.reason
        with trainer.ema.swapped_in():
            result = _exported.export_and_check(trainer.model, trainer.config, trainer.batches, folder, step, facts)
    world.barrier()
    return TrainResult(folder, trainer.done, trainer.last_metrics, result)


def _restore_best(trainer: Trainer, step: int) -> None:
    """The weights, and their average, of the best checkpoint.

    Raises:
        UserError: somebody removed it.
    """
    path = checkpoint.found(trainer.run.folder).get(step)
    if path is None:
        raise UserError(f"the best checkpoint, of step {step}, is gone from {trainer.run.folder / 'checkpoints'}")
    _restore_weights(trainer, checkpoint.load(path, trainer.run.fingerprint))
