"""What diffusers and transformers say that is noise: their progress bars, and every cut prompt in full."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

logger = logging.getLogger(__name__)


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


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Nothing below an error for the duration."""
    import diffusers.utils.logging
    import transformers.utils.logging

    switches = (diffusers.utils.logging, transformers.utils.logging)
    before = [switch.get_verbosity() for switch in switches]
    try:
        for switch, level in zip(switches, before, strict=True):
            switch.set_verbosity(max(level, logging.ERROR))
        yield
    finally:
        for switch, level in zip(switches, before, strict=True):
            switch.set_verbosity(level)


class CutPrompts:
    """Counts prompts longer than any text encoder reads, and says so in a line at the first, the tenth, the hundredth.

    Args:
        pipeline: a diffusers pipeline.
        t5_tokens: how many its T5 reads, where it has one.
    """

    def __init__(self, pipeline: Any, t5_tokens: int) -> None:
        clips = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        self._readers = [(tokenizer, int(tokenizer.model_max_length)) for tokenizer in clips if tokenizer is not None]
        if (t5 := getattr(pipeline, "tokenizer_3", None)) is not None:
            self._readers.append((t5, t5_tokens))
        self._seen = self._cut = 0
        self._next = 1

    def count(self, prompts: Sequence[str]) -> None:
        """Looks at prompts that are about to be encoded."""
        self._seen += len(prompts)
        self._cut += sum(all(self._is_cut(prompt, *reader) for reader in self._readers) for prompt in prompts)
        if self._cut >= self._next:
            self._next = 10 ** len(str(self._cut))
            tokens = max(length for _, length in self._readers)
            logger.warning(
                "%d of %d prompts so far are longer than the %d tokens that are read: the rest of them is cut off",
                *(self._cut, self._seen, tokens),
            )

    @staticmethod
    def _is_cut(prompt: str, tokenizer: Any, length: int) -> bool:
        return len(tokenizer.tokenize(prompt)) + tokenizer.num_special_tokens_to_add() > length
