"""Samplers over any denoiser: DDIM, DDPM and Euler for variance-preserving models, Euler and an SDE for rectified flow.

Every sampler is a grid of (t, s) steps, an eta and the schedule's `reverse_step`:
- "ddim" (arXiv 2010.02502) with eta 0 (deterministic) to 1 (ancestral variance);
- "ddpm" (2006.11239) is DDIM with eta 1 that ends at clean data: the two posteriors are the same Gaussian;
- "euler" (2206.00364, k-diffusion): on y = x/alpha its step adds (sigma_s/alpha_s - sigma_t/alpha_t) noise, which is
  DDIM's; its own are the fractional "linspace" grid, the end at clean data and the size of the first noise;
- "flow-euler" (2403.03206) and "flow-sde" (Flow-GRPO, 2505.05470; eta is its noise level, 0.7 there).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.schedule import RectifiedFlow, VariancePreserving
from diffalign.types import Denoiser, Schedule, UserError

VP_SAMPLERS = ("ddim", "ddpm", "euler")
FLOW_SAMPLERS = ("flow-euler", "flow-sde")
EULER_MIN_ABAR = 2.0**-24  # in place of 0: sigma/alpha must be finite with zero terminal SNR; the value of diffusers
SAMPLERS = ("default", *VP_SAMPLERS, *FLOW_SAMPLERS)


@dataclass(frozen=True)
class SamplerStep:
    """One finished step from time t to s, all a log-density needs: x_prev ~ N(mean, std^2)."""

    index: int
    num_steps: int
    t: float
    s: float
    xt: Tensor  # [N, C, H, W], as the following tensors
    pred_x0: Tensor
    x_prev: Tensor
    mean: Tensor
    std: Tensor  # [N, 1, 1, 1], zero for a deterministic step


@dataclass(frozen=True)
class _Plan:
    schedule: VariancePreserving | RectifiedFlow
    steps: list[tuple[float, float]]
    eta: float
    first_scale: float  # standard deviation of the first x_t


def predict(
    denoiser: Denoiser,
    xt: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    cfg_scale: float,
    detach_uncond: bool = False,
) -> Tensor:
    """The prediction with classifier-free guidance (arXiv 2207.12598), uncond + scale * (cond - uncond): [N, C, H, W].

    Both branches go through the network in one call of 2N rows, uncond first; scale 1 or no `uncond` takes one of N.
    `detach_uncond` stops the gradient through the unconditional branch.

    Raises:
        UserError: cond and uncond differ in their keys.
    """
    if uncond is None or cfg_scale == 1:
        return denoiser(xt, t, cond)
    if cond.keys() != uncond.keys():
        raise UserError(f"cond has the keys {sorted(cond)}, uncond has {sorted(uncond)}: encode both the same way")
    both = {key: torch.cat([uncond[key], cond[key]]) for key in cond}
    pred_uncond, pred_cond = denoiser(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
    if detach_uncond:
        pred_uncond = pred_uncond.detach()
    return pred_uncond + cfg_scale * (pred_cond - pred_uncond)


def _resolve(schedule: Schedule, sampler: str, eta: float) -> str:
    """The sampler's name, checked against the schedule and eta."""
    legal = FLOW_SAMPLERS if isinstance(schedule, RectifiedFlow) else VP_SAMPLERS
    name = legal[0] if sampler == "default" else sampler
    if name not in legal:
        raise UserError(f"sampler={sampler!r} does not fit this model's schedule; legal: default, {', '.join(legal)}")
    if eta < 0 or (eta != 0 and name not in ("ddim", "flow-sde")):
        raise UserError(f"eta={eta} does not fit sampler {name}: only ddim and flow-sde take an eta above 0")
    if eta == 0 and name == "flow-sde":
        raise UserError("sampler flow-sde needs an eta above 0, for instance 0.7; use flow-euler for the ODE")
    if eta > 1 and name == "ddim":
        raise UserError(f"eta={eta}: ddim takes 0 (deterministic) to 1 (ancestral)")
    return name


