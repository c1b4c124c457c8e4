"""Noise schedules: how data becomes noise and back, for variance-preserving diffusion and for rectified flow.

`t` in [0, 1] is 0 for clean data and 1 for noise. Coefficients are float64 inside; results have the dtype of the
tensors they act on, float32 at least. `t` is [N] (or a scalar) and broadcasts over the leading axes of [N, C, H, W].

Sources: DDPM (arXiv 2006.11239), DDIM (2010.02502), v-prediction (2202.00512), zero terminal SNR and the step spacings
(2305.08891), min-SNR (2303.09556), rectified flow with logit-normal t and shift (SD3, 2403.03206), its SDE (Flow-GRPO,
2505.05470).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign._scheduler_config import alphas_cumprod, choose, refuse
from diffalign.types import Schedule, UserError

WEIGHTINGS = ("constant", "min-snr", "tilt", "elbo")
T_DISTRIBUTIONS = ("uniform", "native")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")

MIN_SNR_GAMMA = 5.0  # the value of the min-SNR paper
FLOOR = 2.0**-20  # least alpha or sigma to divide by; of the usual schedules only zero terminal SNR goes below


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient per row, [N] or a scalar, shaped and typed to multiply x [N, C, H, W]."""
    return coefficient.reshape(*coefficient.shape, *[1] * (x.ndim - coefficient.ndim)).to(_dtype(x))


