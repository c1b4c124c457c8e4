"""A CLIP folder as a scorer (PickScore_v1 is one): exp(logit_scale) x cosine of picture and prompt; needs `path`."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.scorers._clip import ClipScorer


@dataclass(frozen=True)
class ClipPreference(ClipScorer):
    """PickScore's formula (arXiv 2305.01569, eq. 1) over any CLIPModel folder; fields: see `ClipScorer`.

    PickScore_v1 names no tokenizer of its own: set `processor` to laion/CLIP-ViT-H-14-laion2B-s32B-b79K's folder where
    its files are not beside the weights.
    """
