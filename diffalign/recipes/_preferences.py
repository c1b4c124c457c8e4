"""What a run says of itself beside its loss: errors against the reference, held-out accuracy, both by noise level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign import metrics
from diffalign._statistics import holdout_accuracy
from diffalign.distributed import World
from diffalign.types import EndpointBatch, Likelihoods, LossOutput

# These are reported by noise level too: an average over t hides a method that works at one end only.
BY_NOISE_LEVEL = ("margin", "implicit_accuracy", "winner_error_gap", "loser_error_gap")


def preference_metrics(likelihoods: Likelihoods, output: LossOutput) -> dict[str, Tensor]:
    """Unreduced metrics [B] of any objective.

    `winner_error_gap` = error of the best candidate minus the reference's on the same draw: above 0, the winner became
    less likely (likelihood displacement); `loser_error_gap` is the same of the worst candidate.
    """
    utility, mask, error = likelihoods.utility, likelihoods.mask, likelihoods.error.detach()
    best = utility.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    last = utility.shape[1] - 1  # at a tie of a pair: the first stands as winner, the second as loser
    worst = last - utility.masked_fill(~mask, torch.inf).flip(1).argmin(dim=1, keepdim=True)

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
) -> Tensor:
    """The margin of every held-out prompt, averaged over the likelihood's draws: [B], the same on every rank."""
    margins = []
    for batch in batches:
        with world.autocast():
            likelihoods = likelihood(policy, reference, batch.to(world.device))
            output = objective(likelihoods)
        margins.append(world.gather({"margin": output.metrics["margin"]})["margin"])
    return torch.cat(margins) if margins else torch.empty(0)


def holdout_metrics(margins: Tensor) -> dict[str, float]:
    """Held-out implicit accuracy (ties half) with its Wilson interval, and the mean margin."""
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
    }
