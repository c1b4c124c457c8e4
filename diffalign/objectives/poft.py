"""Preference-oriented supervised fine-tuning: beat an expert model on the good images (PoFT, arXiv 2412.12865)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import softplus

from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics, winner_share
from diffalign.types import Likelihoods, LossOutput, UserError


@dataclass(frozen=True)
class Poft:
    """-log sigmoid(beta logratio_w), the reference being an expert: a stronger denoiser of the same latent space.

    Its gradient is SFT's times sigmoid(-reward), so that images on which the expert fails too count less. With the own
    base as reference it is the winner's half of Diffusion-DPO. Formula established (the paper's text; vector C-poft).

    beta: per unit of logp (a mean over latent dimensions), as in `pair`; a factor B in front of mean error
        differences, B (e_expert - e), is beta = 2 B. 5000 is Diffusion-DPO's, no value is published for images.

    Winners are the candidates of highest utility, a single image its own; those tied for best share the weight.

    Differs from the paper: one reference instead of the mean over several experts (any reference that returns their
    mean log-likelihood does that).
    """

    beta: float = 5000.0

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"objective.beta must be positive (got {self.beta})")

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        reward = self.beta * kept(likelihoods.logratio, likelihoods.mask)
        return LossOutput(
            per_prompt=(winner_share(likelihoods) * softplus(-reward)).sum(dim=1),
            metrics=ranking_metrics(reward, ordered_pairs(likelihoods.utility, likelihoods.mask)),
        )
