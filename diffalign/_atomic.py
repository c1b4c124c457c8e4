"""Files that are there whole or not at all: a temporary file beside the target, then a rename."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.errors import UserError

_HOST = "".join(c for c in socket.gethostname() if c.isalnum())[:24] or "host"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(folder: Path) -> None:
    """Removes temporary files that dead processes of this host left in `folder`."""
    for path in folder.glob(f".*.{_HOST}-*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path, hint: str = "") -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends well, removed when it fails.

    Two processes may write the same file at once: each has its own temporary name.

    Raises:
        UserError: the disk is full; `hint` says how much is needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path.parent}: no space left on the disk{f'; {hint}' if hint else ''}") from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes | str, hint: str = "") -> None:
    """Writes `data` to `path`, whole or not at all, and flushed to the disk.

    Text is written in UTF-8; what UTF-8 cannot hold (lone surrogates) becomes '?'.

    Raises:
        UserError: the disk is full; `hint` says how much is needed.
    """
    with atomic_path(path, hint) as temporary, open(temporary, "wb") as file:
        file.write(data.encode("utf-8", errors="replace") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
