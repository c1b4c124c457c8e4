"""What a model says of every picture, captions or embeddings: a file beside the scores, asked for once.

A line per picture in the order of the scores: {"file": ..., key: answer}, or null with the `reason`. A killed run goes
on with the batch it was in and leaves the same bytes; whatever is labelled by the file later asks nothing again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign._atomic import sweep
from diffalign._json import read_json, to_json, write_json
from diffalign.data import BadRow
from diffalign.progress import Progress
from diffalign.recipes._judging import Refusal, asked, batched, keep_whole_lines, read_picture
from diffalign.recipes.generate import read_manifest
from diffalign.recipes.label._scores import Scored
from diffalign.score_cache import scorer_fingerprint
from diffalign.scorers._build import build_scorers, scorer_key
from diffalign.scorers._vlm_questions import CAPTION, SLOT
from diffalign.sections import Label
from diffalign.types import UserError


@dataclass(frozen=True)
class Question:
    """One thing that is asked of every picture.

    key: of the answers in the file.
    name: of who is asked.
    scorer: who is asked.
    facts: all that decides an answer.
    ask: pictures and their prompts -> an answer each, of which an empty one is none.
    """

    key: str
    name: str
    scorer: Any
    facts: Mapping[str, Any]
    ask: Callable[[list[Image.Image], list[str]], Iterable[Any]]

    @property
    def size(self) -> int:
        """Pictures that are asked about at once."""
        return int(self.scorer.batch_size)


def captioner(spec: Mapping[str, Any]) -> Question:
    """A caption for each picture, by a vision-language model: `label.captions` as a mapping.

    Raises:
        UserError: an unknown model or field, or one that answers no questions.
    """
    question = str(spec.get("question", CAPTION))
    name, scorer = _built({key: value for key, value in spec.items() if key != "question"}, "label.captions", "ask")

    def ask(images: list[Image.Image], prompts: list[str]) -> list[str]:
        others = prompts if SLOT in question else ()
        answers = scorer.ask(images, [question.replace(SLOT, prompt) for prompt in prompts], others)
        return [" ".join(answer.split()) for answer in answers]

    facts = {"name": name, "fingerprint": scorer_fingerprint(scorer), "question": question}
    return Question("caption", name, scorer, facts, ask)


def comparer(spec: str | Mapping[str, Any]) -> Question:
    """An embedding of each picture, by a general preference that compares them: `label.judge`.

    Raises:
        UserError: an unknown scorer or field, or one that scores pictures one by one.
    """
    name, scorer = _built(spec, "label.judge", "represent")

    def ask(images: list[Image.Image], prompts: list[str]) -> list[list[float] | None]:
        rows = scorer.represent(images, prompts).tolist()
        return [row if all(map(math.isfinite, row)) else None for row in rows]

    facts = {"name": name, "fingerprint": scorer_fingerprint(scorer), "version": scorer.info.version}
    return Question("embedding", name, scorer, facts, ask)


def _built(spec: str | Mapping[str, Any], where: str, method: str) -> tuple[str, Any]:
    name = scorer_key(spec)
    scorer: Any = build_scorers([spec], where)[name]
    if not hasattr(scorer, method):
        what = "answers no questions: name vlm" if method == "ask" else "compares no pictures: name general_preference"
        raise UserError(f"{where}: {name} {what}")
    return name, scorer


def questions_of(settings: Label) -> list[Question]:
    """What models are to be asked before anything is labelled.

    Raises:
        UserError: see `captioner` and `comparer`.
    """
    made = [captioner(settings.captions)] if isinstance(settings.captions, Mapping) else []
    return made + ([comparer(settings.judge)] if settings.judge is not None else [])


def ask_all(scored: Scored, questions: Sequence[Question], quiet: bool) -> Scored:
    """The scores with the files of answers, which hold every picture then.

    Raises:
        UserError: a file of another question, or of other pictures.
    """
    for question in questions:
        is_caption = question.key == "caption"
        path = scored.path.parent / ("captions.jsonl" if is_caption else f"{question.name}.jsonl")
        _fill(path, question, scored, quiet)
        if is_caption:
            scored = replace(scored, captions=path)
        else:
            facts = {**scored.scorers, question.name: question.facts}
            scored = replace(scored, embeddings=path, judge=question.scorer, scorers=facts)
    return scored


def _fill(path: Path, question: Question, scored: Scored, quiet: bool) -> None:
    facts_path = path.with_suffix(".json")
    sweep(path.parent)
    began = read_json(facts_path).get("by")
    if path.is_file() and began != json.loads(to_json(question.facts)):
        raise UserError(f"{path} is of another model or question: move it away, and this command makes it anew")
    write_json(facts_path, {"by": question.facts})
    num, done, missing = sum(1 for _ in read_manifest(scored.path)), keep_whole_lines(path), 0
    with path.open("a", encoding="utf-8") as out, Progress(question.key, num, done, "img", quiet) as progress:
        there = read_manifest(path)
        for number, rows in enumerate(batched(read_manifest(scored.path), question.size)):
            kept = min(len(rows), max(0, done - number * question.size))
            lines = [next(there) for _ in range(kept)]
            if any(line.get("file") != row["file"] for line, row in zip(lines, rows, strict=False)):
                raise UserError(f"{path} is of other pictures than {scored.path}: move it away, and it is made anew")
            if kept < len(rows):
                # the whole batch again: other neighbours would change the answers' last bits
                lines += _answered(question, scored.root, rows)[kept:]
                out.writelines(to_json(line) + "\n" for line in lines[kept:])
                out.flush()
                progress.advance(len(rows) - kept)
            missing += sum("reason" in line for line in lines)
        if missing:
            progress.say(f"label: {missing} of {num} pictures have no {question.key} of {question.name}; see {path}")
    write_json(facts_path, {"by": question.facts, "pictures": num, "without": missing})


def _answered(question: Question, root: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a batch.

    Raises:
        UserError: a file that cannot be read; a broken picture is a line with its reason.
    """
    images: dict[int, Image.Image] = {}
    found: dict[int, Any] = {}
    for place, row in enumerate(rows):
        try:
            images[place] = read_picture(root / row["file"])
        except BadRow as error:
            found[place] = Refusal(error)
        except OSError as error:  # of the disk, not of the picture: not kept
            raise UserError(f"{root / row['file']}: {error.strerror}: generate it again") from error
    if images:
        prompts = [str(rows[place]["prompt"]) for place in images]
        found |= zip(images, asked(question.name, question.ask, list(images.values()), prompts), strict=True)
    lines: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        answer = found[place] or Refusal("no answer")
        is_none = isinstance(answer, Refusal)
        lines.append(
            {"file": row["file"], question.key: None if is_none else answer} | ({"reason": answer} if is_none else {})
        )
    return lines
