"""What a scorer's training needs on the device, built and restored: see `train_scorer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign import checkpoint, randomness
from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.distributed import World
from diffalign.recipes import _run
from diffalign.recipes._optim import build_optimizer
from diffalign.recipes.train_scorer._data import Pairs, open_reader
from diffalign.recipes.train_scorer._previews import Previews
from diffalign.scorers import _clip_files as files
from diffalign.scorers import _preference_head as heads
from diffalign.scorers._clip import Preprocess, Towers
from diffalign.sections import Train, TrainScorer
from diffalign.types import UserError

LOOP_KEYS = ("steps", "lr", "lr_schedule", "warmup_steps", "optimizer", "betas", "weight_decay")


@dataclass
class ScorerTrainer:
    """Everything of a run that lives on the device."""

    settings: TrainScorer
    loop: Train  # the same numbers, as the optimizer and the learning rate know them
    world: World
    run: _run.Run
    towers: Towers
    module: Any  # the towers as the launcher runs them
    tokenizer: Any
    preprocess: Preprocess
    pairs: Pairs
    previews: Previews | None
    optimizer: Any
    first_step: int = 0

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name -> what is trained: all there is."""
        return dict(self.towers.named_parameters())


def load_towers(settings: TrainScorer) -> Towers:
    """The scorer to start from; its step-aware modulation or preference head go on from the base's, or start anew.

    Raises:
        UserError: no base, or none that can be read.
    """
    if settings.base is None:
        raise UserError("train_scorer.base is missing: a CLIP folder (PickScore_v1, an export) or weights file")
    _check_base(settings, files.lone_file(settings.base))
    clip = files.load_clip(settings.base, architecture=settings.architecture)
    if not settings.step_aware and settings.head == "score":
        return Towers(clip)
    folder = files.folder_of(_place(settings.base), files.OF_WEIGHTS)
    if settings.step_aware:
        is_trained = (folder / files.STEP_FILE).is_file()
        return Towers(clip, files.load_modulation(str(folder), clip) if is_trained else files.new_modulation(clip))
    if not (folder / files.HEAD_FILE).is_file():
        return heads.PreferenceTowers(clip, heads.PreferenceHead(clip.config.projection_dim, settings.head_dim))
    head = heads.load(folder, clip)
    if len(head.bias) != settings.head_dim:
        raise UserError(f"{folder}: its head's embedding has {len(head.bias)} dimensions: set train_scorer.head_dim so")
    return heads.PreferenceTowers(clip, head)


def _place(base: str) -> str:
    """The folder or hub id of a base: of a weights file, where it lies."""
    file = files.lone_file(base)
    return base if file is None else str(file.parent)


def _check_base(settings: TrainScorer, file: Path | None) -> None:
    """Refuses, before anything is read, a base that lacks a part; `file` where it is a weights file."""
    assert settings.base is not None
    if file is None:
        files.check_folder(settings.base, settings.processor)
        if settings.architecture is not None:
            raise UserError(
                "train_scorer.architecture is for a base that is a weights file: a folder has its config.json"
            )
        return
    files.check_words(settings.processor or str(file.parent))
    if settings.architecture is None and not (file.parent / "config.json").is_file():
        raise UserError(
            f"{file}: its network's sizes are unknown; put its config.json beside it, or set train_scorer.architecture"
            " to open_clip's name of it"
        )


def set_up(config: Config, quiet: bool) -> ScorerTrainer:
    """Builds and, where the run folder holds a checkpoint, restores everything."""
    settings = config.train_scorer
    if settings.step_aware:
        config.require("model")
    reader = open_reader(settings)
    torch.manual_seed(randomness.address(settings.seed, "initial weights"))
    towers = load_towers(settings)
    words = settings.processor or _place(str(settings.base))
    tokenizer = files.load_tokenizer(words)
    preprocess = Preprocess(files.load_processor(words, towers.clip.config.vision_config.image_size))
    world = World(settings.device, settings.precision)
    if world.size > 1:
        raise UserError("train-scorer runs in one process: start it without a launcher")
    folder = Path(settings.out or f"runs/{config.title}-scorer")
    run = _run.open_folder(folder, config, ("model", "train_scorer") if settings.step_aware else ("train_scorer",))
    model = None
    if settings.step_aware:
        model = replace(config.model, trainable="lora", gradient_checkpointing=False).load()
        model.to(world.device)
    pairs = Pairs(settings, reader, preprocess, model, folder, quiet)
    _check_data(run, pairs.facts(), world)
    towers.to(world.device).requires_grad_(True)
    loop = Train(**{f.name: getattr(settings, f.name) for f in fields(Train) if f.name in LOOP_KEYS})
    module, optimizer = world.prepare(towers, build_optimizer(loop, parameter_groups(settings, towers)))
    previews = None if model is None else Previews(model, settings.cfg_scale, settings.seed)
    trainer = ScorerTrainer(
        settings, loop, world, run, towers, module, tokenizer, preprocess, pairs, previews, optimizer
    )
    found = checkpoint.newest(run.folder)
    if found is not None:
        _restore(trainer, checkpoint.load(found, run.fingerprint))
    return trainer


def parameter_groups(settings: TrainScorer, towers: Towers) -> list[dict[str, Any]]:
    """What is trained, each group with its `share` of the learning rate: a modulation starts from zero, and at a rate
    that keeps trained towers what they are it would not move."""
    if settings.modulation_lr is None or towers.modulation is None:
        return [{"params": list(towers.parameters()), "share": 1.0}]
    modulation = list(towers.modulation.parameters())
    return [
        {"params": list(towers.clip.parameters()), "share": 1.0},
        {"params": modulation, "share": settings.modulation_lr / settings.lr},
    ]


def _check_data(run: _run.Run, facts: Mapping[str, Any], world: World) -> None:
    """Writes run.json, and refuses to resume on data that changed since the run began."""
    old = read_json(run.folder / "run.json")
    if old and old["data"]["fingerprint"] != facts["fingerprint"]:
        raise UserError(f"the data changed since {run.folder} began: choose another train_scorer.out")
    if not old:
        environment = _run.environment(str(world.device))
        write_json(run.folder / "run.json", environment | {"precision": world.precision, "data": dict(facts)})


def _restore(trainer: ScorerTrainer, state: checkpoint.Checkpoint) -> None:
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(state.weights[name])
    trainer.optimizer.load_state_dict(state.optimizer)
    trainer.world.load_scaler_state(state.scaler)
    trainer.first_step = state.step


def save(trainer: ScorerTrainer, step: int) -> None:
    state = checkpoint.Checkpoint(
        step=step,
        weights=checkpoint.as_tensors(trainer.parameters),
        ema={},
        optimizer=trainer.optimizer.state_dict(),
        scaler=trainer.world.scaler_state(),
    )
    checkpoint.save(trainer.run.folder, state, trainer.run.fingerprint, trainer.settings.keep_checkpoints)
