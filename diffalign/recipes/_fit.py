"""Whether a method fits its parts and its data: refused before any weight is loaded, with what to change."""

from __future__ import annotations

from itertools import islice
from typing import Any

from diffalign.config import Config
from diffalign.data import Report, good_records
from diffalign.types import Record, UserError

SAMPLE = 64  # records looked at; what only a later record shows is refused when it is drawn

GIVEN = {"baseline", "whole-batch"}  # by the training loop
FIXES = {
    "reference": "set reference.name=adapter_off (LoRA) or reference.name=frozen (full weights)",
    "pair": "it compares two images per prompt: use a source of pairs",
    "list": "it ranks several images per prompt: use a source of recorded preferences",
    "old": "it compares with the weights that drew the steps: set likelihood.name=step and source.name=rollout",
    "overlap": "it compares the images' residuals: set likelihood.overlap=true",
    "maps": "it looks at single latent pixels: set likelihood.maps=true",
    "masks": "it reads masks of the data: set source.masks to their folder, or objective.mask=reference",
    "scores": "it reads scorer columns: use a source of recorded preferences",
    "means": "it compares with the draws' means: set source.record_means=true, on source.name=rollout",
}


def check_needs(config: Config) -> None:
    """Refuses an objective whose needs source, likelihood and reference do not give.

    Raises:
        UserError: names the need and the key that would fill it.
    """
    config.require("model", "source", "likelihood", "reference", "objective")
    given = config.source.gives | config.likelihood.gives | config.reference.gives | GIVEN
    for slot in ("objective", "likelihood"):
        for need in sorted(getattr(getattr(config, slot), "needs", frozenset()) - given):
            fix = FIXES.get(need, "see `diffalign list methods`")
            raise UserError(f"{slot} {config.names[slot]} needs {need!r}: {fix}")
    makes, takes = config.source.makes, config.likelihood.takes
    if makes != takes:
        fix = "likelihood.name=step" if makes == "steps" else "likelihood.name=elbo, or a source that records steps"
        raise UserError(
            f"source {config.names['source']} makes {makes} and likelihood {config.names['likelihood']} takes {takes}:"
            f" set {fix}"
        )
    if config.names["reference"] == "adapter_off" and getattr(config.model, "trainable", "lora") == "full":
        raise UserError("model.trainable=full has no adapter to switch off: set reference.name=frozen")

    check_users(config)


def check_users(config: Config) -> None:
    """Refuses users on one side only: a branch without a source of users, or the other way round.

    Raises:
        UserError: names the key to set.
    """
    branch, users = getattr(config.model, "users", None), getattr(config.source, "users", None)
    if branch is not None and users is None:
        raise UserError("model.users needs to know whose preferences the records are: set source.users={}")
    if branch is None and users is not None:
        raise UserError("source.users needs a model with a user branch: set model.users.by=id, embedding or pairs")


def _check_users(config: Config, sample: list[Record]) -> None:
    """Refuses records that do not say what the user branch needs."""
    branch = getattr(config.model, "users", None)
    if branch is None:
        return
    column = "user_embedding" if branch.by == "embedding" else "user"
    if all(getattr(record, column) is None for record in sample):
        raise UserError(
            f"model.users.by={branch.by} learns from records of users and none of the first {len(sample)} has a"
            f" {column}: give the data that column (Pick-a-Pic: user_id), or label with label.by_users=true"
        )


def first_records(reader: Any) -> list[Record]:
    """The records that are looked at before anything is loaded."""
    return [record for _, record in islice(good_records(reader, Report()), SAMPLE)]


def parts_of(objective: Any) -> list[Any]:
    """The objective, or the terms of a sum."""
    return [part for _, _, part in getattr(objective, "objectives", ())] or [objective]


def num_candidates(objective: Any) -> int:
    """How many candidates per record the terms of a sum name, at least."""
    return 1 + max((max(columns) for columns in getattr(objective, "candidates", ()) if columns), default=0)


def check_data(config: Config) -> None:
    """Opens the data and looks at its first records: do they hold what the objective compares?

    Raises:
        UserError: nothing usable at the path, or records that the objective cannot learn from.
    """
    config.source.check()
    if not hasattr(config.source, "reader"):
        return  # it makes its own data
    objective, name = config.objective, config.names["objective"]
    sample = first_records(config.source.reader)
    if not sample:
        return  # the source lists the reasons when it finds no readable record at all
    _check_users(config, sample)
    utilities = [config.source.utility_of(record) for record in sample]
    sizes = set(map(len, utilities))
    if getattr(config.source, "desirable_share", None) is not None and sizes != {1}:
        raise UserError(
            f"source.desirable_share draws single images and the data has records of {max(sizes)}: leave it empty"
        )
    wanted = num_candidates(objective)
    if max(sizes) < wanted:
        raise UserError(
            f"objective {name} looks at {wanted} candidates per record and the data has records of {max(sizes)}: make"
            " them with datasets_prep/conditions.py (near-miss, triple)"
        )
    if any("pair" in part.needs for part in _whole_record_parts(objective)) and sizes != {2}:
        raise UserError(
            f"objective {name} compares pairs and the data has records of {sorted(sizes)[-1]} images: choose a listwise"
            " method (rankdpo, plackett-luce, all-pairs) or make pairs (diffalign label label.rule=best-worst)"
        )
    if "list" in objective.needs and max(sizes) < 2:
        raise UserError(
            f"objective {name} ranks images and every record has one: choose a method of single images (kto)"
        )
    if objective.needs & {"pair", "list"} and all(len(set(utility)) == 1 for utility in utilities):
        raise UserError(
            f"objective {name} learns from preferences and none of the first {len(sample)} records has one (all tied or"
            " unlabelled): score and label them (diffalign score, diffalign label), or train with sft"
        )
    for part in parts_of(objective):
        for scorer in getattr(part, "score_weights", {}):
            missing = next((record for record in sample if scorer not in record.scores), None)
            if missing is not None:
                has = ", ".join(missing.scores) or "none"
                raise UserError(
                    f"objective.score_weights names {scorer!r}, but a record has scores of {has}: run diffalign score"
                    " with that scorer and label again"
                )


def _whole_record_parts(objective: Any) -> list[Any]:
    """The objective, or those terms of a sum that look at every candidate."""
    parts = parts_of(objective)
    columns = getattr(objective, "candidates", [None] * len(parts))
    return [part for part, its_columns in zip(parts, columns, strict=True) if its_columns is None]
