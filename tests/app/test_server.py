"""Who may enter the app, what it serves, and which files it reads."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffalign.errors import UserError
from gradio_app import _server
from gradio_app._context import open_context

TAB = "app.tabs=[leaderboard]"  # the one that needs nothing


@pytest.fixture
def context(tmp_path: Path) -> Any:
    (tmp_path / "given" / "run").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("x")
    return open_context([f"app.folder={tmp_path / 'app'}", f"app.roots=[{tmp_path / 'given'}]"])


def test_the_embedded_model_is_there_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    context = open_context([])
    assert context.config.names["model"] and context.tokens == ("sprites-sdxl",)
    assert context.folder == tmp_path / "runs" / "app" and context.settings.host == "127.0.0.1"
    assert open_context(["sprites-sd3"]).tokens == ("sprites-sd3",)


def test_paths_below_the_given_folders_are_read(context: Any, tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "link").symlink_to(given / "run")
    assert context.below(given / "run") == given / "run"
    assert context.below(f" {given}/link/../run ") == given / "run"
    assert context.below(tmp_path / "app") == tmp_path / "app"


@pytest.mark.parametrize(
    "path",
    ["", " ", "/etc/passwd", "..", "given/../secret/key.txt", "given/out/key.txt", "given/round/x", "a\0b", "x" * 5000]
    + ["given-not", "~", "file:///etc/passwd", "given/run\n/etc/passwd"],
)
def test_paths_outside_are_refused(context: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "given" / "out").symlink_to(tmp_path / "secret")
    (tmp_path / "given" / "round").symlink_to(tmp_path / "given" / "round")
    (tmp_path / "given-not").mkdir()
    with pytest.raises(UserError, match=r"below the folders of this app|no such file") as refused:
        context.below(str(tmp_path / path) if path.startswith("given") else path)
    assert len(str(refused.value)) < 1000


def test_a_missing_file_inside_is_named(context: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given/nothing: no such file"):
        context.below(tmp_path / "given" / "nothing")


@pytest.mark.parametrize("key", ["app.host=0.0.0.0", "app.host='::'", "app.host=example.org", "app.share=true"])
def test_others_enter_with_a_password_only(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: Any
) -> None:
    folder = f"app.folder={tmp_path / 'app'}"
    monkeypatch.delenv(_server.PASSWORD, raising=False)
    with pytest.raises(UserError, match=f"{key.partition('=')[0]}.*{_server.PASSWORD}"):
        _server._auth(open_context([folder, key]))
    monkeypatch.setenv(_server.PASSWORD, "ünlike")
    enter = _server._auth(open_context([folder, key]))
    assert enter is not None and enter("ann", "ünlike")
    assert not enter("ann", "unlike") and not enter("ann", "") and not enter(" ", "ünlike")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_enters_without(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_server.PASSWORD, raising=False)
    assert _server._auth(open_context([f"app.folder={tmp_path}", f"app.host='{host}'"])) is None


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=rf"app.port={other.getsockname()[1]}.*in use"):
            _server._free_port("127.0.0.1", other.getsockname()[1])
    with pytest.raises(UserError, match="app.host=no.such.host.invalid"):
        _server._free_port("no.such.host.invalid", 7860)
    assert _server._free_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize("word", ["app.tabs=[voting]", "app.max_queue=0", "app.port=70000", "app.nothing=1", "nosuch"])
def test_wrong_words_are_one_line_and_exit_code_2(word: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diffalign", "app", word], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def locked(serve: Any) -> Any:
    """A server with a password."""
    return serve(TAB, "app.max_upload=1", DIFFALIGN_APP_PASSWORD="open sesame")


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))


def _code(opener: Any, url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    try:
        with opener.open(urllib.request.Request(url, data, headers or {}), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


def _enter(server: Any, password: str) -> tuple[Any, int]:
    opener = _opener()
    form = urllib.parse.urlencode({"username": "ann", "password": password}).encode()
    return opener, _code(opener, f"{server.url}/login", form)


def _upload(opener: Any, server: Any, size: int) -> int:
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="../../x.txt"\r\n\r\n' + b"x" * size
    url, kind = f"{server.url}/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=b"}
    return _code(opener, url, body + b"\r\n--b--\r\n", kind)


@pytest.mark.slow
def test_a_password_guards_every_way_in(locked: Any) -> None:
    stranger = _opener()
    for path in ("config", "gradio_api/info", "gradio_api/file=/etc/passwd"):
        assert _code(stranger, f"{locked.url}/{path}") in (401, 403, 404), path
    body, kind = (
        json.dumps({"data": [], "fn_index": 0, "session_hash": "s"}).encode(),
        {"Content-Type": "application/json"},
    )
    assert _code(stranger, f"{locked.url}/gradio_api/queue/join", body, kind) == 401
    assert _upload(stranger, locked, 10) == 401
    assert _enter(locked, "open says me")[1] == 400
    friend, code = _enter(locked, "open sesame")
    assert code == 200 and _code(friend, f"{locked.url}/config") == 200


@pytest.mark.slow
def test_no_file_of_the_machine_is_served(locked: Any, tmp_path: Path) -> None:
    friend, _ = _enter(locked, "open sesame")
    inside = locked.folder / "kept.txt"
    inside.write_text("x")
    (locked.folder / "link").symlink_to("/etc/passwd")
    for path in (
        "/etc/passwd",
        "../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        inside,
        locked.folder / "link",
        tmp_path,
    ):
        assert _code(friend, f"{locked.url}/gradio_api/file={path}") in (403, 404), path


@pytest.mark.slow
def test_uploads_are_bounded(locked: Any) -> None:
    friend, _ = _enter(locked, "open sesame")
    assert _upload(friend, locked, 1000) == 200
    assert _upload(friend, locked, 3 * 2**20) == 413


@pytest.mark.slow
def test_it_listens_on_this_machine_alone(locked: Any) -> None:
    process = psutil.Process(locked.process.pid)
    listening = {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