def _plan(schedule: Schedule, sampler: str, num_steps: int, eta: float) -> _Plan:
    name = _resolve(schedule, sampler, eta)
    if isinstance(schedule, RectifiedFlow):
        return _Plan(schedule, schedule.timesteps(num_steps), eta, 1.0)
    assert isinstance(schedule, VariancePreserving), schedule
    if name == "ddim":
        return _Plan(schedule, schedule.timesteps(num_steps), eta, 1.0)
    if name == "ddpm":
        return _Plan(schedule, schedule.timesteps(num_steps, is_final_clean=True), 1.0, 1.0)
    abar = schedule.alphas_cumprod
    schedule = replace(schedule, alphas_cumprod=torch.where(abar == 0, EULER_MIN_ABAR, abar))
    steps = schedule.timesteps(num_steps, is_final_clean=True, is_rounded=False)
    first = torch.tensor(steps[0][0], dtype=torch.float64)
    scale = 1.0 if schedule.spacing == "leading" else schedule.alpha_sigma(first)[1].item()
    return _Plan(schedule, steps, 0.0, scale)


def log_density(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_prev; mean, std^2) of every element, constants included; the tensors broadcast, std is positive."""
    return -0.5 * ((x_prev - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def grid(schedule: Schedule, sampler: str, num_steps: int, eta: float) -> list[tuple[float, float]]:
    """The (t, s) of every step that `sample` takes, from noise to data.

    Raises:
        UserError: the sampler, eta or num_steps do not fit the schedule.
    """
    return _plan(schedule, sampler, num_steps, eta).steps


def stochastic_steps(
    schedule: Schedule, sampler: str, num_steps: int, eta: float, noisy_steps: range | None = None
) -> list[int]:
    """The indices of the steps of `sample` that add noise; the last one of DDIM often has none to add.

    Raises:
        UserError: the sampler, eta or num_steps do not fit the schedule.
    """
    plan, found = _plan(schedule, sampler, num_steps, eta), []
    zero = torch.zeros(1, 1, 1, 1)
    for index, (t, s) in enumerate(plan.steps):
        if noisy_steps is None or index in noisy_steps:
            _, std = plan.schedule.reverse_step(zero, zero, torch.tensor([t]), torch.tensor([s]), plan.eta)
            if bool(std > 0):
                found.append(index)
    return found


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    noise: Tensor,
    *,
    sampler: str = "default",
    num_steps: int,
    cfg_scale: float,
    eta: float = 0.0,
    step_noise: Callable[[int], Tensor] | None = None,
    on_step: Callable[[SamplerStep], None] | None = None,
    round_to: torch.dtype | None = None,
    noisy_steps: range | None = None,
) -> Tensor:
    """Draws x0 [N, C, H, W] from standard normal `noise` of that shape, in its dtype, float32 at least.

    `sampler` is one of SAMPLERS; "default" is ddim, or flow-euler for rectified flow. `step_noise(index)` gives the
    standard normal noise [N, C, H, W] of a stochastic step, so that the caller addresses it. `on_step` sees every step,
    for recording and for progress; nothing is kept otherwise. `round_to` rounds every x_t to that dtype as it is drawn,
    so that what is stored in it is what was sampled. `noisy_steps` are the steps that add noise, by index; the others
    have eta 0 (default: all).

    Raises:
        UserError: the sampler, eta or num_steps do not fit the schedule, or a stochastic sampler has no step_noise.
    """
    plan = _plan(denoiser.schedule, sampler, num_steps, eta)
    if plan.eta > 0 and step_noise is None:
        raise UserError(f"sampler={sampler!r} with eta={plan.eta} is stochastic: pass step_noise")
    dtype = torch.promote_types(noise.dtype, torch.float32)

    def rounded(x: Tensor) -> Tensor:
        return x if round_to is None else x.to(round_to).to(dtype)

    xt = rounded(noise.to(dtype) * plan.first_scale)
    for index, (t, s) in enumerate(plan.steps):
        t_rows, s_rows = (torch.full((len(xt),), end, dtype=dtype, device=xt.device) for end in (t, s))
        pred = predict(denoiser, xt, t_rows, cond, uncond, cfg_scale).to(dtype)
        eta = plan.eta if noisy_steps is None or index in noisy_steps else 0.0
        mean, std = plan.schedule.reverse_step(pred, xt, t_rows, s_rows, eta)
        x_prev = mean
        if eta > 0:
            assert step_noise is not None
            x_prev = mean + std * step_noise(index).to(xt)
        x_prev = rounded(x_prev)
        if on_step is not None:
            pred_x0 = plan.schedule.to_x0(pred, xt, t_rows)
            on_step(SamplerStep(index, len(plan.steps), t, s, xt, pred_x0, x_prev, mean, std))
        xt = x_prev
    return xt
