"""A real server process and a real browser for each tab, and its screenshots.

Screenshots go to runs/screenshots/ at desktop and phone width, light and dark.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
PATIENCE = 240.0  # seconds until a server answers; imports are slow on a busy machine
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A `diffalign app` of its own process group, in a folder of its own."""

    cwd: Path
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def folder(self) -> Path:
        """The default of app.folder."""
        return self.cwd / "runs" / "app"

    @property
    def log(self) -> str:
        return (self.cwd / "server.log").read_text(errors="replace")

    def start(self) -> None:
        command = [sys.executable, "-m", "diffalign", "app", *self.words, f"app.port={self.port}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **self.environment}
        with open(self.cwd / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.cwd, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"the app ended with {self.process.returncode}: {self.log[-2000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/gradio_api/startup-events", timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"no answer from the app: {self.log[-2000:]}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Ends the server alone: the runs it started go on."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=60)

    def restart(self) -> None:
        """The same words, folder and port again."""
        self.start()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers: `serve("app.tabs=[vote]", cwd=folder)`; they end with the module."""
    servers: list[Server] = []

    def start(*words: str, cwd: Path | None = None, **environment: str) -> Server:
        server = Server(cwd or tmp_path_factory.mktemp("app"), list(words), environment)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """One browser for all tests of a process."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, each as another visitor: `browser(url)`; a script error in a page fails the test."""
    contexts, errors = [], []

    def visit(url: str, **options: Any) -> Any:
        context = chromium.new_context(
            viewport=dict(zip(("width", "height"), WIDTHS["desktop"], strict=True)), **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not errors, f"script errors in the page: {errors}"


@pytest.fixture
def shoot() -> Callable[[Any, str], None]:
    """Screenshots of the whole page: `shoot(page, "vote")` writes vote-desktop-light.png and three more.

    No page may be wider than the screen.
    """

    def shot(page: Any, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        for kind, (width, height) in WIDTHS.items():
            page.set_viewport_size({"width": width, "height": height})
            for theme in ("light", "dark"):
                page.evaluate("dark => document.body.classList.toggle('dark', dark)", theme == "dark")
                page.wait_for_timeout(400)
                page.screenshot(path=SCREENSHOTS / f"{name}-{kind}-{theme}.png", full_page=True)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} px wide on a {kind} of {width} px"
        page.evaluate("document.body.classList.remove('dark')")
        page.set_viewport_size(dict(zip(("width", "height"), WIDTHS["desktop"], strict=True)))

    return shot
