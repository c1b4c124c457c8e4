"""Whether a method fits its parts and its data: refused before any weight is loaded, with what to change."""

from __future__ import annotations

from itertools import islice

from diffalign.config import Config
from diffalign.data import Report, good_records
from diffalign.types import Record, UserError

SAMPLE = 64  # records looked at; what only a later record shows is refused when it is drawn

FIXES = {
    "reference": "set reference.name=adapter_off (LoRA) or reference.name=frozen (full weights)",
    "pair": "it compares two images per prompt: use a source of pairs",
    "list": "it ranks several images per prompt: use a source of recorded preferences",
    "scores": "it reads scorer columns: use a source of recorded preferences",
}


def check_needs(config: Config) -> None:
    """Refuses an objective whose needs source, likelihood and reference do not give.

    Raises:
        UserError: names the need and the key that would fill it.
    """
    config.require("model", "source", "likelihood", "reference", "objective")
    given = config.source.gives | config.likelihood.gives | config.reference.gives
    for need in sorted(config.objective.needs - given):
        fix = FIXES.get(need, "see `diffalign list methods`")
        raise UserError(f"objective {config.names['objective']} needs {need!r}: {fix}")
    if config.names["reference"] == "adapter_off" and getattr(config.model, "trainable", "lora") == "full":
        raise UserError("model.trainable=full has no adapter to switch off: set reference.name=frozen")


def check_data(config: Config) -> None:
    """Opens the data and looks at its first records: do they hold what the objective compares?

    Raises:
        UserError: nothing usable at the path, or records that the objective cannot learn from.
    """
    config.source.check()
    objective, name = config.objective, config.names["objective"]
    sample = [record for _, record in islice(good_records(config.source.reader, Report()), SAMPLE)]
    if not sample:
        return  # the source lists the reasons when it finds no readable record at all
    sizes = {len(record.images) for record in sample}
    if "pair" in objective.needs and sizes != {2}:
        raise UserError(
            f"objective {name} compares pairs and the data has records of {sorted(sizes)[-1]} images: choose a listwise"
            " method (rankdpo, plackett-luce, all-pairs) or make pairs (diffalign label label.rule=best-worst)"
        )
    if "list" in objective.needs and max(sizes) < 2:
        raise UserError(
            f"objective {name} ranks images and every record has one: choose a method of single images (kto)"
        )
    if objective.needs & {"pair", "list"} and all(_is_tied(record) for record in sample):
        raise UserError(
            f"objective {name} learns from preferences and none of the first {len(sample)} records has one (all tied or"
            " unlabelled): score and label them (diffalign score, diffalign label), or train with sft"
        )
    for part in [objective, *(term for _, _, term in getattr(objective, "objectives", ()))]:
        for scorer in getattr(part, "score_weights", {}):
            missing = next((record for record in sample if scorer not in record.scores), None)
            if missing is not None:
                has = ", ".join(missing.scores) or "none"
                raise UserError(
                    f"objective.score_weights names {scorer!r}, but a record has scores of {has}: run diffalign score"
                    " with that scorer and label again"
                )


def _is_tied(record: Record) -> bool:
    return len(set(record.utility)) == 1
