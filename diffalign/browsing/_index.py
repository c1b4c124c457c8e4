"""The index of a data set: what sorting and filtering ask of every record, without its images.

One DuckDB file, made in a few seconds per million records and kept for the next time. DuckDB reads the light columns of
Parquet files itself; lines of JSONL, and what other layouts parse, are streamed to it. Rows are numbered as the layout
numbers them.
"""

from __future__ import annotations

import glob
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign._atomic import atomic_path
from diffalign.data import BadRow
from diffalign.errors import UserError

FORMAT = 1  # part of the file's name: raise it when a column changes
SETTINGS: dict[str, Any] = {"threads": 2, "memory_limit": "1GB"}
BATCH = 4096  # records streamed at once
NUM_KEPT = 20  # index files
_ONE_AT_A_TIME = threading.Lock()  # it takes all cores, and a process has one temporary name per file

# Of (row, prompt, captions, utility, user, split, scores). A scorer's gap is its score of the best image minus that of
# the worst, by utility: of a pair, below 0 where the scorer contradicts the label.
RECORDS = """
CREATE TABLE records AS
WITH ends AS (
    SELECT *, CASE WHEN list_count(utility) = len(utility) THEN list_max(utility) - list_min(utility) END AS range,
           list_position(utility, list_max(utility)) AS best, list_position(utility, list_min(utility)) AS worst
    FROM raw
), gaps AS (
    SELECT *, CASE WHEN isfinite(range) THEN range END AS margin,
           CASE WHEN range > 0 AND isfinite(range) AND cardinality(scores) > 0 THEN map_from_entries(list_transform(
               map_entries(scores), lambda e: {'key': e.key, 'value': e.value[best] - e.value[worst]})) END AS gap
    FROM ends
)
SELECT row, lower(concat_ws(chr(10), prompt, list_aggregate(captions, 'string_agg', chr(10)))) AS text,
       "user", split, margin, gap, len(utility) > 1 AND margin = 0 AS is_tie,
       trim(coalesce(prompt, '')) = '' OR margin IS NULL AS is_bad,
       coalesce(list_min(map_values(gap)) < 0, false) AS against_label,
       coalesce(list_min(map_values(gap)) < 0 AND list_max(map_values(gap)) > 0, false) AS among_scorers
FROM gaps ORDER BY row
"""
SCORES = "MAP(VARCHAR, DOUBLE[])"
LINES = f"""
SELECT row, coalesce(line->>'prompt', line->>'caption') AS prompt, TRY_CAST(line->'captions' AS VARCHAR[]) AS captions,
       CASE WHEN json_exists(line, '$.images') OR json_exists(line, '$.utility')
            THEN TRY_CAST(line->'utility' AS DOUBLE[]) ELSE [1.0, 0.0] END AS utility,
       line->>'user' AS "user", line->>'split' AS split,
       TRY_CAST(CASE json_type(line->'scores') WHEN 'VARCHAR' THEN TRY_CAST(line->>'scores' AS JSON)
                ELSE line->'scores' END AS {SCORES}) AS scores
FROM (SELECT row, TRY_CAST(line AS JSON) AS line FROM streamed)
"""


def build_index(layout: Any, path: Path) -> None:
    """Writes the index of a layout to `path`, whole or not at all, and removes the oldest of too many.

    Raises:
        UserError: a file that DuckDB cannot read, or a full disk.
    """
    import duckdb

    path.parent.mkdir(parents=True, exist_ok=True)
    with _ONE_AT_A_TIME, atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            with duckdb.connect(str(temporary), config=SETTINGS) as connection:
                connection.execute(f"CREATE TEMP VIEW raw AS {_raw(connection, layout)}")
                connection.execute(RECORDS)
                found = connection.execute("SELECT count(*) FROM records").fetchall()[0][0]
        except duckdb.Error as error:
            raise UserError(f"{_first_file(layout)}: cannot be indexed ({str(error).splitlines()[0][:200]})") from error
        if found != len(layout.rows):
            raise UserError(f"{_first_file(layout)}: {len(layout.rows)} records became {found}; open it again")
    for old in sorted(path.parent.glob("*.duckdb"), key=lambda file: -file.stat().st_mtime)[NUM_KEPT:]:
        old.unlink(missing_ok=True)


