"""The log-density of recorded sampler steps: what a trajectory is worth under the policy and under the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.sampling import log_density, predict
from diffalign.types import Denoiser, Likelihoods, Reference, Schedule, StepBatch, UserError


@dataclass(frozen=True)
class Step:
    """logp = sum over steps of weight * mean over latent dimensions of log N(x_prev; mean, std^2), as in the released
    codes of D3PO (arXiv 2311.13231), SPO (2406.04314) and Flow-GRPO (2505.05470).

    Mean and std are the sampler's own (`Schedule.reverse_step`: DDIM with eta, or the flow SDE), from the prediction
    with the classifier-free guidance that the steps were drawn with. A step without noise (std 0, an ODE step) has no
    density and counts nothing. Candidates that left the same x_t share one network evaluation. A step that is not there
    has weight 0 and times of a step: from t = 0 there is none, its mean is no number and a weight of 0 keeps that.

    uncond: whether the gradient goes through the unconditional branch of guidance too (`trained`, as in D3PO and SPO)
        or not (`detached`, as in Flow-GRPO's code).
    reduction: `mean` is the released codes' and makes D3PO's 0.1 and SPO's 10 what they are there; `sum` is the joint
        log-density, whose telescoped ratios are exact, of values in the thousands. The batch's logp_old is of means and
        is multiplied by the number of latent dimensions.
    ratio: `density`, or GRPO-Guard's `normalized` (arXiv 2510.22319, as in its released code): std * (log-ratio to the
        weights that drew the step + |mean - mean_old|^2 / (2 std^2)), which is (mean - mean_old) . noise, noise the
        draw's own. Its mean is 0, and its scale does not grow as a step's noise vanishes, so that late steps do not
        outweigh early ones. logp and logp_ref are then these ratios, and logp_old is 0; the KL stays as it is, and
        `rate` is 1 / |t - t_prev|. Needs source.record_means=true.

    The KL between the policies' steps is weight * mean((mean - mean_ref)^2) / (2 std^2): the variances are the same.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"logp", "old"})
    takes: ClassVar[str] = "steps"

    uncond: Literal["trained", "detached"] = "trained"
    reduction: Literal["mean", "sum"] = "mean"
    ratio: Literal["density", "normalized"] = "density"

    @property
    def needs(self) -> frozenset[str]:
        """The means of the draws, where ratios are normalised by them."""
        return frozenset({"means"} if self.ratio == "normalized" else ())

    def __call__(self, policy: Denoiser, reference: Reference, batch: StepBatch) -> Likelihoods:
        """Policy and reference once each on the same B*J*S rows, twice as many with guidance; all else is float32, or
        float64 where the latents are."""
        axes = batch.xt.shape[:3]  # B, J, S
        dtype = torch.promote_types(batch.xt.dtype, torch.float32)
        xt = batch.xt.to(dtype).flatten(0, 2)
        t, t_prev = (times.unsqueeze(1).expand(axes).flatten() for times in (batch.t, batch.t_prev))
        cond = _spread(batch.cond, axes)
        uncond = None if batch.uncond is None else _spread(batch.uncond, axes)
        is_detached = self.uncond == "detached"

        def predicted(denoiser: Denoiser) -> Float[Tensor, "N C H W"]:
            return predict(denoiser, xt, t, cond, uncond, batch.cfg_scale, detach_uncond=is_detached)

        def moments(pred: Tensor) -> tuple[Float[Tensor, "B J S D"], Float[Tensor, "B J S 1"]]:
            mean, std = policy.schedule.reverse_step(pred.to(dtype), xt, t, t_prev, batch.eta)
            return mean.reshape(*axes, -1), std.reshape(*axes, 1)

        mean_ref = None  # before the policy, whose activations then do not lie beside the reference's
        if batch.pred_ref is not None:
            mean_ref, _ = moments(batch.pred_ref.flatten(0, 2))
        elif "reference" in getattr(reference, "gives", ()):
            mean_ref, _ = moments(predicted(_Predicts(reference, policy.schedule, batch.ids)))
        mean, std = moments(predicted(policy))
        is_drawn = std > 0
        safe = std.where(is_drawn, std.new_ones(()))
        weight = batch.weight * is_drawn.squeeze(-1)
        x_prev = batch.x_prev.to(dtype).flatten(3)

        def reduced(values: Float[Tensor, "B J S D"]) -> Float[Tensor, "B K"]:
            each = values.mean(dim=-1) if self.reduction == "mean" else values.sum(dim=-1)
            return (weight * each).sum(dim=-1)

        is_normalized = self.ratio == "normalized"
        if is_normalized:
            if batch.mean_old is None:
                raise UserError("likelihood.ratio=normalized needs the draws' means: set source.record_means=true")
            mean_old = batch.mean_old.to(dtype).flatten(3)
            noise = (x_prev - mean_old) / safe

        def logp_of(mean: Tensor) -> Float[Tensor, "B K"]:
            return reduced((mean - mean_old) * noise if is_normalized else log_density(x_prev, mean, safe))

        logp_old = batch.logp_old
        if logp_old is not None and is_normalized:
            logp_old = torch.zeros_like(logp_old)
        elif logp_old is not None and self.reduction == "sum":
            logp_old = logp_old * x_prev.shape[-1]
        return Likelihoods(
            logp=logp_of(mean),
            logp_ref=None if mean_ref is None else logp_of(mean_ref),
            utility=batch.utility,
            mask=batch.mask,
            t=batch.t.mean(dim=1),
            kl=None if mean_ref is None else reduced(0.5 * ((mean - mean_ref) / safe).square()),
            scores=batch.scores,
            logp_old=logp_old,
            rate=1 / (batch.t - batch.t_prev).abs().mean(dim=1) if is_normalized else None,
        )


def _spread(cond: Mapping[str, Tensor], axes: tuple[int, ...]) -> dict[str, Tensor]:
    """[B, ...] to a row for each of [B, J, S]."""
    rows = {}
    for name, value in cond.items():
        rows[name] = value[:, None, None].expand(*axes, *value.shape[1:]).flatten(0, 2)
    return rows


@dataclass
class _Predicts:
    """The reference as a denoiser, so that guidance is one piece of code."""

    reference: Reference
    schedule: Schedule
    ids: Tensor

    def __call__(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        pred = self.reference.predict(xt, t, cond, self.ids)
        assert pred is not None, "a reference that gives none says so in `gives`"
        return pred
