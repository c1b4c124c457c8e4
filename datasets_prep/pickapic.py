"""Pick-a-Pic (arXiv 2305.01569), or data in its columns, to the record format, with the filters people use.

    python datasets_prep/pickapic.py hf://datasets/yuvalkirstain/pickapic_v2/data out/ --split train --safe
    python datasets_prep/pickapic.py data/ out/ --one-per-prompt --min-side 512

Streams: memory does not grow with the images. A run that was stopped goes on after the last finished shard, and ends in
the same files. `report.json` in the output folder says how many rows were dropped, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.data import BadRow, RecordWriter, Report, prompt_key
from diffalign.data._images import probe
from diffalign.data._progress import track
from diffalign.data.pickapic import Pickapic
from diffalign.types import Record, UserError

VOTES = ("num_votes", "votes", "num_annotations", "num_example_per_prompt")  # column names in use
UNSAFE = ("nsfw", "is_nsfw", "unsafe", "nsfw_score", "image_nsfw", "prompt_nsfw")

Filter = Callable[[Record], str | None]  # the reason to drop a record, or None


def unsafe_above(threshold: float) -> Filter:
    """Drops records with an NSFW-like column that is true or above `threshold`."""

    def check(record: Record) -> str | None:
        values = [record.meta[name] for name in UNSAFE if name in record.meta]
        return "unsafe" if any(float(value) > threshold for value in values if not isinstance(value, str)) else None

    return check


def votes_below(minimum: int) -> Filter:
    """Drops records with fewer votes than `minimum`."""

    def check(record: Record) -> str | None:
        votes = next((record.meta[name] for name in VOTES if name in record.meta), None)
        if votes is None:
            raise UserError(f"--min-votes: the data has none of the columns {', '.join(VOTES)}")
        return "few votes" if float(votes) < minimum else None

    return check


def side_below(pixels: int) -> Filter:
    """Drops records with an image whose shorter side is under `pixels`."""
    return lambda record: "small image" if any(min(probe(image)) < pixels for image in record.images) else None


def filters_of(args: argparse.Namespace, seen: set[int]) -> list[Filter]:
    """The filters asked for; `seen` are the prompts written already. Uniqueness comes last: it counts kept pairs."""
    found: list[Filter] = []
    if args.safe:
        found.append(unsafe_above(args.unsafe_threshold))
    if args.min_votes:
        found.append(votes_below(args.min_votes))
    if args.min_side:
        found.append(side_below(args.min_side))
    if args.one_per_prompt:
        found.append(lambda record: "prompt seen" if prompt_key(record.prompt) in seen else None)
    return found


def written_prompts(folder: Path) -> set[int]:
    """Keys of the prompts in finished shards."""
    import pyarrow.parquet as pq

    files = sorted(folder.glob("records-*.parquet"))
    batches = (batch for file in files for batch in pq.ParquetFile(file).iter_batches(1024, columns=["prompt"]))
    return {prompt_key(text) for batch in batches for text in batch["prompt"].to_pylist()}


def convert(args: argparse.Namespace) -> Report:
    """Runs the conversion and returns what became of the rows.

    Raises:
        UserError: input that cannot be read, or an output folder written with other settings.
    """
    reader = Pickapic(args.source, split=args.split, ties=args.ties)
    settings = {key: str(value) for key, value in sorted(vars(args).items()) if key != "out"}
    identity = {"settings": settings, "input": reader.fingerprint()}
    with RecordWriter(args.out, resume=True, shard_records=args.shard_records) as writer:
        state = writer.state or {"next": 0, "bad": {}, "dropped": {}, "rows": [], **identity}
        if {key: state[key] for key in identity} != identity:
            raise UserError(f"{args.out}: written from other data or with other settings; give an empty folder")
        report = Report(reader.report.num_rows, Counter(state["bad"]), Counter(state["dropped"]), list(state["rows"]))
        seen = written_prompts(Path(args.out)) if args.one_per_prompt else set()
        filters = filters_of(args, seen)
        rows = range(state["next"], len(reader))
        for index in track(rows, len(rows), "converting"):
            if args.max_pairs and writer.num_written >= args.max_pairs:
                report.dropped["over max-pairs"] += len(reader) - index
                break
            try:
                record = reader[index]
            except BadRow as error:
                report.add_bad(error)
                continue
            reason = next((reason for check in filters if (reason := check(record))), None)
            if reason:
                report.dropped[reason] += 1
                continue
            seen.add(prompt_key(record.prompt))
            counts = {"bad": dict(report.bad), "dropped": dict(report.dropped), "rows": list(report.rows)}
            writer.write(record, {"next": index + 1, **counts, **identity})
    report.dropped.update(reader.report.dropped)
    report.bad.update(reader.report.bad)
    report.rows = [*reader.report.rows, *report.rows][:1000]
    report.save(Path(args.out) / "report.json")
    return report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("source", help="a Parquet file, a folder of them, or an hf:// URL")
    result.add_argument("out", help="folder for records-*.parquet and report.json")
    result.add_argument("--split", help="keep this split only")
    result.add_argument(
        "--ties", choices=("drop", "keep"), default="drop", help="pairs without a winner (default: drop)"
    )
    result.add_argument("--min-side", type=int, default=0, metavar="PX", help="shortest side an image may have")
    result.add_argument("--min-votes", type=int, default=0, metavar="N", help=f"needs one of: {', '.join(VOTES)}")
    result.add_argument("--one-per-prompt", action="store_true", help="the first good pair of each prompt")
    result.add_argument("--safe", action="store_true", help=f"drop by columns {', '.join(UNSAFE)} where present")
    result.add_argument("--unsafe-threshold", type=float, default=0.5, help="of a score column (default: 0.5)")
    result.add_argument("--max-pairs", type=int, default=0, metavar="N", help="stop after so many")
    result.add_argument("--shard-records", type=int, default=1000, metavar="N", help="pairs per file (default: 1000)")
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr where the input was wrong."""
    args = parser().parse_args(argv)
    try:
        report: Any = convert(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({key: value for key, value in report.as_dict().items() if key != "rows"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
