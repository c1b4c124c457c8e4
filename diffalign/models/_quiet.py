"""Hides the progress bars of diffusers and transformers where they would only be noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No loading or saving bars for the duration; what was switched off before stays off."""
    import diffusers.utils.logging
    import transformers.utils.logging

    switches = (diffusers.utils.logging, transformers.utils.logging)
    was_on = [switch.is_progress_bar_enabled() for switch in switches]
    try:
        for switch in switches:
            switch.disable_progress_bar()
        yield
    finally:
        for switch, on in zip(switches, was_on, strict=True):
            if on:
                switch.enable_progress_bar()