def _noise_weight(name: str, alpha: Tensor, sigma: Tensor, elbo: Tensor) -> Tensor:
    """The weight on the squared noise error."""
    match name:
        case "min-snr":
            return (MIN_SNR_GAMMA * (sigma / alpha) ** 2).clamp(max=1.0)
        case "tilt":
            return ((alpha**2 + sigma**2) / (alpha * sigma)) ** 2
        case _:
            assert name == "elbo", name
            return elbo


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean over the latent dimensions of log N(x; mean, std^2) without the constant -1/2 ln(2 pi): [N].

    Takes what `reverse_step` returns. A deterministic step (std 0) has no density: the result is not finite.
    """
    return (-0.5 * ((x - mean) / std) ** 2 - std.log()).flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise on a table of T noise levels.

    The network's timestep k in 0..T-1 is t = (k+1)/T; t = 0 is clean data. Between the grid points sigma/alpha is
    interpolated linearly, as Euler samplers do; a t within 1e-3 of a grid step is that grid point, so that float32 t
    gives integer timesteps. With zero terminal SNR every t above the last but one grid point is pure noise.

    `spacing`, `steps_offset` and `is_final_clean` (the last step ends at abar = 1, else at the abar of timestep 0) are
    the defaults of `timesteps`.

    Raises:
        UserError: an unknown prediction or spacing, or an abar that is not a falling sequence in [0, 1).
    """

    alphas_cumprod: Tensor  # abar [T], falling
    prediction: str = "epsilon"  # what the network predicts: one of PREDICTIONS
    spacing: str = "leading"
    steps_offset: int = 0
    is_final_clean: bool = True
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        choose(self.prediction, PREDICTIONS, "prediction_type")
        choose(self.spacing, SPACINGS, "timestep_spacing")
        abar = self.alphas_cumprod.detach().to("cpu", torch.float64)
        is_legal = abar.ndim == 1 and len(abar) > 0 and bool((abar[:-1] > abar[1:]).all())
        if not (is_legal and 0 <= abar[-1] and abar[0] < 1):
            raise UserError("alphas_cumprod must fall strictly inside [0, 1): check the scheduler's betas")
        object.__setattr__(self, "alphas_cumprod", abar)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels the network was trained on."""
        return len(self.alphas_cumprod)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """sigma/alpha at t = 0, 1/T, ..., 1 ([T+1]) and the ELBO weight of each timestep ([T]), kept per device."""
        if device not in self._tables:
            abar = self.alphas_cumprod
            ratio = torch.cat([abar.new_zeros(1), ((1 - abar) / abar).sqrt()])
            floored = abar.clamp(min=FLOOR**2)
            step_alpha = floored / torch.cat([abar.new_ones(1), abar[:-1]])
            elbo = len(abar) * (1 - step_alpha) / (step_alpha * (1 - abar))
            self._tables[device] = ratio.to(device), elbo.to(device)
        return self._tables[device]

    def _position(self, t: Tensor) -> Tensor:
        """t in grid steps, float64: timestep k is at k+1."""
        position = t.double() * self.num_train_timesteps
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-3, nearest, position)
        return position.clamp(0, self.num_train_timesteps)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio, _ = self._table(t.device)
        position = self._position(t)
        low = position.floor()
        part = position - low
        below, above = ratio[low.long()], ratio[position.ceil().long()]
        ratio = torch.where(part == 0, below, below + part * (above - below))
        return 1 / (1 + ratio**2).sqrt(), 1 / (1 + ratio**-2).sqrt()  # each exact where ratio is 0 or infinite

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The signal's and the noise's coefficient, each of the shape of t."""
        alpha, sigma = self._alpha_sigma(t)
        return alpha.to(_dtype(t)), sigma.to(_dtype(t))

    def _coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._alpha_sigma(t)
        return _like(alpha, x), _like(sigma, x)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [N, C, H, W]."""
        alpha, sigma = self._coefficients(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should predict: the noise, v = alpha noise - sigma x0, or x0."""
        if self.prediction == "v_prediction":
            alpha, sigma = self._coefficients(t, x0)
            return alpha * noise - sigma * x0
        return (noise if self.prediction == "epsilon" else x0).to(_dtype(x0))

    def to_x0(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction implies. A noise prediction divides by alpha, floored at `FLOOR`."""
        alpha, sigma = self._coefficients(t, xt)
        if self.prediction == "epsilon":
            return (xt - sigma * pred) / alpha.clamp(min=FLOOR)
        return alpha * xt - sigma * pred if self.prediction == "v_prediction" else pred.to(_dtype(xt))

    def to_noise(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies. An x0 prediction divides by sigma, floored at `FLOOR`."""
        alpha, sigma = self._coefficients(t, xt)
        if self.prediction == "sample":
            return (xt - alpha * pred) / sigma.clamp(min=FLOOR)
        return alpha * pred + sigma * xt if self.prediction == "v_prediction" else pred.to(_dtype(xt))

    def sample_t(self, u: Tensor, distribution: str) -> Tensor:
        """Uniform u in [0, 1) to t. Both distributions are uniform over the T timesteps.

        Raises:
            UserError: an unknown distribution.
        """
        choose(distribution, T_DISTRIBUTIONS, "t_distribution")
        num_levels = self.num_train_timesteps
        k = (u.double() * num_levels).floor().clamp(max=num_levels - 1)
        return ((k + 1) / num_levels).to(_dtype(u))

    def network_time(self, t: Tensor) -> Tensor:
        """The timestep k the network was trained with, a float in [0, T-1]."""
        return (self._position(t) - 1).clamp(min=0).to(_dtype(t))

    def weight(self, t: Tensor, name: str) -> Tensor:
        """The weight [N] on the squared error in the native target, for logp = -1/2 * weight * error.

        "constant" is 1. The others weigh the noise error and are converted by noise error = factor * native error,
        factor 1 (epsilon), alpha^2 (v), alpha^2/sigma^2 (x0):
        "min-snr": min(snr, 5)/snr (arXiv 2303.09556).
        "tilt": 1/(alpha sigma)^2; with logp a sum over dimensions, beta is then in nats of KL for unit Gaussian data.
        "elbo": T beta_k / (alpha_k (1 - abar_k)) with the step's own alpha_k = 1 - beta_k, the bound's weight for
        uniform t.
        alpha and sigma are floored at `FLOOR`, so that all values are finite at both ends.

        Raises:
            UserError: an unknown name.
        """
        if choose(name, WEIGHTINGS, "weighting") == "constant":
            return torch.ones_like(t, dtype=_dtype(t))
        alpha, sigma = (value.clamp(min=FLOOR) for value in self._alpha_sigma(t))
        factor = {"epsilon": alpha**0, "v_prediction": alpha**2, "sample": (alpha / sigma) ** 2}[self.prediction]
        k = (self._position(t).ceil().long() - 1).clamp(min=0)
        elbo = self._table(t.device)[1][k]
        return (_noise_weight(name, alpha, sigma, elbo) * factor).to(_dtype(t))

    def reverse_step(self, pred: Tensor, xt: Tensor, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """The Gaussian p(x_s | x_t), s < t: DDIM (arXiv 2010.02502, eq. 12 and 16).

        eta 0 is deterministic, eta 1 has the variance (and then also the mean) of ancestral DDPM sampling.
        Returns the mean [N, C, H, W] and the std [N, 1, 1, 1].
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._alpha_sigma(t), self._alpha_sigma(s)
        std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()
        direction = (sigma_s**2 - std**2).clamp(min=0).sqrt()
        mean = _like(alpha_s, xt) * self.to_x0(pred, xt, t) + _like(direction, xt) * self.to_noise(pred, xt, t)
        return mean, _like(std, xt)

    def timesteps(
        self,
        num_steps: int,
        spacing: str | None = None,
        steps_offset: int | None = None,
        is_final_clean: bool | None = None,
        is_rounded: bool = True,
    ) -> list[tuple[float, float]]:
        """The (t, s) of each sampler step, from noise to data (arXiv 2305.08891, table 2).

        None takes the schedule's own setting. `steps_offset` counts for "leading" only. `is_rounded=False` keeps
        "linspace" fractional, as Euler samplers do. Every s is the next t; the DDIM of diffusers steps by
        T // num_steps instead, which differs for "linspace" and for "trailing" where num_steps does not divide T.
        If timestep 0 is on the grid and `is_final_clean` is false, the last step has s = t and changes nothing.

        Raises:
            UserError: num_steps is below 1 or does not fit T, or an unknown spacing.
        """
        num_levels = self.num_train_timesteps
        if not 1 <= num_steps <= num_levels:
            raise UserError(f"num_steps={num_steps} must lie in 1..{num_levels}, the noise levels of the schedule")
        match choose(spacing or self.spacing, SPACINGS, "timestep_spacing"):
            case "leading":
                offset = self.steps_offset if steps_offset is None else steps_offset
                grid = [float(i * (num_levels // num_steps) + offset) for i in reversed(range(num_steps))]
            case "trailing":
                grid = [round(num_levels - i * num_levels / num_steps) - 1.0 for i in range(num_steps)]
            case _:
                grid = torch.linspace(0, num_levels - 1, num_steps, dtype=torch.float64).flip(0).tolist()
                grid = [float(round(k)) for k in grid] if is_rounded else grid
        if not 0 <= grid[-1] <= grid[0] <= num_levels - 1:
            raise UserError(f"num_steps={num_steps} with this steps_offset leaves 0..{num_levels - 1}: use fewer steps")
        final = 0.0 if (self.is_final_clean if is_final_clean is None else is_final_clean) else 1 / num_levels
        ends = [(k + 1) / num_levels for k in grid]
        return list(zip(ends, [*ends[1:], final], strict=True))


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x0 + t noise; the network predicts the velocity noise - x0 (arXiv 2209.03003, SD3: 2403.03206).

    `shift` moves steps and "native" training times towards noise for large images: t' = shift t / (1 + (shift - 1) t)
    (2403.03206, eq. 23); SD3 uses 3 at 1024 x 1024. The network's time is num_train_timesteps * t.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        for key in ("shift", "num_train_timesteps", "logit_std"):
            if not getattr(self, key) > 0:
                raise UserError(f"{key}={getattr(self, key)!r} must be positive")

    def _shifted(self, t: Any) -> Any:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The data's and the noise's coefficient, (1 - t, t)."""
        return (1 - t.double()).to(_dtype(t)), t.to(_dtype(t))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [N, C, H, W]."""
        return _like(1 - t.double(), x0) * x0 + _like(t.double(), x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity noise - x0, the same for every t."""
        return noise.to(_dtype(x0)) - x0

    def to_x0(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The clean data that a velocity implies."""
        return xt - _like(t.double(), xt) * pred

    def to_noise(self, pred: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The noise that a velocity implies."""
        return xt + _like(1 - t.double(), xt) * pred

    def sample_t(self, u: Tensor, distribution: str) -> Tensor:
        """Uniform u in [0, 1) to t in (0, 1): "uniform" is t = u, "native" is the logit-normal of SD3, then shifted.

        Source: arXiv 2403.03206, eq. 19 (logit-normal) and eq. 23 (shift). u is kept 2^-25 from 0 and 2^-24 from 1.

        Raises:
            UserError: an unknown distribution.
        """
        t = u.double().clamp(2.0**-25, 1 - 2.0**-24)
        if choose(distribution, T_DISTRIBUTIONS, "t_distribution") == "native":
            t = self._shifted(torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(t)))
        return t.to(_dtype(u))

    def network_time(self, t: Tensor) -> Tensor:
        """num_train_timesteps * t."""
        return (self.num_train_timesteps * t.double()).to(_dtype(t))

    def weight(self, t: Tensor, name: str) -> Tensor:
        """The weight [N] on the squared velocity error, for logp = -1/2 * weight * error.

        "constant" is 1. The others weigh the noise error, which is (1-t)^2 times the velocity error:
        "min-snr": min(snr, 5)/snr; "tilt": ((1-t)^2 + t^2)^2 / (t (1-t))^2; "elbo": 2/(t (1-t)), minus the slope of
        the log-SNR, the bound's weight for uniform t. t is kept 1/num_train_timesteps from both ends, so that all
        values are finite.

        Raises:
            UserError: an unknown name.
        """
        if choose(name, WEIGHTINGS, "weighting") == "constant":
            return torch.ones_like(t, dtype=_dtype(t))
        margin = 1 / self.num_train_timesteps
        sigma = t.double().clamp(margin, 1 - margin)
        alpha = 1 - sigma
        return (_noise_weight(name, alpha, sigma, 2 / (alpha * sigma)) * alpha**2).to(_dtype(t))

    def reverse_step(self, pred: Tensor, xt: Tensor, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """The Gaussian p(x_s | x_t), s < t: an Euler step of the ODE (eta 0) or of Flow-GRPO's SDE (arXiv 2505.05470).

        The SDE's diffusion is eta sqrt(t/(1-t)), infinite at t = 1; there 1-s stands for 1-t, as in the paper's code.
        eta sqrt(2) has the variance of ancestral sampling in the limit of short steps, the paper's 0.7 a quarter of it.
        Its last step (s = 0) adds noise as well. Returns the mean [N, C, H, W] and the std [N, 1, 1, 1].
        """
        t, s = t.double(), s.double()
        step = s - t
        variance = eta**2 * t / (1 - torch.where(t == 1, s, t))
        drift = pred + _like(variance / (2 * t), xt) * self.to_noise(pred, xt, t)
        return xt + _like(step, xt) * drift, _like((-variance * step).sqrt(), xt)

    def timesteps(self, num_steps: int) -> list[tuple[float, float]]:
        """The (t, s) of each sampler step, from t = 1 to s = 0, evenly spaced before the shift.

        As the FlowMatchEuler scheduler of diffusers: its lowest t before 0 is 1/num_train_timesteps shifted twice.

        Raises:
            UserError: num_steps is below 1.
        """
        if num_steps < 1:
            raise UserError(f"num_steps={num_steps} must be at least 1")
        lowest = self._shifted(1 / self.num_train_timesteps)
        grid = torch.linspace(1.0, lowest, num_steps, dtype=torch.float64).tolist()
        ends = [*(self._shifted(t) for t in grid), 0.0]
        return list(zip(ends[:-1], ends[1:], strict=True))


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers scheduler config: rectified flow for FlowMatch*, else variance preserving.

    Missing keys have the defaults of diffusers' DDIM, but no clipping. Keys of variance-preserving configs that only
    choose a solver or its sigma grid (use_karras_sigmas, algorithm_type, final_sigmas_type, ...) do not change the
    process and are not read: the samplers have their own grids.

    Raises:
        UserError: names the key of a setting that is not supported.
    """
    name = str(config.get("_class_name", ""))
    if name.startswith("FlowMatch"):
        off = (False, None)
        refuse(config, use_dynamic_shifting=off, invert_sigmas=off, stochastic_sampling=off, shift_terminal=off[::-1])
        refuse(config, use_karras_sigmas=off, use_exponential_sigmas=off, use_beta_sigmas=off)
        return RectifiedFlow(float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000)))
    if name and "beta_schedule" not in config and config.get("trained_betas") is None:
        raise UserError(f"scheduler config: _class_name={name!r} is not supported: it has no beta_schedule")
    return VariancePreserving(
        alphas_cumprod(config),
        prediction=str(config.get("prediction_type", "epsilon")),
        spacing=str(config.get("timestep_spacing", "leading")),
        steps_offset=int(config.get("steps_offset", 0)),
        is_final_clean=bool(config.get("set_alpha_to_one", True)),
    )
