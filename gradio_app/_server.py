"""The page of tabs, and the server behind it."""

from __future__ import annotations

import hmac
import importlib
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while gradio is imported

import gradio as gr

from diffalign import api
from gradio_app._context import Context, open_context
from gradio_app._parts import escape

PASSWORD = "DIFFALIGN_APP_PASSWORD"
HERE = Path(__file__).parent
THEME = gr.themes.Default(  # fonts of the machine: the page fetches nothing from elsewhere
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


def build(context: Context) -> gr.Blocks:
    """The page: a tab for each of `app.tabs`; `?tab=vote` opens one."""
    names = [name for name in api.TABS if name in (context.settings.tabs or api.TABS)]
    shown = " ".join(word for word in context.tokens if not word.startswith("app."))
    with gr.Blocks(title="diffalign", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(f'<div class="da-title"><b>diffalign</b><span>{escape(shown)}</span></div>')
        with gr.Tabs(elem_id="da-tabs") as tabs:
            for name in names:
                module = importlib.import_module(f"gradio_app.{name}")
                with gr.Tab(module.LABEL, id=name, elem_id=f"da-tab-{name}"):
                    module.build(context, blocks)

        def opened(request: gr.Request) -> gr.Tabs:
            asked = request.query_params.get("tab")
            return gr.Tabs(selected=asked if asked in names else names[0])

        blocks.load(opened, None, tabs, api_visibility="private", show_progress="hidden")
    return blocks


def serve(tokens: Sequence[str], quiet: bool = False) -> None:
    """Serves the app of these configs and keys until it is interrupted.

    Raises:
        UserError: a setting that does not fit, an address without a password, or a port that is taken.
    """
    context = open_context(tokens)
    settings, auth = context.settings, _auth(context)
    port = _free_port(settings.host, settings.port)
    blocks = build(context).queue(max_size=settings.max_queue, default_concurrency_limit=4)
    _, local, public = blocks.launch(
        server_name=settings.host,
        server_port=port,
        share=settings.share,
        auth=auth,
        auth_message="Your name, under which your votes are kept, and the password of this app.",
        allowed_paths=[],
        max_file_size=settings.max_upload * 2**20,
        theme=THEME,
        css="\n".join(path.read_text() for path in sorted(HERE.glob("*.css"))),
        head="".join(f"<script>{path.read_text()}</script>" for path in sorted(HERE.glob("*.js"))),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    if not quiet:
        print(f"diffalign app: {public or local} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def _auth(context: Context) -> Callable[[str, str], bool] | None:
    """Who may enter: everybody on this machine; with a password, whoever knows it, under a name of their own.

    Raises:
        UserError: other machines may enter, and there is no password.
    """
    settings = context.settings
    password = settings.password or os.environ.get(PASSWORD)
    if password:
        secret = str(password).encode()
        return lambda name, given: bool(name.strip()) and hmac.compare_digest(given.encode(), secret)
    if settings.share or not _is_loopback(settings.host):
        key = "app.share=true" if settings.share else f"app.host={settings.host}"
        raise api.UserError(f"{key} lets other machines in: set a password in the environment variable {PASSWORD}")
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: it is taken, or the address is not of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise api.UserError(f"app.host={host} app.port={port}: {error.strerror or error}: choose another") from error
