"""Pairwise preference objectives on log-ratios, as slots; with its defaults, Diffusion-DPO (arXiv 2311.12908)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu, softplus

from diffalign.objectives._draws import unbiased_square
from diffalign.objectives._pairs import pair_masks, split_pair
from diffalign.types import Likelihoods, LossOutput, UserError

LINKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda margin: softplus(-margin),
    "hinge": lambda margin: relu(1 - margin),
}


@dataclass(frozen=True)
class Pair:
    """labels(link(margin)), margin = reward_w - reward_l - target, reward = beta (logp - reference_strength logp_ref).

    With logp = -1/2 mean squared error and the defaults this is the released Diffusion-DPO loss,
    -log sigmoid(-beta/2 (d_w - d_l)), d = error minus the reference's error.

    beta: per unit of logp (a mean over latent dimensions); 2000 to 5000 in the paper, 5000 in its code. METHODS.md and
        `diffalign convert-beta` convert the papers' and code bases' numbers.
    beta_loser: the loser's own beta (split beta of arXiv 2406.07327); null is `beta`.
    link: `logistic`; `hinge` max(0, 1 - margin) (SLiC-HF, arXiv 2305.10425); `square` (margin - 1/2)^2 / beta_nats^2,
        which is IPO's (logratio_w - logratio_l - 1/(2 beta))^2 (arXiv 2310.12036). A square of one noisy draw adds
        the draw's variance, which grows away from the reference and so holds the policy there: with likelihood.draws
        of 2 or more it is the product of different draws, which is unbiased. The logistic link has the same bias,
        weaker, and no such remedy: it takes the mean of the draws (tests/test_mixture_world.py measures both).
    labels: `hard` trusts the label. `smooth` (cDPO) expects a share `flip_rate` of wrong labels; `robust` is the loss
        whose mean over such flips is the hard loss (arXiv 2403.00409), unbounded below. `soft` takes the winner's
        utility as its probability to win (utilities that add to 1) or, given `temperature`, computes it from them.
        `scaled` multiplies the margin by sensitivity (2 P - 1), P that of `soft`: the label half of SmPO-Diffusion
        (arXiv 2506.02698); its other half, noise by inversion, is left out.
    flip_rate: eps in [0, 0.5), for `smooth` and `robust`.
    temperature: of Bradley-Terry labels, P = sigmoid((utility_w - utility_l) / temperature), for `soft` and `scaled`.
    sensitivity: > 0, for `scaled`; 10 is SmPO's code, where a certain label has ten times the beta.
    poly: alpha >= -1 of Poly-DPO (arXiv 2604.24953): adds alpha (1 - sigmoid(margin)) to the logistic link, which for
        alpha > 0 weighs pairs near the border more (noisy labels), for alpha < 0 less. 0 is DPO.
    margin: target added to what the reward gap must exceed, in units of reward; SimPO's gamma (arXiv 2405.14734).
    score_weights: scorer -> weight of a target that follows the data's scores, (1/w) sum_k weight_k (R_k,w - R_k,l)
        with w = 1 - sum_k weight_k, while the reward gap is divided by w too (MODPO, arXiv 2310.03708).
    reference_strength: gamma in [0, 1]; 0 needs no reference (SimPO, CPO), between them DPO^gamma (arXiv 2405.19534).
    divergence: what the reward is of the log-ratio u in nats: `reverse-kl` u, `forward-kl` 1 - exp(-u), `js` log
        (2 sigmoid(u)), `alpha` (1 - exp(-alpha u))/alpha (f-DPO, arXiv 2309.16240, with constants that make the reward
        0 at the reference). All but js have slope 1 there; js has 1/2.
    alpha: of the alpha divergence, in (0, 1]; 1 is forward KL, toward 0 reverse KL.
    nats: how many nats one unit of logp is worth; matters to `divergence` and `square` only. About 8 x latent
        dimensions for a 1000-step VP schedule (beta 5000 on 4 x 64 x 64 is 0.038 per nat), 1 under reduction=sum.
    kl_correction: alpha of TDPO2 (arXiv 2404.11999): margin + alpha beta (stop-grad kl_w - kl_l), kl the step KL to the
        reference. 0 is DPO.
    ratio_clip: eps in (0, 1): each image's ratio to the reference is held in [1 - eps, 1 + eps], and an image outside,
        on either side, gets no gradient at all. D3PO (arXiv 2311.13231) and SPO (2406.04314) have 0.1, with beta 0.1
        and 10, on the mean log-density of a recorded step (likelihood.name=step). Watch the metric `clip_fraction`,
        the share of the two images outside: the loss itself moves by at most beta log((1 + eps) / (1 - eps)).

    Differs from the papers/codes: a tie that the data keeps is a label of 1/2 (loss symmetric in the two images), where
    the Salesforce script drops ties and the diffusers script lets jpg_0 win. D3PO's code gives a tie ln 2 and no
    gradient: mask tied pairs (their loss is then 0). TDPO1 (nothing detached) is left out: its margin is linear in the
    prediction, so nothing bounds it.
    """

    beta: float = 5000.0
    beta_loser: float | None = None
    link: Literal["logistic", "hinge", "square"] = "logistic"
    labels: Literal["hard", "smooth", "robust", "soft", "scaled"] = "hard"
    flip_rate: float = 0.0
    temperature: float | None = None
    sensitivity: float = 10.0
    poly: float = 0.0
    margin: float = 0.0
    score_weights: dict[str, float] = field(default_factory=dict)
    reference_strength: float = 1.0
    divergence: Literal["reverse-kl", "forward-kl", "js", "alpha"] = "reverse-kl"
    alpha: float = 0.5
    nats: float = 1.0
    kl_correction: float = 0.0
    ratio_clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "nats", "beta_loser", "temperature", "sensitivity"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"objective.{name} must be positive (got {value})")
        if not 0 <= self.flip_rate < 0.5:
            raise UserError(f"objective.flip_rate must lie in [0, 0.5) (got {self.flip_rate})")
        if self.flip_rate and self.labels not in ("smooth", "robust"):
            raise UserError(
                f"objective.flip_rate has no effect with {self.labels} labels: set objective.labels=smooth or robust"
            )
        if self.temperature is not None and self.labels not in ("soft", "scaled"):
            raise UserError("objective.temperature is for soft labels: set objective.labels=soft or scaled")
        if self.poly < -1 or (self.poly and self.link != "logistic"):
            raise UserError(f"objective.poly must be at least -1 and is for objective.link=logistic (got {self.poly})")
        if not 0 <= self.reference_strength <= 1:
            raise UserError(f"objective.reference_strength must lie in [0, 1] (got {self.reference_strength})")
        if not 0 < self.alpha <= 1:
            raise UserError(f"objective.alpha must lie in (0, 1] (got {self.alpha})")
        if not 0 <= self.kl_correction <= 1:
            raise UserError(f"objective.kl_correction must lie in [0, 1] (got {self.kl_correction})")
        if self.ratio_clip is not None and not 0 < self.ratio_clip < 1:
            raise UserError(f"objective.ratio_clip must lie in (0, 1) (got {self.ratio_clip})")
        if self.ratio_clip is not None and self.reference_strength != 1:
            raise UserError("objective.ratio_clip bounds the ratio to the reference: leave reference_strength at 1")
        if not 0 <= sum(self.score_weights.values()) < 1:
            raise UserError("objective.score_weights must add to less than 1: the rest is the preference's own weight")

    @property
    def needs(self) -> frozenset[str]:
        """What the slots in use read."""
        needs = {"pair"}
        if self.reference_strength or self.kl_correction:
            needs.add("reference")
        return frozenset(needs | ({"scores"} if self.score_weights else set()))

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        valid, tie = pair_masks(likelihoods)
        reward_gap, margin = self._margin(likelihoods)
        for_winner, for_loser = self._label_weights(likelihoods.utility, tie)
        if self.link == "square":
            margins = [self._margin(draw)[1] for draw in likelihoods.each_draw()]
            won, lost = (unbiased_square([sign * each - 0.5 for each in margins]) for sign in (1, -1))
            loss = (for_winner * won + for_loser * lost) * (self.nats / self.beta) ** 2
        else:
            link = LINKS[self.link]
            loss = for_winner * link(margin) + for_loser * link(-margin)
            if self.poly:
                loss = loss + self.poly * (for_winner * torch.sigmoid(-margin) + for_loser * torch.sigmoid(margin))
        accuracy = 0.5 * (torch.sign(reward_gap) + 1)  # an exact tie of the model counts 1/2
        nothing = torch.full_like(margin, float("nan"))
        metrics = {
            "margin": torch.where(valid, reward_gap, nothing).detach(),
            "implicit_accuracy": torch.where(valid & ~tie, accuracy, nothing).detach(),
        }
        if self.ratio_clip is not None:
            low, high = self._log_bounds
            is_outside = (likelihoods.logratio < low) | (likelihoods.logratio > high)
            metrics["clip_fraction"] = torch.where(valid, is_outside.to(margin.dtype).mean(dim=1), nothing)
        return LossOutput(per_prompt=torch.where(valid, loss, torch.zeros_like(loss)), metrics=metrics)

    @property
    def _log_bounds(self) -> tuple[float, float]:
        """The logarithms of 1 - eps and 1 + eps: clamping these is clamping the ratio, without its overflow."""
        assert self.ratio_clip is not None
        return math.log1p(-self.ratio_clip), math.log1p(self.ratio_clip)

    def _margin(self, likelihoods: Likelihoods) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """(reward_w - reward_l, what the link sees of it)."""
        winner, loser = split_pair(self._reward(likelihoods, self.beta), likelihoods.utility)
        if self.beta_loser is not None:
            _, loser = split_pair(self._reward(likelihoods, self.beta_loser), likelihoods.utility)
        margin = winner - loser - self.margin
        if self.kl_correction:
            kl_w, kl_l = split_pair(likelihoods.step_kl, likelihoods.utility)
            margin = margin + self.kl_correction * self.beta * (kl_w.detach() - kl_l)
        if self.score_weights:
            margin = (margin - self._score_gap(likelihoods)) / (1 - sum(self.score_weights.values()))
        if self.labels == "scaled":
            margin = margin * self.sensitivity * (2 * self._win_probability(likelihoods.utility) - 1)
        return winner - loser, margin

    def _reward(self, likelihoods: Likelihoods, beta: float) -> Float[Tensor, "B 2"]:
        """beta phi(u): phi acts on nats, beta is per unit of logp."""
        logratio = likelihoods.logp
        if self.reference_strength == 1:
            logratio = likelihoods.logratio  # exactly 0 at the reference
            if self.ratio_clip is not None:
                logratio = logratio.clamp(*self._log_bounds)
        elif self.reference_strength:
            logratio = logratio - self.reference_strength * likelihoods.reference_logp
        if self.divergence == "reverse-kl":
            return beta * logratio
        u = self.nats * logratio
        if self.divergence == "js":
            return beta / self.nats * (math.log(2) - softplus(-u))
        alpha = 1.0 if self.divergence == "forward-kl" else self.alpha
        return beta / self.nats * -_bounded_expm1(-alpha * u) / alpha

    def _score_gap(self, likelihoods: Likelihoods) -> Float[Tensor, " B"]:
        gap = torch.zeros_like(likelihoods.utility[:, 0])
        for name, weight in self.score_weights.items():
            winner, loser = split_pair(likelihoods.score(name), likelihoods.utility)
            gap = gap + weight * (winner - loser)
        return gap

    def _label_weights(self, utility: Tensor, tie: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of link(margin) and link(-margin): (1, 0) for a trusted label, a half each where nobody won."""
        if self.labels == "soft":
            right = self._win_probability(utility)
        elif self.labels == "robust":
            right = torch.full_like(utility[:, 0], (1 - self.flip_rate) / (1 - 2 * self.flip_rate))
        else:
            right = torch.full_like(utility[:, 0], 1 - self.flip_rate)
        right = torch.where(tie, 0.5, right)
        return right, 1 - right

    def _win_probability(self, utility: Float[Tensor, "B 2"]) -> Float[Tensor, " B"]:
        winner, loser = split_pair(utility, utility)
        return winner if self.temperature is None else torch.sigmoid((winner - loser) / self.temperature)


def _bounded_expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued by its tangent above x = 30: a far-off winner keeps a finite loss and a gradient."""
    top = 30.0
    return torch.where(x > top, math.exp(top) * (1 + x - top), torch.expm1(x.clamp(max=top)))
