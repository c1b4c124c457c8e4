"""The README's picture of the app: base and aligned sprites side by side, in Chromium.

make demo                           # the run that is shown
python docs/app_screenshot.py       # writes docs/app.png
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PROMPTS = (
    "a small green cross above a small yellow square on a dark background",
    "a large red circle left of a small blue triangle on a light background",
)
SETTINGS = {"seeds": "0-3", "steps": 20, "cfg": 1, "score": ["sprites_gold"], "vary": "seeds"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(url: str, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Until the app answers.

    Raises:
        RuntimeError: it ended, or does not.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError("the app does not answer")


def shoot(url: str, adapter: str, out: Path) -> None:
    """Runs the comparison and photographs the page."""
    words = {"c": ["sprites-sdxl", adapter], "p": PROMPTS, **SETTINGS}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 960}, device_scale_factor=1)
        page.set_default_timeout(180_000)
        page.goto(f"{url}?tab=compare&{urlencode(words, doseq=True)}")
        page.wait_for_function(
            "document.querySelector('#da-compare-prompts textarea')?.value.includes('blue triangle')"
        )
        page.click("#da-compare-run")
        page.wait_for_function("document.querySelector('.da-cmp-status')?.innerText.startsWith('Done')")
        page.evaluate("window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        page.screenshot(path=out)
        browser.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder below which the run lies")
    parser.add_argument("--adapter", default="demo-sprites-sdxl/train", help="its name in the app")
    parser.add_argument("--out", type=Path, default=HERE / "app.png")
    arguments = parser.parse_args()
    port = free_port()
    words = [f"app.roots=[{arguments.runs}]", f"app.folder={arguments.runs / 'app'}", f"app.port={port}"]
    process = subprocess.Popen([sys.executable, "-m", "diffalign", "app", *words])
    try:
        url = f"http://127.0.0.1:{port}/"
        wait(url, process)
        shoot(url, arguments.adapter, arguments.out)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
