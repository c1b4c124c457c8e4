"""Negative-aware fine-tuning on the forward process: DiffusionNFT (arXiv 2509.16117)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffalign.objectives._groups import deviations
from diffalign.objectives._lists import kept, ordered_pairs, ranking_metrics
from diffalign.types import Likelihoods, LossOutput, UserError

STD_PER_SCALE = 5.0  # the released code's bound on a standardised reward, at which r reaches 0 or 1


@dataclass(frozen=True)
class Nft:
    """mean_k r |v+ - target|^2 + (1 - r) |v- - target|^2, v+- = v_old +- beta (v - v_old), r how optimal the image is.

    Means over latent dimensions; v may be any native prediction. The reference is v_old, the policy that drew the
    round's images: reference.name=checkpoint_pool with strategy=last and a push per round. With A and C the reference's
    and the policy's error, D = |v - v_old|^2 (twice the step KL) and y = 2r - 1, this is A + beta y (C - A) + beta
    (beta - y) D: no forward more than Diffusion-DPO's. Noise is drawn anew, so any sampler may have drawn the images:
    likelihood.name is elbo, with likelihood.shared_noise=false for independent noise as in the code.

    beta: > 0, how far v+ and v- lie from v_old in units of v's own distance. 1, where v+ is v itself, is the code's for
        most single rewards; 0.1 for text rendering and for several rewards at once. Not Diffusion-DPO's beta: there is
        no unit of logp in it.
    utility: `reward` computes r = 1/2 + 1/2 clip((u - group mean) / scale, -1, 1) over the prompt's own candidates;
        `probability` takes utility as r itself, in [0, 1].
    scale: Z > 0, in units of utility; null is 5 (std + 1e-4) of the prompt's candidates (population). 5 is the code's,
        whose std is of all rewards of the round or of the prompt's: for the former give a number.

    Metrics: `optimality` the mean r, `distance` the mean D, and margin and accuracy of the log-ratios.

    Established: formula of the paper, checked against explicit tensors. Differs from the code: it weighs errors of x0,
    each divided by its own mean absolute value without gradient, and multiplies the loss by 5 / beta: here plain errors
    of the native prediction (likelihood.weighting changes that) and no factor. Its v_old is an average of the weights
    with a decay that grows over the run; here it is what the reference is. Its KL to the base is a term of another
    reference and is left out.
    """

    beta: float = 1.0
    utility: Literal["reward", "probability"] = "reward"
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name} must be positive (got {value})")
        if self.scale is not None and self.utility == "probability":
            raise UserError("objective.scale is for rewards: set objective.utility=reward")

    @property
    def needs(self) -> frozenset[str]:
        """A reference, and a group where r is computed from one."""
        return frozenset({"reference"} if self.utility == "probability" else {"reference", "list"})

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        sign = self._sign(likelihoods)
        gap = -2 * kept(likelihoods.logratio, mask)  # C - A
        distance = 2 * kept(likelihoods.step_kl, mask)
        loss = self.beta * (sign * gap + (self.beta - sign) * distance) - 2 * kept(likelihoods.reference_logp, mask)
        count = mask.sum(dim=1)

        def mean(values: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
            return kept(values, mask).sum(dim=1).detach() / count.to(values.dtype)

        return LossOutput(
            per_prompt=kept(loss, mask).sum(dim=1) / count.clamp(min=1),
            metrics={
                **ranking_metrics(-0.5 * gap, ordered_pairs(likelihoods.utility, mask)),
                "optimality": mean(0.5 + 0.5 * sign),
                "distance": mean(distance),
            },
        )

    def _sign(self, likelihoods: Likelihoods) -> Float[Tensor, "B K"]:
        """2r - 1 in [-1, 1]."""
        if self.utility == "probability":
            return kept((2 * likelihoods.utility - 1).clamp(-1, 1), likelihoods.mask)
        gap, std = deviations(likelihoods)
        return (gap / (STD_PER_SCALE * std if self.scale is None else self.scale)).clamp(-1, 1)
