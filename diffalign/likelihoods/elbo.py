"""The denoising ELBO as a log-likelihood: one noise level and one noise per prompt, policy and reference on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import randomness
from diffalign.types import Denoiser, EndpointBatch, Likelihoods, Maps, Reference, UserError, fold


@dataclass(frozen=True)
class Elbo:
    """logp = -1/2 w(t) mean((pred - target)^2), target in the model's native parameterisation.

    shared_noise: winner and loser see the same noise, as in every released pair method. Independent noise is not only
        noisier, it biases the learned shift toward zero (errors in variables; tests/test_gaussian_world.py).
    t_distribution: `native` is the family's training distribution (uniform for VP, shifted logit-normal for rectified
        flow), `uniform` is uniform in t. One t per prompt, shared by its candidates.
    t_quantiles: the part of that distribution that is drawn from: (0, 1) is all, (0.5, 1) the noisier half. On the
        embedded models a part was no better than all (METHODS.md).
    weighting: `constant` (the released codes), `elbo`, `min-snr` (arXiv 2303.09556), or `tilt`, the weight under which
        one KL-tilted density is optimal at every t (reference world N(0, I), linear reward).
    draws: independent (t, noise) draws per prompt and step, averaged; objectives with a square (IPO, SPPO) multiply two
        of them instead. Cost and activation memory grow in proportion.
    reduction: over latent dimensions; `mean` is the convention of beta in the thousands, `sum` makes beta nats.
    maps: keep the errors of single latent pixels too, for objectives with masks; costs no forward.
    overlap: keep how alike the candidates' residuals are, for the safeguarded pair; costs no forward.
    seed: with the batch's ids and visits it addresses every draw.
    """

    takes: ClassVar[str] = "images"

    shared_noise: bool = True
    t_distribution: Literal["native", "uniform"] = "native"
    t_quantiles: tuple[float, float] = (0.0, 1.0)
    weighting: Literal["constant", "elbo", "min-snr", "tilt"] = "constant"
    draws: int = 1
    reduction: Literal["mean", "sum"] = "mean"
    maps: bool = False
    overlap: bool = False
    seed: int = 0

    @property
    def gives(self) -> frozenset[str]:
        """What objectives may ask of it."""
        return frozenset({"logp"} | ({"maps"} if self.maps else set()) | ({"overlap"} if self.overlap else set()))

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"likelihood.draws must be at least 1 (got {self.draws})")
        low, high = self.t_quantiles
        if not 0 <= low < high <= 1:
            raise UserError(f"likelihood.t_quantiles must be two numbers 0 <= low < high <= 1 (got {low}, {high})")

    def draw(self, policy: Denoiser, batch: EndpointBatch) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B M K C H W"]]:
        """Noise levels and noises of the batch's visit, from the addresses alone."""
        num_candidates, latent = batch.x0.shape[1], batch.x0.shape[2:]
        ids, device = batch.ids.cpu(), batch.x0.device
        shape = latent if self.shared_noise else (num_candidates, *latent)
        times, noises = [], []
        for m in range(self.draws):
            numbers = batch.visits.cpu() * self.draws + m
            u = randomness.uniform(self.seed, "t", ids, numbers)
            low, high = self.t_quantiles
            if (low, high) != (0, 1):
                u = low + (high - low) * u
            times.append(policy.schedule.sample_t(u, self.t_distribution))
            noise = randomness.normal(self.seed, "noise", ids, numbers, shape)
            noises.append(noise.unsqueeze(1).expand(-1, num_candidates, *latent) if self.shared_noise else noise)
        return torch.stack(times, dim=1).to(device), torch.stack(noises, dim=1).to(device)

    def __call__(self, policy: Denoiser, reference: Reference, batch: EndpointBatch) -> Likelihoods:
        """Runs policy and reference once each on the same B*draws*K inputs.

        Errors are float32 whatever the network runs in: beta multiplies their rounding by thousands.
        """
        t, noise = self.draw(policy, batch)
        num_prompts, num_draws, num_candidates = noise.shape[:3]
        axes = (num_prompts, num_draws, num_candidates)

        def spread(x: Tensor) -> Tensor:  # [B, K, ...] -> [B*M*K, ...]
            return fold(x.unsqueeze(1).expand(num_prompts, num_draws, *x.shape[1:]).flatten(0, 1))

        schedule = policy.schedule
        times = t.unsqueeze(-1).expand(axes).flatten()
        noise, x0 = noise.flatten(0, 2), spread(batch.x0)
        cond: Mapping[str, Tensor] = {key: spread(value) for key, value in batch.cond.items()}
        xt, target = schedule.add_noise(x0, noise, times), schedule.target(x0, noise, times)
        weight = schedule.weight(times, self.weighting)

        def half_error(pred: Tensor, other: Tensor) -> Tensor:
            square = (pred.float() - other.float()).square().flatten(1)
            error = square.mean(dim=1) if self.reduction == "mean" else square.sum(dim=1)
            return (0.5 * weight * error).reshape(axes)

        pred_ref = reference.predict(xt, times, cond, batch.ids)
        pred = policy(xt, times, cond)
        by_draw = {"logp": -half_error(pred, target)}
        if pred_ref is not None:
            by_draw |= {"logp_ref": -half_error(pred_ref, target), "kl": half_error(pred, pred_ref)}
        overlap: Tensor | None = None
        if self.overlap:
            residual = (pred.detach().float() - target.float()).flatten(1).unflatten(0, axes)
            overlap = residual @ residual.mT / residual.shape[-1]
        maps: list[Maps] = []
        if self.maps:
            scale = 0.5 * weight * (1 if self.reduction == "mean" else x0[0].numel())
            x0_ref = None if pred_ref is None else schedule.to_x0(pred_ref, xt, times)
            maps = _maps(batch, axes, scale[:, None, None], pred, pred_ref, target, x0_ref)
        more = [
            {"maps": maps[m] if maps else None, "overlap": None if overlap is None else overlap[:, m]}
            for m in range(num_draws)
        ]
        return _likelihoods(batch, by_draw, t, more)


