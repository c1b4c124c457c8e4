"""Sampling of a rollout's prompts with the steps recorded: what was drawn, from what, and how likely it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from diffalign import randomness
from diffalign.data import PromptCond
from diffalign.sampling import SamplerStep, log_density, predict, sample, stochastic_steps
from diffalign.sources._sampled import Mixed, ReferenceDenoiser, stochastic_sampler
from diffalign.types import Setting, UserError

if TYPE_CHECKING:
    from diffalign.sources.rollout import Rollout


class Recorder:
    """Samples `images_per_prompt` images of each prompt in one folded call per step.

    Raises:
        UserError: settings with which no step that could be learned from adds noise.
    """

    def __init__(self, source: Rollout, policy: Any, reference: Any, cond: PromptCond, setting: Setting) -> None:
        self.source, self.policy, self.reference, self.cond, self.setting = source, policy, reference, cond, setting
        self.sampler, self.eta = stochastic_sampler(
            policy.schedule, source.sampling.eta, is_recorded=source.record != "images"
        )
        first, last = (round(part * source.sampling.num_steps) for part in source.sampling.noisy)
        self.noisy_steps = range(first, max(last, first + 1))
        drawn = stochastic_steps(policy.schedule, self.sampler, source.sampling.num_steps, self.eta, self.noisy_steps)
        branch_at = source.branch_at or 0
        if (source.record != "images" or source.branch_at is not None) and not any(i >= branch_at for i in drawn):
            raise UserError(
                "source.sampling draws nothing: no step of source.sampling.noisy, from source.branch_at on, adds noise"
            )
        self.num_shared = sum(i < branch_at for i in drawn)  # recorded steps in which siblings do not differ

    @torch.no_grad()
    def sample(self, prompts: Int64[Tensor, " P"], ids: Int64[Tensor, " P"]) -> dict[str, Tensor]:
        """Of N = P K images, a prompt's together: x [N, R+1, C, h, w], logp_old [N, R], times [R, 2] and, where they
        are recorded, pred_ref and mean_old [N, R, C, h, w]. R counts the steps that add noise, 0 of finished images; x
        has one more where ODE steps follow them.
        """
        source, k, device = self.source, self.source.images_per_prompt, self.policy.device
        settings, dtype = source.sampling, getattr(torch, source.latents)
        rows = ids.repeat_interleave(k)
        numbers = torch.arange(k).repeat(len(ids))
        shape = self.policy.latent_shape(*self.policy.resolution)

        def noise(stream: str, is_shared: bool) -> Tensor:
            draws = torch.zeros_like(numbers) if is_shared else numbers
            return randomness.normal(self.setting.seed, stream, rows, draws, shape).to(device)

        branch_at = -1 if source.branch_at is None else source.branch_at
        cond = {name: x.repeat_interleave(k, dim=0).to(device) for name, x in self.cond.cond(prompts).items()}
        uncond = {name: x.to(device) for name, x in self.cond.uncond(len(rows)).items()}
        reference = ReferenceDenoiser(self.reference, self.policy.schedule)
        of_reference: list[Tensor] = []
        means: list[Tensor] = []
        kept: list[Tensor] = []
        logp: list[Tensor] = []
        times: list[tuple[float, float]] = []

        def record(step: SamplerStep) -> None:
            if source.record == "images" or not bool((step.std > 0).any()):
                return
            if source.record_reference:
                level = torch.full((len(rows),), step.t, dtype=step.xt.dtype, device=device)
                pred = predict(reference, step.xt, level, cond, uncond, settings.cfg_scale)
                of_reference.append(pred.float().cpu())
            if source.record_means:
                means.append(step.mean.float().cpu())
            if not kept:
                kept.append(step.xt.cpu())
            kept.append(step.x_prev.cpu())
            density = log_density(step.x_prev, step.mean, step.std)
            logp.append(density.flatten(1).mean(dim=1).float().cpu())
            times.append((step.t, step.s))

        denoiser: Any = self.policy
        if source.sample_from != "policy":
            denoiser = reference
        if source.sample_from == "both":
            denoiser = Mixed(self.policy, denoiser, (numbers == k - 1).to(device))
        with self.setting.autocast():
            x0 = sample(
                denoiser,
                cond,
                uncond,
                noise("start", branch_at >= 0),
                sampler=self.sampler,
                num_steps=settings.num_steps,
                cfg_scale=settings.cfg_scale,
                eta=self.eta,
                step_noise=lambda index: noise(f"step {index}", index < branch_at),
                on_step=record,
                round_to=dtype,
                noisy_steps=self.noisy_steps if self.eta else None,
            )
        if not kept:
            nothing = {"logp_old": torch.empty(len(rows), 0), "times": torch.empty(0, 2, dtype=torch.float64)}
            return {"x": x0.cpu().to(dtype)[:, None], **nothing}
        latents = torch.stack(kept, dim=1).to(dtype)
        if not torch.equal(kept[-1], x0.cpu()):  # ODE steps after the last recorded one: the picture is x0
            latents = torch.cat([latents, x0.cpu().to(dtype)[:, None]], dim=1)
        result = {"x": latents, "logp_old": torch.stack(logp, dim=1), "times": torch.tensor(times, dtype=torch.float64)}
        also = {"pred_ref": of_reference, "mean_old": means}
        return result | {name: torch.stack(values, dim=1) for name, values in also.items() if values}
