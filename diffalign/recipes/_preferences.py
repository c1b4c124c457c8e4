"""What a run says of itself beside its loss: errors against the reference, held-out accuracy, both by noise level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign import diagnostics, metrics
from diffalign._statistics import holdout_accuracy
from diffalign.distributed import World
from diffalign.types import EndpointBatch, Likelihoods, LossOutput

# These are reported by noise level too: an average over t hides a method that works at one end only.
BY_NOISE_LEVEL = (
    "margin",
    "implicit_accuracy",
    "winner_error_gap",
    "loser_error_gap",
    "clip_fraction",  # the released DDIM step at t = 51 meets the clip long before the others
    "flip_rate",
)


# What `holdout_metrics` measures; the last three need a reference.
HOLDOUT_METRICS = (
    "implicit_accuracy",
    "implicit_accuracy_low",
    "implicit_accuracy_high",
    "margin",
    "num_prompts",
    "ranking_accuracy",
    "reference_ranking_accuracy",
    "winner_displacement",
    "share_displaced",
)


def best_and_worst(utility: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places [B, 1] of the candidates of highest and lowest utility [B, K] among those that are there (mask [B, K])."""
    best = utility.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    last = utility.shape[1] - 1  # at a tie of a pair: the first stands as winner, the second as loser
    worst = last - utility.masked_fill(~mask, torch.inf).flip(1).argmin(dim=1, keepdim=True)
    return best, worst


def preference_metrics(likelihoods: Likelihoods, output: LossOutput) -> dict[str, Tensor]:
    """Unreduced metrics [B] of any objective.

    `winner_error_gap` = error of the best candidate minus the reference's on the same draw: above 0, the winner became
    less likely (likelihood displacement); `loser_error_gap` is the same of the worst candidate.
    """
    utility, error = likelihoods.utility, likelihoods.error.detach()
    best, worst = best_and_worst(utility, likelihoods.mask)

    def pick(values: Tensor) -> tuple[Tensor, Tensor]:
        return values.gather(1, best).squeeze(1), values.gather(1, worst).squeeze(1)

    winner, loser = pick(error)
    tie = (utility.gather(1, best) == utility.gather(1, worst)).squeeze(1)
    result = {"loss": output.per_prompt.detach(), "winner_error": winner, "loser_error": loser, "tie_rate": tie.float()}
    if likelihoods.logp_ref is not None:
        result["winner_error_gap"], result["loser_error_gap"] = pick(error + 2 * likelihoods.logp_ref.detach())
    result |= {name: value.float() for name, value in output.metrics.items()}
    if likelihoods.t is not None:
        result["t"] = likelihoods.t
    return result


def summarize(gathered: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars of a global batch: means, and means by noise level."""
    values = {name: value for name, value in gathered.items() if name != "t"}
    scalars = metrics.reduce(values)
    for name in BY_NOISE_LEVEL:
        if name in values and "t" in gathered:
            scalars |= metrics.by_bucket(values[name], gathered["t"], name=name)
    return scalars


@torch.no_grad()
def holdout_margins(
    world: World, policy: Any, reference: Any, likelihood: Any, objective: Any, batches: Iterator[EndpointBatch]
) -> dict[str, Tensor]:
    """What the held-out prompts say, the same on every rank; empty without any.

    `margin` [B]; `utility`, `logp` and, with a reference, `logp_ref` [B, K], NaN where there is no candidate. All are
    means over the likelihood's draws, so that what is compared later are means, not single draws.
    """
    parts: list[dict[str, Tensor]] = []
    for batch in batches:
        with world.autocast():
            likelihoods = likelihood(policy, reference, batch.to(world.device))
            output = objective(likelihoods)
        part = {"margin": output.metrics["margin"], "utility": likelihoods.utility}
        for name, logp in (("logp", likelihoods.logp), ("logp_ref", likelihoods.logp_ref)):
            if logp is not None:
                part[name] = logp.masked_fill(~likelihoods.mask, torch.nan)
        parts.append(world.gather(part))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def holdout_metrics(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Of `holdout_margins`: implicit accuracy (ties half) with its Wilson interval, mean margin, and what became of the
    ranking and of the winners themselves."""
    margins = measured.get("margin", torch.empty(0))
    margins = margins[~margins.isnan()]
    if not len(margins):
        return {}
    accuracy = holdout_accuracy(margins.double().numpy())
    return {
        "holdout/implicit_accuracy": accuracy.rate,
        "holdout/implicit_accuracy_low": accuracy.low,
        "holdout/implicit_accuracy_high": accuracy.high,
        "holdout/margin": float(margins.double().mean()),
        "holdout/num_prompts": float(len(margins)),
    } | _ranking(measured)


def _ranking(measured: Mapping[str, Tensor]) -> dict[str, float]:
    """Ranking accuracy of policy and reference and the winners' displacement, over prompts that somebody won."""
    utility, logp, logp_ref = measured["utility"], measured["logp"], measured.get("logp_ref")
    best, worst = best_and_worst(utility, ~logp.isnan())
    is_won = (utility.gather(1, best) > utility.gather(1, worst)).squeeze(1)

    def errors(values: Tensor) -> tuple[Tensor, Tensor]:
        error = -2 * values[is_won].double()
        return error.gather(1, best[is_won]).squeeze(1), error.gather(1, worst[is_won]).squeeze(1)

    winner, loser = errors(logp)
    result = {"holdout/ranking_accuracy": diagnostics.ranking_accuracy(winner, loser)}
    if logp_ref is not None:
        winner_ref, loser_ref = errors(logp_ref)
        displaced = diagnostics.displacement(winner - winner_ref)
        result |= {
            "holdout/reference_ranking_accuracy": diagnostics.ranking_accuracy(winner_ref, loser_ref),
            "holdout/winner_displacement": displaced.mean,
            "holdout/share_displaced": displaced.share,
        }
    return result
