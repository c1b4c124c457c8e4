"""Local and remote files: listing, opening, and stamps for fingerprints. Remote means an fsspec URL such as hf://."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from diffalign.types import UserError

EDGE = 65536  # bytes hashed at each end of a file: a Parquet footer describes every column chunk before it
SHARD_NAME = re.compile(r"^(?P<split>\w+?)-\d+-of-\d+")  # train-00000-of-00010.parquet


def is_remote(path: str | Path) -> bool:
    """Whether `path` is a URL (hf://datasets/..., s3://...)."""
    return "://" in str(path)


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path inside it."""
    import fsspec

    return fsspec.core.url_to_fs(path)


def _unreachable(path: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{path}: cannot be reached ({reason}); if you are offline, download it and give the local folder")


def list_files(path: str | Path, suffix: str) -> list[str]:
    """`path` itself where it is a file, else all files under it that end in `suffix`, sorted.

    Raises:
        UserError: nothing there, no such file inside, or a URL that cannot be reached.
    """
    if is_remote(path):
        url = str(path)
        try:
            filesystem, inner = _filesystem(url)
            if inner.endswith(suffix):
                found = [inner] if filesystem.exists(inner) else []
            else:
                found = sorted(filesystem.glob(f"{inner.rstrip('/')}/**/*{suffix}"))
        except Exception as error:  # a remote file system raises what its client library likes
            raise _unreachable(url, error) from error
        if not found:
            raise UserError(f"{url}: no {suffix} file there")
        return [filesystem.unstrip_protocol(name) for name in found]
    local = Path(path)
    if local.is_file():
        return [str(local)]
    if not local.exists():
        raise UserError(f"{local}: no such file or folder; set source.data.path")
    # Hidden files are temporary ones of a writer at work.
    names = sorted(str(name) for name in local.rglob(f"*{suffix}") if not name.name.startswith(".") and name.is_file())
    if not names:
        raise UserError(f"{local}: no {suffix} file in this folder")
    return names


def open_binary(path: str) -> Any:
    """A seekable binary file, local or remote.

    Raises:
        UserError: a URL that cannot be reached.
    """
    if not is_remote(path):
        return open(path, "rb")
    try:
        filesystem, inner = _filesystem(path)
        return filesystem.open(inner, "rb")
    except Exception as error:  # see list_files
        raise _unreachable(path, error) from error


def split_of_name(path: str) -> str | None:
    """'train' for train-00000-of-00010.parquet: the hub's naming of shards; None for other names."""
    match = SHARD_NAME.match(os.path.basename(path))
    return match["split"] if match else None


def stamp(path: str) -> str:
    """What a data file is recognised by: name, size, modification time and a hash of both its ends.

    Not its folder, so that a moved data set keeps its cache; an edit in the middle shows in the modification time.
    A remote file is known by its name, size and the version tag its file system gives.
    """
    if is_remote(path):
        try:
            filesystem, inner = _filesystem(path)
            info = filesystem.info(inner)
        except Exception as error:  # see list_files
            raise _unreachable(path, error) from error
        version = info.get("blob_id") or info.get("ETag") or info.get("etag") or info.get("LastModified")
        return f"{os.path.basename(path)}|{info.get('size')}|{version}"
    status = os.stat(path)
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(0, status.st_size - EDGE))
        digest.update(file.read(EDGE))
    return f"{os.path.basename(path)}|{status.st_size}|{status.st_mtime_ns}|{digest.hexdigest()}"


def stamp_image(path: Path) -> str:
    """What an image file beside the data is recognised by: name, size and modification time; cheap enough for all."""
    try:
        status = os.stat(path)
    except OSError:
        return f"{path.name}|missing"
    return f"{path.name}|{status.st_size}|{status.st_mtime_ns}"
