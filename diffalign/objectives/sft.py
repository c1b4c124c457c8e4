"""Supervised fine-tuning: the plain denoising loss, on winners or on every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffalign.types import Likelihoods, LossOutput


@dataclass(frozen=True)
class Sft:
    """-2 logp, the (weighted) mean squared error of the native target.

    on: `winner` (the candidate of highest utility; the anchor of SFT-PO, arXiv 2405.16436) or `all` candidates.
        At a tie the first of the best is taken.
    """

    on: Literal["winner", "all"] = "winner"

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        if self.on == "winner":
            best = likelihoods.utility.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
            mask = torch.zeros_like(mask).scatter(1, best, True) & mask
        error = torch.where(mask, likelihoods.error, torch.zeros_like(likelihoods.error))
        per_prompt = error.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return LossOutput(per_prompt=per_prompt, metrics={"sft": per_prompt.detach()})
