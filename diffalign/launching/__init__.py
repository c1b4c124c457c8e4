"""Training runs as processes of their own: checked, started, stopped and resumed on behalf of others.

A run outlives whoever started it. What was started is written to `<folder>/launches`, the output to `<folder>/logs`;
how a run stands is told by its own folder (`diffalign.runs`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign import _run_lock
from diffalign._json import read_json, write_json
from diffalign.config import TRAINING_SECTIONS, Config, config_names, merge_overrides, resolve
from diffalign.errors import UserError
from diffalign.recipes import _run
from diffalign.recipes._fit import check_data, check_needs
from diffalign.recipes._stopping import check_stop
from diffalign.recipes.train import run_folder
from diffalign.runs import CONFIG, is_run

KINDS = ("models", "methods", "runs")
CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:Class, as `registry.find` imports it
LOG_END = 8000  # bytes of a log that are shown


@dataclass(frozen=True)
class Launch:
    """A process that was started for a run folder."""

    folder: Path
    words: tuple[str, ...]  # of `diffalign train`
    log: Path
    process: Mapping[str, Any]

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return _run_lock.is_alive(self.process)


def command(words: Sequence[str], verb: str = "train") -> str:
    """The command line of `words`, ready to be pasted into a shell."""
    return shlex.join(["diffalign", verb, *words])


class Launcher:
    """Starts, stops and resumes trainings for people who may not touch anything outside some folders.

    Args:
        folder: where launches and logs are kept.
        roots: absolute folders; runs are written, and files that somebody names are read, only below them.
        max_runs: trainings at once; a further one is refused.
        configs: config files that may be named beside the shipped ones.
    """

    def __init__(self, folder: Path, roots: Sequence[Path], max_runs: int = 1, configs: Sequence[str] = ()) -> None:
        self.folder, self.roots, self.max_runs, self.configs = folder, tuple(roots), max_runs, tuple(configs)
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def check(self, words: Sequence[str]) -> Config:
        """The config of `diffalign train WORDS`, if it may be started.

        Raises:
            UserError: what the training itself would refuse, or a path outside the folders.
        """
        self._check_words(words)
        config = resolve(list(words))
        out = run_folder(config)
        self._check_below(out, "train.out")
        if getattr(config.source, "cache_dir", None) is not None:
            self._check_below(Path(config.source.cache_dir), "source.cache_dir")
        check_needs(config)
        check_stop(config)
        check_data(config)
        if out.is_dir() and any(out.iterdir()):
            _run.open_folder(out, config, TRAINING_SECTIONS)  # refuses another config's folder, and writes nothing
        return config

    def start(self, words: Sequence[str]) -> Launch:
        """Starts `diffalign train WORDS`, or goes on with the run that they describe.

        Raises:
            UserError: see `check`; the run is finished or running, or as many runs as are allowed are.
        """
        return self._start(run_folder(self.check(words)), words)

    def resume(self, folder: Path) -> Launch:
        """Goes on with an interrupted run, from its own config.

        Raises:
            UserError: no run, one outside the folders, a finished or a running one, or too many are running.
        """
        self._check_below(folder, "the run")
        folder = folder.resolve()
        if not is_run(folder):
            raise UserError(f"{folder} is no run: it has no {CONFIG}")
        shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
        if "=" in shown:
            raise UserError(f"{shown}: a name with '=' reads as key=value: rename the folder to resume it here")
        words = [f"{shown}/{CONFIG}", f"train.out={shown}"]
        config = resolve(words)
        check_data(config)
        return self._start(folder, words)

    def stop(self, folder: Path, at_once: bool = False) -> None:
        """Asks a run to end after its step, with a checkpoint; `at_once` kills it, back to its last checkpoint.

        Only the process that this launcher started for the folder, or that holds the folder's lock, is signalled.

        Raises:
            UserError: no process trains there.
        """
        self._check_below(folder, "the run")
        launch = self.launch(folder)
        for process in (_run_lock.holder(folder), launch.process if launch else None):
            if process and _run_lock.send(process, at_once):
                return
        raise UserError(f"no process of this machine trains in {folder}")

    def launch(self, folder: Path) -> Launch | None:
        """The newest launch for a run folder."""
        return self._read(self._record(folder))

    def launches(self) -> list[Launch]:
        """Every run that was started here, the newest first."""
        records = sorted((self.folder / "launches").glob("*.json"), key=lambda path: -path.stat().st_mtime)
        return [launch for path in records if (launch := self._read(path)) is not None]

    def running(self) -> list[Launch]:
        """Those of `launches` whose process is alive."""
        self._children = [child for child in self._children if child.poll() is None]  # no zombies
        return [launch for launch in self.launches() if launch.is_alive]

    def log(self, launch: Launch) -> str:
        """The end of what the process has printed."""
        try:
            with open(launch.log, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_END))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def dry_run(self, words: Sequence[str]) -> Generator[tuple[bool, str], None, None]:
        """`diffalign check WORDS` in a process of its own: (is it over, what it has printed), about once a second.

        Closing the generator ends the process.

        Raises:
            UserError: what `check` refuses.
        """
        self._check_words(words)
        resolve(list(words))
        arguments = [sys.executable, "-m", "diffalign", "check", *words]
        with subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as child:
            try:
                while True:
                    try:
                        printed, _ = child.communicate(timeout=1.0)
                        yield True, printed.decode(errors="replace")
                        return
                    except subprocess.TimeoutExpired:
                        yield False, ""
            finally:
                if child.poll() is None:
                    child.kill()

    def _start(self, folder: Path, words: Sequence[str]) -> Launch:
        with self._lock:
            running = self.running()
            if _run_lock.holder(folder) is not None or any(each.folder == folder.resolve() for each in running):
                raise UserError(f"{folder} is being trained already")
            if (folder / "export_check.json").is_file():
                raise UserError(f"{folder} is finished: choose another train.out for another run")
            if len(running) >= self.max_runs:
                names = ", ".join(each.folder.name for each in running)
                raise UserError(
                    f"{len(running)} of at most {self.max_runs} runs are going on ({names}): see app.max_runs"
                )
            return self._spawn(folder.resolve(), words)

    def _spawn(self, folder: Path, words: Sequence[str]) -> Launch:
        record = self._record(folder)
        log = self.folder / "logs" / f"{record.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            output.write(f"$ {command(words)}\n".encode())
            output.flush()
            child = subprocess.Popen(
                [sys.executable, "-m", "diffalign", "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # neither Ctrl-C nor the end of this process reaches it
            )
        self._children.append(child)
        launch = Launch(folder, tuple(words), log, _run_lock.identity(child.pid))
        write_json(record, {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **dataclasses.asdict(launch)})
        return launch

    def _record(self, folder: Path) -> Path:
        folder = folder.resolve()
        mark = hashlib.blake2b(str(folder).encode(), digest_size=5).hexdigest()
        name = re.sub(r"[^\w-]", "-", folder.name)[:60]
        return self.folder / "launches" / f"{name}-{mark}.json"

    def _read(self, record: Path) -> Launch | None:
        try:
            facts = read_json(record)
            return Launch(Path(facts["folder"]), tuple(facts["words"]), Path(facts["log"]), facts["process"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _check_words(self, words: Sequence[str]) -> None:
        """Words come from people who may not read this machine's files or import its modules by naming them."""
        configs = [*self.configs, *(name for kind in KINDS for name in config_names(kind))]
        for word in words:
            if word not in configs and ("=" not in word or word.startswith("-")):
                raise UserError(f"{word[:80]!r} is neither the name of a shipped config nor key=value")
        for key, text in _leaves(merge_overrides([word for word in words if "=" in word])):
            if CODE.fullmatch(text) or (key[-1] == "name" and ":" in text):
                raise UserError(f"{'.'.join(key)}={text[:80]}: code of your own is for the command line")
            for piece in re.split("[:#]", text):  # as in name:path#sha256=...
                if _names_a_file(piece):
                    self._check_below(Path(piece), ".".join(key))

    def _check_below(self, path: Path, what: str) -> None:
        try:
            is_below = any(path.resolve().is_relative_to(root) for root in self.roots)
        except (OSError, ValueError, RuntimeError):
            is_below = False
        if not is_below:
            shown = ", ".join(map(str, self.roots))
            raise UserError(f"{what}: {str(path)[:200]} is not below the folders of this app ({shown}): see app.roots")


def _leaves(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, text) of every text in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, (*key, str(name)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, key)
    elif isinstance(value, str):
        yield key, value


def _names_a_file(text: str) -> bool:
    """Whether a text may be a path of this machine: it is one, or it leaves the working folder."""
    if text.startswith(("/", "~")) or ".." in text.split("/"):
        return True
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):
        return False
