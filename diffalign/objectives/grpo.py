"""Clipped policy gradients on recorded sampler steps: Flow-GRPO (2505.05470), GRPO-Guard, DDPO (2305.13301), P3O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.objectives._groups import deviations
from diffalign.objectives._lists import kept
from diffalign.types import Likelihoods, LossOutput, UserError

MAX_LOG_RATIO = 60.0  # beyond it exp leaves float32's range; the ratio stays there and has no gradient


@dataclass(frozen=True)
class Grpo:
    """-mean_k min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = exp(logp - logp_old), A the advantage.

    logp_old is that of the weights that drew the steps, so a ratio is 1 until the first update after sampling.

    clip: eps in (0, 1). The ratio is of a mean over latent dimensions, so it hardly leaves 1: the released configs of
        Flow-GRPO have 1e-5 to 1e-3 (1e-4 by default), DDPO's port 1e-4. For likelihood.reduction=sum, 0.2 is PPO's.
    advantages: `group` (u - mean) / (std + 1e-4), u the utility, mean and population std over the prompt's own
        candidates (GRPO); equal utilities give 0. `leave-one-out` u minus the mean of the prompt's others: of a pair
        this is P3O (arXiv 2310.00212) with separate clips, -1/2 (R_1 - R_2) (ratio_1 - ratio_2), which a constant on R
        does not change. `given` takes utility as it stands, for a source that normalises over its whole round or over
        a prompt's history (DDPO; Flow-GRPO's std is by default that of all rewards of a round).
    max_advantage: advantages are held in +-this; 5 in DDPO's and Flow-GRPO's codes. Null: no bound.

    DDPO is clip 1e-4 and no KL. Flow-GRPO's KL is a term: `sum` of this and `{name: kl, weight: 0.004}`. Its code has
    weights of 0.01 to 0.04 and leaves the step's length |dt| out of the KL's variance: w there is w |dt| here, about a
    tenth at its ten steps.

    Metrics, means over a prompt's candidates: `ratio_deviation` |ratio - 1|, `clip_fraction` (the share with
    |ratio - 1| > eps, as the codes count), `advantage` |A|.

    GRPO-Guard (arXiv 2510.22319) is likelihood.ratio=normalized: the ratio is exp of the normalised one, and the loss
    is divided by the step's length |t - t_prev|, which evens out the gradients of the steps.

    Established for DDPO, Flow-GRPO and GRPO-Guard (released codes); P3O is its text's first variant: its joint clip is
    left out, the formula being uncertain. One eps serves both sides; DDPO's buffer of a prompt's rewards is the
    source's matter.
    """

    clip: float = 1e-4
    advantages: Literal["group", "leave-one-out", "given"] = "group"
    max_advantage: float | None = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise UserError(f"objective.clip must lie in (0, 1) (got {self.clip})")
        if self.max_advantage is not None and not self.max_advantage > 0:
            raise UserError(f"objective.max_advantage must be positive (got {self.max_advantage})")

    @property
    def needs(self) -> frozenset[str]:
        """The old likelihoods, and a group where the advantages are computed from one."""
        return frozenset({"old"} if self.advantages == "given" else {"old", "list"})

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        mask = likelihoods.mask
        advantage = self._advantage(likelihoods)
        log_ratio = kept(likelihoods.logp - likelihoods.old_logp, mask)
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
        deviation = (ratio.detach() - 1).abs()
        count = mask.sum(dim=1)

        def mean(values: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
            return kept(values, mask).sum(dim=1) / count.to(values.dtype)  # 0 / 0 is the NaN

        loss = -kept(gain, mask).sum(dim=1) / count.clamp(min=1)
        return LossOutput(
            per_prompt=loss if likelihoods.rate is None else loss * likelihoods.rate,
            metrics={
                "ratio_deviation": mean(deviation),
                "clip_fraction": mean((deviation > self.clip).to(ratio.dtype)),
                "advantage": mean(advantage.abs()),
            },
        )

    def _advantage(self, likelihoods: Likelihoods) -> Float[Tensor, "B K"]:
        mask = likelihoods.mask
        if self.advantages == "given":
            advantage = kept(likelihoods.utility, mask)
        else:
            advantage, std = deviations(likelihoods)
            if self.advantages == "group":
                advantage = advantage / std
            else:
                count = mask.sum(dim=1, keepdim=True)
                advantage = advantage * count / (count - 1).clamp(min=1)
        bound = torch.inf if self.max_advantage is None else self.max_advantage
        return advantage.clamp(-bound, bound)