def _first_file(layout: Any) -> str:
    return str(layout.rows.where(0)[0])


def _raw(connection: Any, layout: Any) -> str:
    """A query for the light columns of every record, whatever the layout."""
    files = getattr(layout.rows, "files", [])
    if files and files[0].endswith(".parquet"):
        return _of_parquet(connection, files)
    if files and layout.name in ("jsonl", "records"):
        _stream(connection, _lines(files), ("line",))
        return LINES
    _stream(connection, _parsed(layout), ("prompt", "captions", "utility", "user", "split", "scores"))
    return f"SELECT * REPLACE (TRY_CAST(TRY_CAST(scores AS JSON) AS {SCORES}) AS scores) FROM streamed"


def _of_parquet(connection: Any, files: list[str]) -> str:
    """Files are numbered through in the order of their names, as the layouts do."""
    table = connection.read_parquet(
        [glob.escape(file) for file in files],
        filename=True,
        file_row_number=True,
        union_by_name=True,
        hive_partitioning=False,
    )
    table.create_view("files")
    types = dict(zip(table.columns, map(str, table.types), strict=True))

    def column(name: str, kind: str = "VARCHAR", of: str = "") -> str:
        source = of or name
        return f'{f"TRY_CAST({source} AS {kind})" if source in types else f"NULL::{kind}"} AS "{name}"'

    if "label_0" in types:
        is_labelled = "coalesce(has_label, true) AND " if "has_label" in types else ""
        columns = [column("prompt", of="caption"), column("user", of="user_id")]
        columns += [
            f"CASE WHEN {is_labelled}label_0 IN (0, 0.5, 1) THEN [label_0, 1 - label_0]::DOUBLE[] END AS utility"
        ]
    else:
        columns = [column("prompt"), column("user"), column("utility", "DOUBLE[]")]
    scores = "TRY_CAST(scores AS JSON)" if types.get("scores") == "VARCHAR" else "to_json(scores)"
    columns += [column("captions", "VARCHAR[]"), column("split")]
    columns += [f"{f'TRY_CAST({scores} AS {SCORES})' if 'scores' in types else f'NULL::{SCORES}'} AS scores"]
    row = "row_number() OVER (ORDER BY filename, file_row_number) - 1"
    return f"SELECT {row} AS row, {', '.join(columns)} FROM files"


def _lines(files: list[str]) -> Iterator[dict[str, Any]]:
    numbers = itertools.count()
    for file in files:
        with open(file, "rb") as handle:
            for line in handle:
                if line.strip():
                    yield {"row": next(numbers), "line": line.decode("utf-8-sig", errors="replace")}


def _parsed(layout: Any) -> Iterator[dict[str, Any]]:
    """What the layout makes of its rows; a bad one has nothing but its number."""
    for row, raw in enumerate(layout.rows.light()):
        try:
            if isinstance(raw, BadRow):
                raise raw
            draft = layout.parse(raw, Path(layout.rows.where(row)[0]).parent)
        except BadRow:
            yield {"row": row}
            continue
        named = {name: getattr(draft, name) for name in ("prompt", "captions", "utility", "user", "split")}
        yield {"row": row, **named, "scores": json.dumps(draft.scores)}


def _stream(connection: Any, rows: Iterator[dict[str, Any]], names: tuple[str, ...]) -> None:
    """Makes `rows` the table "streamed"; what DuckDB has read is forgotten."""
    import pyarrow as pa

    lists = {"captions": pa.list_(pa.string()), "utility": pa.list_(pa.float64())}
    schema = pa.schema([("row", pa.int64()), *((name, lists.get(name, pa.string())) for name in names)])

    def batches() -> Iterator[Any]:
        while batch := list(itertools.islice(rows, BATCH)):
            yield pa.RecordBatch.from_pylist(batch, schema)

    connection.register("streamed", pa.RecordBatchReader.from_batches(schema, batches()))
