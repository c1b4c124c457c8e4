"""From scored images to preference records: who won, decided by one scorer or by several; a killed run goes on.

Two passes over the scores, one prompt in memory at a time: a survey (ties, disagreement, the least certain pairs), then
the records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign._json import read_json, write_json
from diffalign.config import Config
from diffalign.data import RecordWriter
from diffalign.distributed import World
from diffalign.progress import Progress
from diffalign.recipes import _run
from diffalign.recipes.label import _rules as rules
from diffalign.recipes.label._asked import ask_all, questions_of
from diffalign.recipes.label._queue import ballot, write_queue, write_voted
from diffalign.recipes.label._records import has_captions, record_of, told
from diffalign.recipes.label._scores import Scored, open_scores
from diffalign.recipes.label._sheet import write_sheet
from diffalign.recipes.label._survey import Survey
from diffalign.sections import Label
from diffalign.types import UserError

FACTS, SHEET, QUEUE, VOTED = "label.json", "contact_sheet.html", "queue", "voted"


def label(config: Config, quiet: bool = False) -> Path:
    """Writes a folder of Parquet records for `source.data.path`; returns it. Deterministic, one prompt at a time.

    With `label.humans` the least certain pairs are left out and wait in `queue/`; once its votes.jsonl is there, the
    same command adds their records below `voted/`, which the folder's reader finds too.

    Raises:
        UserError: no scores, an unknown scorer, judge or captioner, a missing image, other scores than the folder began
            with, or no record.
        WaitsForVotes: a votes.jsonl that lacks pairs.
    """
    settings = config.label
    scored = open_scores(settings)
    if World("cpu", "fp32").size > 1:
        raise UserError("label runs in one process: start it without a launcher")
    questions = questions_of(settings)
    out = Path(settings.out or scored.path.parent / "pairs")
    _run.open_folder(out, config, ("label",))
    scored = ask_all(scored, questions, quiet)
    began, digest = read_json(out / "run.json"), scored.digest()
    if began and began["scores"] != digest:
        raise UserError(f"{scored.path} changed since {out} began: choose another label.out (nothing was overwritten)")
    write_json(out / "run.json", {"scores": digest})
    survey = Survey(scored, settings)
    survey.take()
    for_people = survey.for_people.entries()
    queued = {entry.key for entry in for_people}
    counts = _write_records(out, scored, settings, survey, queued, quiet)
    facts = _facts(survey, counts | {"queued": len(queued)})
    if settings.sheet:
        write_sheet(out / SHEET, facts, survey.least.entries(), survey.most.entries(), queued, scored, settings)
    write_json(out / FACTS, facts)
    if for_people:
        pairs = ballot(for_people, settings)
        write_queue(out / QUEUE, pairs, scored, settings)
        write_json(out / FACTS, facts | {"voted": write_voted(out / QUEUE, out / VOTED, pairs, scored, settings)})
    elif not counts["records"]:
        names = ", ".join(scored.names)
        raise UserError(
            f"no pair was made: {names} tells no two images of a prompt apart in {scored.path}, or captions are missing"
            f" (counts are in {out / FACTS})"
        )
    return out


def _write_records(
    out: Path, scored: Scored, settings: Label, survey: Survey, queued: set[tuple[int, tuple[int, ...]]], quiet: bool
) -> dict[str, int]:
    """The records that are not there yet; counts of all, made now or before."""
    counts = {"records": 0, "prompts_without_record": 0, "records_without_caption": 0}
    total = survey.counts["images"] + survey.counts["images_without_score"]
    with RecordWriter(out, resume=True) as writer, Progress("label", total, unit="img", quiet=quiet) as progress:
        # what an interrupted run had finished: shards then equal those of an uninterrupted one
        done = tuple((writer.state or {}).get("place", (-1, -1)))
        for group in scored.groups():
            before = counts["records"]
            for place, (scorer, choice) in enumerate(survey.choices(group)):
                if not choice.is_decided or (group.number, choice.places) in queued:
                    continue
                user = None if scorer is None else scored.names[scorer]
                files = [group.rows[index]["file"] for index in choice.places]
                choice = rules.labelled(choice, settings, files, user or "")
                rows = [group.rows[index] for index in choice.places]
                if not has_captions(scored, rows):
                    counts["records_without_caption"] += 1
                    continue
                counts["records"] += 1
                if (group.number, place) > done:
                    record = record_of(scored, settings, rows, choice, user=user)
                    writer.write(record, state={"place": [group.number, place]})
            counts["prompts_without_record"] += counts["records"] == before
            progress.advance(len(group.rows) + group.num_unjudged)
    return counts


def _facts(survey: Survey, counts: dict[str, int]) -> dict[str, Any]:
    """label.json."""
    facts, scored, settings = survey.facts(), survey.scored, survey.settings
    shown = {name: facts.pop(name) for name in (*survey.counts, "considered", "undecided", "liked_above")}
    if shown["liked_above"] is None:
        del shown["liked_above"]
    return {"label": told(scored, settings, None), "counts": counts | shown, **facts}


def summary(folder: Path) -> list[str]:
    """What label.json says, as lines for the terminal."""
    facts = read_json(folder / FACTS)
    counts = facts["counts"]
    lines = [f"{folder}: {counts['records']} records from {counts['images']} images of {counts['prompts']} prompts"]
    if counts["undecided"]:
        lines.append(f"{counts['undecided']} of {counts['considered']} looked at are tied or disputed: no label")
    for name, what in (
        ("images_without_score", "images lack a score"),
        ("prompts_with_too_few_images", "prompts have too few scored images"),
        ("records_without_caption", "records lack a caption"),
    ):
        if counts.get(name):
            lines.append(f"{counts[name]} {what} and are left out")
    lines += [f"{name}: {100 * of['ties']:.1f} % of pairs tied" for name, of in facts["scorers"].items() if of["ties"]]
    for row in facts["agreement"]:
        if row["same"] is not None:
            kappa = "not defined" if row["kappa"] is None else f"{row['kappa']:.3f}"
            lines.append(f"{' and '.join(row['scorers'])}: {100 * row['same']:.1f} % the same verdict, kappa {kappa}")
    if counts["queued"] and not facts.get("voted"):
        lines.append(
            f"{counts['queued']} pairs wait for people in {folder / QUEUE}: write {folder / QUEUE / 'votes.jsonl'}"
        )
    if facts.get("voted"):
        lines.append(f"{facts['voted']} records from votes in {folder / VOTED}")
    return lines
