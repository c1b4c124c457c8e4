"""A preference data set page by page: sorted, filtered and corrected without loading it, and never overwritten.

    browser = RecordBrowser("runs/pairs", Path("runs/app"))
    rows = browser.rows(Query(sort="margin", ties="without"))
    cards = browser.page(rows[:24], editor="ann")
    browser.log("ann").flip(int(rows[0]))

Opening reads what the reader of the layout needs to find any row: the footers of Parquet files, the line ends of JSONL.
A page reads its own rows. Sorting and filtering wait for the index (`_index`), which a thread of its own makes.
Both it and the editors' logs belong to the content of the files: other content begins anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from diffalign.browsing import _files, _index, _versions
from diffalign.browsing._cards import Card, card, edited
from diffalign.browsing._edits import Edit, EditLog
from diffalign.data import BadRow
from diffalign.errors import UserError
from diffalign.registry import find

Ties = Literal["with", "without", "only"]
Disagreement = Literal["any", "label", "scorers"]
MAX_LISTED = 200  # users that are named
NUM_ORDERS = 16  # results that are kept: 8 bytes per record found
NUM_OPEN = 4  # data sets


@dataclass(frozen=True)
class Query:
    """Which records, in which order.

    `sort`: "file"; "margin", the utility of the best image minus that of the worst; or a scorer's name, whose gap is
    its score of the best image minus that of the worst: ascending, the strongest contradictions come first. Records
    without the value come last. Filters see the data as it is in the files, not as it was edited.
    """

    sort: str = "file"
    descending: bool = False
    ties: Ties = "with"
    disagreement: Disagreement = "any"  # of a scorer with the label, or of scorers with each other
    text: str = ""  # in the prompt or a caption, whatever the case
    user: str | None = None
    is_bad: bool = False  # only records without a prompt or a usable label
    is_edited: bool = False  # only those the editor changed


@dataclass(frozen=True)
class Facets:
    """What there is to sort and filter by; counts are of records."""

    num: int
    num_ties: int
    num_bad: int
    num_against_label: int
    num_among_scorers: int
    scorers: tuple[str, ...]
    users: tuple[tuple[str, int], ...]  # the most frequent


class RecordBrowser:
    """One data set, whatever layout the readers know; for several visitors and threads.

    Args:
        path: file or folder.
        folder: indexes and drafts go below it.
        below: gives a path back with links resolved, or refuses it with a UserError; asked of every file that is read.

    Raises:
        UserError: nothing that can be read there.
    """

    def __init__(self, path: Path | str, folder: Path, below: Callable[[Path], Path] = Path.resolve) -> None:
        self.path, self.folder, self._below = Path(path), folder, below
        _files.check_links(self.path, below)
        # A layout needs nothing of a reader but its path; a reader would scan all rows.
        reader: Any = find("data", "auto")
        self._layout = reader.layout(SimpleNamespace(path=self.path))
        for file in getattr(self._layout.rows, "files", ()):
            below(Path(file))
        self.fingerprint = _files.fingerprint(self._layout)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._logs: dict[str, EditLog] = {}
        self._orders: OrderedDict[Query, Sequence[int]] = OrderedDict()
        self._index: Future[Any] | None = None

    def __len__(self) -> int:
        return len(self._layout.rows)

    @property
    def is_current(self) -> bool:
        """Whether the files are as they were when they were opened; of layouts that name none, they are taken to be."""
        if not hasattr(self._layout.rows, "files"):
            return True
        try:
            return self.fingerprint == _files.fingerprint(self._layout)
        except OSError:
            return False

    def log(self, editor: str) -> EditLog:
        """The edits of one editor: a name, or a token of a browser. Others do not see them."""
        with self._lock:
            if editor not in self._logs:
                name = hashlib.blake2b(editor.encode(), digest_size=16).hexdigest()
                self._logs[editor] = EditLog(self.folder / "edits" / self.fingerprint / f"{name}.jsonl")
            return self._logs[editor]

    def page(self, rows: Sequence[int], editor: str = "", side: int = 384) -> list[Card]:
        """The records of these rows, with thumbnails of at most `side` pixels.

        Raises:
            UserError: the files changed, or are damaged.
        """
        if not self.is_current:
            raise UserError(f"{self.path.name} changed on the disk: open it again (your edits of it are kept)")
        log = self.log(editor)
        # In the order of the file, because rows that lie together are decoded together.
        cards = {row: self._card(row, log.of(row), side) for row in sorted(map(int, rows))}
        return [cards[int(row)] for row in rows]

    def draft(self, row: int) -> Any:
        """Row `row`, parsed; images are bytes, or paths that nobody checked.

        Raises:
            BadRow: it cannot be read.
        """
        if not 0 <= row < len(self):
            raise BadRow("no such row", f"{row} of {len(self)}")
        with self._reading:  # a layout keeps decoded rows for one reader
            raw = self._layout.rows[row]
        draft = self._layout.parse(raw, Path(self._layout.rows.where(row)[0]).parent)
        if not draft.utility:
            raise BadRow("bad label", "no utility")
        return draft

    def _card(self, row: int, edit: Edit, side: int) -> Card:
        file, number = self._layout.rows.where(row)
        place = f"{os.path.basename(file)} row {number}"
        try:
            return card(row, place, edited(self.draft(row), edit), edit, self._below, side)
        except BadRow as error:
            return Card(row, place, edit, problem=str(error))

    def rows(self, query: Query, editor: str = "") -> Sequence[int]:
        """The rows found, in order. Waits for the index unless the order is the file's and nothing is filtered.

        Raises:
            UserError: the data cannot be indexed, or a sort by something it does not have.
        """
        if query == Query():
            return range(len(self))
        if query.is_edited:
            return self._found(query, self.log(editor).rows())
        with self._lock:
            if query in self._orders:
                self._orders.move_to_end(query)
                return self._orders[query]
        found = self._found(query)
        with self._lock:
            self._orders[query] = found
            if len(self._orders) > NUM_ORDERS:
                self._orders.popitem(last=False)
        return found

    def _found(self, query: Query, among: list[int] | None = None) -> Sequence[int]:
        conditions: dict[str, tuple[bool, list[Any]]] = {
            "is_tie": (query.ties == "only", []),
            "NOT coalesce(is_tie, false)": (query.ties == "without", []),
            "against_label": (query.disagreement == "label", []),
            "among_scorers": (query.disagreement == "scorers", []),
            "contains(text, lower(?))": (bool(query.text.strip()), [query.text.strip()]),
            '"user" = ?': (query.user is not None, [query.user]),
            "is_bad": (query.is_bad, []),
            "list_contains(?, row)": (among is not None, [among]),
        }
        used = {text: values for text, (is_used, values) in conditions.items() if is_used}
        key, keys = {"file": ("row", []), "margin": ("margin", [])}.get(query.sort, ("gap[?]", [query.sort]))
        way = "DESC" if query.descending else "ASC"
        sql = f"SELECT row FROM records WHERE {' AND '.join(used) or 'true'} ORDER BY {key} {way} NULLS LAST, row"
        found: Sequence[int] = self._ask(sql, [*(value for values in used.values() for value in values), *keys])["row"]
        return found

    def facets(self) -> Facets:
        """What there is to sort and filter by. Waits for the index.

        Raises:
            UserError: the data cannot be indexed.
        """
        counts = self._ask(
            "SELECT count(*) AS num, count(*) FILTER (is_tie) AS num_ties, count(*) FILTER (is_bad) AS num_bad,"
            " count(*) FILTER (against_label) AS num_against_label,"
            " count(*) FILTER (among_scorers) AS num_among_scorers FROM records"
        )
        scorers = self._ask("SELECT DISTINCT unnest(map_keys(gap)) AS name FROM records ORDER BY name")["name"]
        users = self._ask(
            'SELECT "user" AS name, count(*) AS num FROM records WHERE "user" IS NOT NULL'
            " GROUP BY 1 ORDER BY num DESC, name LIMIT ?",
            [MAX_LISTED],
        )
        named = tuple(zip(map(str, users["name"]), map(int, users["num"]), strict=True))
        numbers = {name: int(value[0]) for name, value in counts.items()}
        return Facets(**numbers, scorers=tuple(map(str, scorers)), users=named)

    def index(self) -> Future[Any]:
        """Begins to make the index where there is none yet."""
        with self._lock:
            if self._index is None or (self._index.done() and self._index.exception()):
                pool = ThreadPoolExecutor(1, "diffalign-index")
                self._index = pool.submit(self._opened)
                pool.shutdown(wait=False)
            return self._index

    def _opened(self) -> Any:
        import duckdb

        path = self.folder / "index" / f"{self.fingerprint}-{_index.FORMAT}.duckdb"
        if not path.is_file():
            _index.build_index(self._layout, path)
        os.utime(path)  # the least recently used ones are removed
        config: Any = {**_index.SETTINGS, "enable_external_access": False, "lock_configuration": True}
        return duckdb.connect(str(path), read_only=True, config=config)

    def _ask(self, sql: str, values: Sequence[Any] = ()) -> dict[str, Any]:
        """Column name -> values; each call has a cursor of its own, as threads need."""
        import duckdb

        with self.index().result().cursor() as cursor:
            try:
                found: dict[str, Any] = cursor.execute(sql, list(values)).fetchnumpy()
            except duckdb.Error as error:
                reason = str(error).splitlines()[0][:200]
                raise UserError(f"{self.path.name}: its index cannot be asked ({reason}): open it again") from error
            return found

    def save(self, editor: str, name: str | None = None) -> Iterator[tuple[int, int]]:
        """Writes the edited data set as a new one; see `_versions.save_version`. Yields (rows done, rows)."""
        return _versions.save_version(self, self.log(editor), self.version_folder(name), self._below)

    def version_folder(self, name: str | None = None) -> Path:
        """Where a new version goes: a name that is free, unless one is given."""
        return _versions.version_folder(self.path, self.folder / "data", name)


class Library:
    """The data sets that visitors of one app have open: each once, the last few kept."""

    def __init__(self, folder: Path, below: Callable[[Path], Path]) -> None:
        self.folder, self._below = folder, below
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, RecordBrowser] = OrderedDict()

    def open(self, path: Path | str) -> RecordBrowser:
        """The data set as its files are now, its index begun.

        Raises:
            UserError: see `RecordBrowser`.
        """
        resolved = self._below(Path(path))
        browser = RecordBrowser(resolved, self.folder, self._below)
        with self._lock:
            kept = self._open.get(resolved)
            if kept is not None and kept.fingerprint == browser.fingerprint:
                browser = kept
            self._open[resolved] = browser
            self._open.move_to_end(resolved)
            while len(self._open) > NUM_OPEN:
                self._open.popitem(last=False)
        browser.index()
        return browser

    def get(self, path: Path | str) -> RecordBrowser:
        """The same as it was opened last.

        Raises:
            UserError: see `RecordBrowser`.
        """
        with self._lock:
            kept = self._open.get(self._below(Path(path)))
        return kept or self.open(path)
