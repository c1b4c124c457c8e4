"""Who trains in a run folder: `process.json`, locked by the process that wrote it for as long as it lives.

The operating system drops the lock with the process, however that ends, so neither a stale file nor a reused process
number can claim that a run goes on.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from diffalign._json import to_json
from diffalign.errors import UserError, WaitsForVotes

try:
    import fcntl
except ImportError:  # Windows has no such locks: there a run is never seen as running
    fcntl = None  # type: ignore[assignment]

FILE = "process.json"
PATIENCE_S = 2.0  # who asks `holder` has the lock for an instant


def identity(pid: int | None = None) -> dict[str, Any]:
    """What tells a process (default: this one) from every later one of its number."""
    process = psutil.Process(pid)
    return {"pid": process.pid, "created": process.create_time(), "host": socket.gethostname()}


def is_alive(facts: Mapping[str, Any]) -> bool:
    """Whether the process of `identity` still runs, on this machine."""
    return _process(facts) is not None


def _process(facts: Mapping[str, Any]) -> psutil.Process | None:
    if facts.get("host") != socket.gethostname() or not isinstance(facts.get("pid"), int):
        return None
    try:
        process = psutil.Process(facts["pid"])
        is_same = abs(process.create_time() - float(facts.get("created", 0))) < 0.02
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def send(facts: Mapping[str, Any], at_once: bool) -> bool:
    """Asks the process of `identity` to end (SIGTERM), or ends it (SIGKILL); whether it was there."""
    process = _process(facts)
    if process is None:
        return False
    try:
        process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)  # psutil refuses a reused number
    except psutil.NoSuchProcess:
        return False
    return True


def _lock(file: IO[str], exclusive: bool) -> bool:
    """Whether the lock was free; a file system without locks has none to be refused."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _write(file: IO[str], facts: Mapping[str, Any]) -> None:
    """In place: a renamed file would be another one, without the lock."""
    file.seek(0)
    file.truncate()
    file.write(to_json(facts, indent=2) + "\n")
    file.flush()


def read(folder: Path) -> dict[str, Any]:
    """What process.json says of the newest process, {} without one."""
    try:
        facts = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def holder(folder: Path) -> dict[str, Any] | None:
    """The facts of the process that trains in `folder` now, None where none does."""
    try:
        with open(folder / FILE) as file:
            is_free = _lock(file, exclusive=False)
    except OSError:
        return None
    return None if is_free else read(folder)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Marks `folder` as being worked on by this process, and at the end writes how it ended.

    Raises:
        UserError: another process works on it.
    """
    with open(folder / FILE, "a+") as file:
        until = time.monotonic() + PATIENCE_S
        while not _lock(file, exclusive=True):
            if time.monotonic() > until:
                other = read(folder)
                raise UserError(
                    f"process {other.get('pid', '?')} on {other.get('host', '?')} trains in {folder}: wait for its end,"
                    " or choose another train.out"
                )
            time.sleep(0.05)
        facts = identity() | {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        _write(file, facts)
        try:
            yield
        except BaseException as error:
            _write(file, facts | {"ended": _kind(error), "reason": " ".join(str(error).split())[:1000]})
            raise
        _write(file, facts | {"ended": "finished"})


def _kind(error: BaseException) -> str:
    if isinstance(error, WaitsForVotes):
        return "waits for votes"
    return "failed" if isinstance(error, Exception) else "interrupted"