def _maps(
    batch: EndpointBatch,
    axes: tuple[int, int, int],
    scale: Float[Tensor, "N 1 1"],
    pred: Float[Tensor, "N C H W"],
    pred_ref: Float[Tensor, "N C H W"] | None,
    target: Float[Tensor, "N C H W"],
    x0_ref: Float[Tensor, "N C H W"] | None,
) -> list[Maps]:
    """Of every draw; `scale` times the mean square over channels."""

    def half_map(first: Tensor, second: Tensor) -> Float[Tensor, "B M K H W"]:
        return (scale * (first.float() - second.float()).square().mean(dim=1)).unflatten(0, axes)

    found = {"logp": -half_map(pred, target)}
    if pred_ref is not None and x0_ref is not None:
        mean = x0_ref.float().mean(dim=(2, 3), keepdim=True)
        activation = (x0_ref.float() - mean).square().mean(dim=1).sqrt().detach().unflatten(0, axes)
        found |= {"logp_ref": -half_map(pred_ref, target), "kl": half_map(pred, pred_ref), "activation": activation}
    return [Maps(**{name: x[:, m] for name, x in found.items()}, region=batch.region) for m in range(axes[1])]


def _likelihoods(
    batch: EndpointBatch,
    by_draw: Mapping[str, Float[Tensor, "B M K"]],
    t: Float[Tensor, "B M"],
    more: Sequence[Mapping[str, Any]],
) -> Likelihoods:
    """Means over the draws and, where there are several, each draw's own numbers; `more` is what each has besides."""

    def made(values: Mapping[str, Tensor], t: Tensor, **more: Any) -> Likelihoods:
        logp, logp_ref, kl = (values.get(name) for name in ("logp", "logp_ref", "kl"))
        assert logp is not None
        return Likelihoods(logp, logp_ref, batch.utility, batch.mask, t, kl=kl, scores=batch.scores, **more)

    each = [made({name: x[:, m] for name, x in by_draw.items()}, t[:, m], **more[m]) for m in range(t.shape[1])]
    if len(each) == 1:
        return each[0]
    return made({name: x.mean(dim=1) for name, x in by_draw.items()}, t.mean(dim=1), draws=tuple(each))
