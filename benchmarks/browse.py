"""Seconds to open, page, sort, filter and correct a large preference data set, as the Browse tab does.

Records have random words for prompts, two of a few shared tiny pictures, labels with ties, users, and two scorers. Each
layout is written once, then opened by a new process: imports are not counted, the file system's cache is warm. The
index is made by a thread of its own after opening; pages in the order of the file do not wait for it.

    python benchmarks/browse.py --records 1000000
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign._json import write_json
from diffalign.browsing import Query, RecordBrowser
from diffalign.data import RecordWriter
from diffalign.recipes._run import environment
from diffalign.types import Record

WORDS = "red blue green small large circle square triangle left right dark light cat dog river house".split()
PAGE = 24
BLOCK = 10_000  # records drawn at once


def pictures() -> list[bytes]:
    """Encoded pictures that all records share."""
    found = []
    for level in range(0, 256, 16):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (level, 255 - level, 128)).save(buffer, format="png")
        found.append(buffer.getvalue())
    return found


def write(folder: Path, num: int, layout: str) -> Path:
    """Records as Parquet shards, or lines of JSON beside the pictures."""
    images, rng = pictures(), np.random.default_rng(0)
    folder.mkdir(parents=True)
    path = folder if layout == "parquet" else folder / "pairs.jsonl"
    for k, image in enumerate(images):
        if layout == "jsonl":
            (folder / f"{k}.png").write_bytes(image)
    with RecordWriter(folder) if layout == "parquet" else open(path, "w") as out:
        for start in range(0, num, BLOCK):
            words = rng.integers(0, len(WORDS), (BLOCK, 8))
            label, user = rng.integers(0, 20, (2, BLOCK))
            clip, pick = rng.normal(size=(2, BLOCK, 2)).round(4)
            shown = rng.integers(0, len(images), (BLOCK, 2))
            for k in range(min(BLOCK, num - start)):
                prompt = " ".join(WORDS[word] for word in words[k]) + f" {start + k}"
                utility = (0.5, 0.5) if label[k] == 0 else (1.0, 0.0) if label[k] % 2 else (0.0, 1.0)
                fields: dict[str, Any] = {"prompt": prompt, "utility": utility, "user": f"user-{user[k]}"}
                fields["scores"] = {"clip": tuple(map(float, clip[k])), "pickscore": tuple(map(float, pick[k]))}
                if isinstance(out, RecordWriter):
                    out.write(Record(id=0, images=tuple(images[image] for image in shown[k]), **fields))
                else:
                    out.write(json.dumps({**fields, "images": [f"{image}.png" for image in shown[k]]}) + "\n")
    return path


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    begun = time.perf_counter()
    found = call()
    return time.perf_counter() - begun, found


def measure(path: Path, folder: Path) -> dict[str, float]:
    """Seconds of what visitors do, in the order in which they do it; of opening also what this process computed."""
    seconds: dict[str, float] = {}

    def note(name: str, call: Callable[[], Any]) -> Any:
        seconds[name], found = timed(call)
        return found

    computed = time.process_time()

    browser: RecordBrowser = note("open", lambda: RecordBrowser(path, folder))
    seconds["open, CPU seconds"] = time.process_time() - computed
    num = len(browser)
    note("first page", lambda: browser.page(range(PAGE)))
    note("middle page", lambda: browser.page(range(num // 2, num // 2 + PAGE)))
    note("last page", lambda: browser.page(range(num - PAGE, num)))
    is_new = not (folder / "index").is_dir()
    note("make the index" if is_new else "open the index", lambda: browser.index().result())
    note("counts, scorers and users", browser.facets)
    queries = {
        "sort by margin": Query(sort="margin"),
        "sort by a scorer's disagreement": Query(sort="clip"),
        "ties": Query(ties="only"),
        "scorers disagree": Query(disagreement="scorers"),
        "words in a caption": Query(text="cat dog"),
        "words, user and sort": Query(text="river", user="user-7", sort="pickscore", descending=True),
    }
    for name, query in queries.items():
        note(name, lambda query=query: browser.rows(query))  # type: ignore[misc]
    rows = browser.rows(queries["sort by a scorer's disagreement"])
    note("first page, sorted", lambda: browser.page(rows[:PAGE]))
    note("middle page, sorted", lambda: browser.page(rows[num // 2 : num // 2 + PAGE]))
    note("last page, sorted", lambda: browser.page(rows[-PAGE:]))
    log = browser.log("somebody")
    note("flip", lambda: log.flip(int(rows[-1])))
    note("undo", log.undo)
    return seconds | {"peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def fresh(path: Path, folder: Path) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(path), str(folder)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Writes, measures twice (without and with an index), prints a table and stores it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--note", default="", help="goes into the file: what else the machine was doing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "browse.json")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for layout in ("parquet", "jsonl"):
            written, path = timed(lambda layout=layout: write(Path(name) / layout, arguments.records, layout))
            folder = Path(name) / f"app-{layout}"
            results[layout] = {"write": written, "first time": fresh(path, folder), "again": fresh(path, folder)}
    columns = {f"{layout}, {when}": of[when] for layout, of in results.items() for when in ("first time", "again")}
    print(" " * 32 + "".join(f"{name:>22}" for name in columns))
    for key in dict.fromkeys(key for column in columns.values() for key in column):
        print(
            f"{key:32}" + "".join(f"{column[key]:22.3f}" if key in column else " " * 22 for column in columns.values())
        )
    stamp = {"stamp": environment("cpu"), "settings": {"records": arguments.records, "page": PAGE}}
    write_json(arguments.out, {**stamp, "seconds": results} | ({"note": arguments.note} if arguments.note else {}))


if __name__ == "__main__":
    main()
