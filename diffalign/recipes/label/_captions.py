"""Captions per image for dual-caption records (DCPO, arXiv 2502.06023)."""

from __future__ import annotations

import numpy as np

from diffalign import randomness


def perturbed(caption: str, share: float, *key: int | str) -> str:
    """The caption with about `share` of its words dropped or moved elsewhere, by the address of `key`; at least one.

    A plain stand-in for the paraphrasing model that the paper perturbs with: it weakens a caption's fit to its image,
    but writes nothing new. A caption of one word, or a share of 0, stays as it is.
    """
    words = caption.split()
    if share == 0 or len(words) < 2:
        return caption
    rng = np.random.default_rng(randomness.address("perturb", *key))
    num = min(len(words) - 1, max(1, round(share * len(words))))
    touched = {int(place) for place in rng.choice(len(words), size=num, replace=False)}
    kept = [word for place, word in enumerate(words) if place not in touched]
    for place in sorted(touched):
        if rng.random() < 0.5:
            kept.insert(int(rng.integers(len(kept) + 1)), words[place])
    # moved words may all have come back to where they were
    return " ".join(kept if kept != words else words[1:])
