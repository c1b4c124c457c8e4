"""A term that keeps the policy near the reference: the denoising step's KL divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.types import Likelihoods, LossOutput


@dataclass(frozen=True)
class Kl:
    """Mean over candidates of 1/2 w(t) mean((pred - pred_ref)^2), in units of logp; a term of `sum`.

    Equal variances make forward and reverse KL agree, so there is one. On images of the run's own prompts it is the
    prior-preservation term of C3PO (arXiv 2402.10893); multiply it by `weight` in the order of the objective's beta.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        kl = torch.where(mask, likelihoods.step_kl, torch.zeros_like(likelihoods.step_kl))
        per_prompt = kl.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return LossOutput(per_prompt=per_prompt, metrics={"kl": per_prompt.detach()})
