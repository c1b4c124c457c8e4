"""The app: the place where people look instead of reading. `diffalign app [config]` starts it."""

from gradio_app._server import build, serve

__all__ = ["build", "serve"]
