"""Hold-out splits by prompt: no prompt is on both sides, and the side of a prompt never depends on the other rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffalign.data._reader import good_records, prompt_key
from diffalign.data._report import Report
from diffalign.randomness import address
from diffalign.types import UserError


def split_holdout(data: Any, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, holdout): int64 positions in `data`, a cache, an `OnTheFly` or a reader.

    Prompts equal up to case and spaces count as one. `fraction` (in [0, 1)) is the expected share of prompts held out.

    Raises:
        UserError: a fraction outside [0, 1), or so large that nothing is left to train on.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"holdout fraction must be at least 0 and below 1, got {fraction}")
    keys = getattr(data, "prompt_keys", None)
    positions = np.arange(len(data))
    if keys is None:
        pairs = [(index, prompt_key(record.prompt)) for index, record in good_records(data, Report())]
        positions = np.array([index for index, _ in pairs], np.int64)
        keys = np.array([key for _, key in pairs], np.int64)
    unique, inverse = np.unique(keys, return_inverse=True)
    limit = int(fraction * 2**63)
    is_held = np.array([address("holdout", seed, int(key)) < limit for key in unique], bool)[inverse]
    if is_held.all():
        raise UserError(f"holdout fraction {fraction} leaves nothing to train on: only {len(unique)} distinct prompts")
    return positions[~is_held], positions[is_held]
