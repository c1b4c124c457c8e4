"""Records of chosen images: their files read, captions and corrupted copies made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffalign import randomness
from diffalign.recipes.label._captions import perturbed
from diffalign.recipes.label._degrade import ladder
from diffalign.recipes.label._rules import Choice
from diffalign.recipes.label._scores import Scored, has_score, version_of
from diffalign.sections import Label
from diffalign.types import Record, UserError

Rows = Sequence[Mapping[str, Any]]


def has_captions(scored: Scored, rows: Rows) -> bool:
    """Whether captions are not asked for, or there for all of these images."""
    return scored.captions is None or all(row["caption"] for row in rows)


def images_of(scored: Scored, settings: Label, rows: Rows) -> tuple[bytes, ...]:
    """The encoded images; of a ladder the one image and its corrupted copies.

    Raises:
        UserError: a file that cannot be read; it is named.
    """
    try:
        images = tuple((scored.root / row["file"]).read_bytes() for row in rows)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}: generate it again") from error
    if settings.rule != "ladder":
        return images
    try:
        return ladder(images[0], settings.degrade, settings.levels, settings.seed, rows[0]["file"])
    except OSError as error:
        raise UserError(f"{scored.root / rows[0]['file']} is no readable image: generate it again") from error


def record_of(
    scored: Scored, settings: Label, rows: Rows, choice: Choice, label: str = "", user: str | None = None
) -> Record:
    """`rows` are the images of the choice in its order. The record keeps the scores, and what made them and the label.

    Raises:
        UserError: see `images_of`.
    """
    images, utility, prompt = images_of(scored, settings, rows), choice.utility, str(rows[0]["prompt"])
    files = [row["file"] for row in rows]
    judged = [name for name in rows[0].get("scores", ()) if all(has_score(row, name) for row in rows)]
    scores = {name: tuple(float(row["scores"][name]) for row in rows) for name in judged}
    meta: dict[str, Any] = {"files": files, "label": label or told(scored, settings, user)}
    judges = dict.fromkeys((*judged, *(scored.names if scored.judge is not None else ())))
    meta["scorers"] = {name: version_of(scored.scorers.get(name, {})) for name in judges}
    if choice.probability is not None:
        meta["probability"] = choice.probability
    if settings.rule == "ladder":
        utility = tuple(1 - level / settings.levels for level in range(settings.levels + 1))
        # nobody scored the copies
        meta |= {"degrade": settings.degrade, "scores": {name: values[0] for name, values in scores.items()}}
        scores = {}
    key = (prompt, *files, *(("ladder", settings.degrade, settings.levels) if settings.rule == "ladder" else ()))
    return Record(
        id=randomness.address(*key),
        prompt=prompt,
        images=images,
        utility=utility,
        captions=_captions(scored, settings, rows, len(images)),
        scores=scores,
        user=user,
        meta=meta,
    )


def _captions(scored: Scored, settings: Label, rows: Rows, num: int) -> tuple[str, ...] | None:
    """One per image where they are given or perturbed."""
    if scored.captions is None and not settings.perturb:
        return None
    captions = [str(row["prompt"] if scored.captions is None else row["caption"]) for row in rows]
    if settings.perturb:
        captions[1] = perturbed(captions[1], settings.perturb, settings.seed, *(row["file"] for row in rows))
    return tuple(captions) if len(captions) == num else (captions[0],) * num


def told(scored: Scored, settings: Label, user: str | None) -> str:
    """How a label came about, in a few words."""
    names = user or ", ".join(scored.names)
    how = f" ({settings.prefer})" if len(scored.names) > 1 and user is None else ""
    return f"{settings.rule} by {names}{how}{'' if settings.labels == 'hard' else f', {settings.labels}'}"
