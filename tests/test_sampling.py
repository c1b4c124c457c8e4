"""Samplers against diffusers run in float64, and against exact Gaussian worlds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from torch import Tensor

from diffalign.sampling import SAMPLERS, SamplerStep, predict, sample
from diffalign.schedule import RectifiedFlow, VariancePreserving, log_density, schedule_from_config
from diffalign.types import Denoiser, Schedule, UserError

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 3, 2, 2)


def first_noise() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(x: Tensor, time: Tensor) -> Tensor:
    """A deterministic stand-in that depends on both inputs; `time` is the network's."""
    return (0.7 * x + 0.003 * time.to(x).reshape(-1, 1, 1, 1)).sin()


@dataclass
class Dummy:
    schedule: Schedule
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, xt: Tensor, t: Tensor, cond) -> Tensor:
        self.calls.append(tuple(xt.shape))
        return network(xt, self.schedule.network_time(t)) + cond.get("shift", torch.zeros(len(xt))).reshape(-1, 1, 1, 1)


class _Double:
    """A module whose float32 is float64, so that the float32 tables and casts of diffusers are double."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str):
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def scheduler_class(monkeypatch: pytest.MonkeyPatch):
    """name, module -> a scheduler class of diffusers that computes in float64."""
    pytest.importorskip("diffusers")

    def build(name: str, module: str):
        found = importlib.import_module(f"diffusers.schedulers.{module}")
        monkeypatch.setattr(found, "torch", _Double(found.torch))
        monkeypatch.setattr(found, "np", _Double(found.np))
        return getattr(found, name)

    return build


def run_diffusers(scheduler, num_steps: int, **step) -> Tensor:
    scheduler.set_timesteps(num_steps)
    x = first_noise() * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        pred = network(scaled, time.reshape(1))
        if "noises" in step:
            x = scheduler.step(pred, time, x, eta=1.0, variance_noise=next(step["noises"])).prev_sample
        else:
            x = scheduler.step(pred, time, x, **step).prev_sample
    return x


def noise_stream() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def run_ours(schedule: Schedule, num_steps: int, sampler: str, eta: float = 0.0) -> Tensor:
    stream = noise_stream()
    return sample(
        Dummy(schedule),
        {},
        None,
        first_noise(),
        sampler=sampler,
        num_steps=num_steps,
        cfg_scale=1.0,
        eta=eta,
        step_noise=lambda index: next(stream),
    )


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-11) -> None:
    assert theirs.dtype == torch.float64
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < tolerance


DDIM_CASES = [
    (20, {**BETAS, "steps_offset": 1, "set_alpha_to_one": False}),
    (20, {**BETAS, "steps_offset": 0, "set_alpha_to_one": True}),
    (50, {**BETAS, "steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    (25, {**BETAS, "timestep_spacing": "trailing", "prediction_type": "sample"}),
    (
        10,
        {
            **BETAS,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        },
    ),
    (10, {"beta_schedule": "squaredcos_cap_v2"}),
    (30, {"beta_schedule": "linear", "num_train_timesteps": 30, "beta_end": 0.2, "timestep_spacing": "linspace"}),
]


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("num_steps", "config"), DDIM_CASES)
def test_ddim_equals_diffusers(scheduler_class, num_steps: int, config: dict, eta: float) -> None:
    scheduler = scheduler_class("DDIMScheduler", "scheduling_ddim")(**config, clip_sample=False)
    step = {"noises": noise_stream()} if eta else {}
    theirs = run_diffusers(scheduler, num_steps, **step)
    assert_same(run_ours(schedule_from_config(scheduler.config), num_steps, "ddim", eta), theirs)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm_equals_diffusers(scheduler_class, spacing: str, prediction: str) -> None:
    scheduler = scheduler_class("DDPMScheduler", "scheduling_ddpm")(
        **BETAS, clip_sample=False, timestep_spacing=spacing, prediction_type=prediction
    )
    generator = torch.Generator().manual_seed(2)
    theirs = run_diffusers(scheduler, 15, generator=generator)
    # its last step is not quite deterministic: a variance of 1e-20 stands for 0
    assert_same(run_ours(schedule_from_config(scheduler.config), 15, "ddpm"), theirs, tolerance=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "config"),
    [
        (20, {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}),
        (20, {**BETAS, "timestep_spacing": "linspace"}),
        (7, {**BETAS, "timestep_spacing": "trailing", "prediction_type": "sample"}),
        (
            10,
            {
                **BETAS,
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
)
def test_euler_equals_diffusers(scheduler_class, num_steps: int, config: dict) -> None:
    scheduler = scheduler_class("EulerDiscreteScheduler", "scheduling_euler_discrete")(**config)
    theirs = run_diffusers(scheduler, num_steps)
    assert_same(run_ours(schedule_from_config(scheduler.config), num_steps, "euler"), theirs)


@pytest.mark.parametrize(("num_steps", "shift"), [(28, 3.0), (10, 1.0), (1, 3.0)])
def test_flow_euler_equals_diffusers(scheduler_class, num_steps: int, shift: float) -> None:
    name = "FlowMatchEulerDiscreteScheduler"
    scheduler = scheduler_class(name, "scheduling_flow_match_euler_discrete")(shift=shift)
    scheduler.init_noise_sigma = 1.0
    theirs = run_diffusers(scheduler, num_steps)
    schedule = schedule_from_config({**scheduler.config, "_class_name": name})
    assert_same(run_ours(schedule, num_steps, "flow-euler"), theirs)


@dataclass
class Gaussian:
    """The exact denoiser of data N(mean, variance) in the schedule's native target."""

    schedule: VariancePreserving | RectifiedFlow
    mean: float
    variance: float
    tilt: float = 0.0  # moves the noise prediction as an exactly tilted model would, by alpha sigma tilt

    def __call__(self, xt: Tensor, t: Tensor, cond) -> Tensor:
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in self.schedule.alpha_sigma(t))
        spread = alpha**2 * self.variance + sigma**2
        noise = sigma * (xt - alpha * self.mean) / spread - alpha * sigma * self.tilt
        x0 = self.mean + alpha * self.variance * (xt - alpha * self.mean) / spread
        if isinstance(self.schedule, RectifiedFlow):
            return noise - x0
        return noise if self.schedule.prediction == "epsilon" else alpha * noise - sigma * x0


def moments(denoiser: Denoiser, sampler: str, num_steps: int, eta: float) -> tuple[float, float]:
    """Mean and variance of the samples, exactly: every step is affine, so two trajectories give its gain."""
    steps: list[SamplerStep] = []
    without_and_with = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    sample(
        denoiser,
        {},
        None,
        without_and_with,
        sampler=sampler,
        num_steps=num_steps,
        cfg_scale=1.0,
        eta=eta,
        step_noise=lambda index: without_and_with,
        on_step=steps.append,
    )
    variance = (steps[0].xt[1] - steps[0].xt[0]).item() ** 2
    for step in steps:
        gain = ((step.mean[1] - step.mean[0]) / (step.xt[1] - step.xt[0])).item()
        variance = gain**2 * variance + step.std[0].item() ** 2
    return steps[-1].mean[0].item(), variance


ZERO_SNR = {**BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("schedule", "sampler", "eta"),
    [
        (schedule_from_config(ZERO_SNR), "ddim", 0.0),
        (schedule_from_config(ZERO_SNR), "ddim", 0.5),
        (schedule_from_config(ZERO_SNR), "ddpm", 0.0),
        (schedule_from_config(ZERO_SNR), "euler", 0.0),
        (RectifiedFlow(), "flow-euler", 0.0),
        (RectifiedFlow(shift=3.0), "flow-euler", 0.0),
        (RectifiedFlow(), "flow-sde", 0.3),
        (RectifiedFlow(shift=3.0), "flow-sde", 0.7),
    ],
    ids=["ddim-0", "ddim-0.5", "ddpm", "euler", "flow-1", "flow-3", "sde-1", "sde-3"],
)
def test_samplers_reach_the_data_distribution(schedule, sampler: str, eta: float) -> None:
    errors = []
    for num_steps in (100, 400):
        mean, variance = moments(Gaussian(schedule, mean=1.5, variance=0.3), sampler, num_steps, eta)
        errors.append(abs(mean - 1.5) + abs(variance - 0.3))
    assert errors[1] < 0.03
    assert errors[1] < 0.5 * errors[0] or errors[1] < 1e-3  # a first-order method, not a bias


def test_tilted_denoiser_has_the_published_means() -> None:
    """Reference N(0, 1) tilted to N(2, 1): the sampler's mean lacks what abar_T > 0 withholds."""
    schedule = schedule_from_config({**BETAS, "set_alpha_to_one": True})
    assert isinstance(schedule, VariancePreserving)
    denoiser = Gaussian(schedule, mean=0.0, variance=1.0, tilt=2.0)
    last = schedule.alphas_cumprod[-1].item()
    assert moments(denoiser, "ddpm", 1000, 0.0)[0] == pytest.approx(2 * (1 - last), rel=1e-9)
    assert moments(denoiser, "ddim", 1000, 0.0)[0] == pytest.approx(2 - 2 * last**0.5, rel=2e-3)


def test_guidance_is_one_folded_call() -> None:
    dummy = Dummy(RectifiedFlow())
    cond, uncond = {"shift": torch.tensor([1.0, 2.0])}, {"shift": torch.tensor([-1.0, 0.5])}
    x, t = first_noise(), torch.full((2,), 0.5, dtype=torch.float64)
    pred_cond, pred_uncond = dummy(x, t, cond), dummy(x, t, uncond)
    dummy.calls.clear()
    guided = predict(dummy, x, t, cond, uncond, 3.0)
    assert dummy.calls == [(4, 3, 2, 2)]
    assert torch.allclose(guided, pred_uncond + 3.0 * (pred_cond - pred_uncond), rtol=1e-12)
    for arguments in ((uncond, 1.0), (None, 3.0)):
        dummy.calls.clear()
        assert torch.equal(predict(dummy, x, t, cond, *arguments), pred_cond)
        assert dummy.calls == [(2, 3, 2, 2)]
    with pytest.raises(UserError, match="shift"):
        predict(dummy, x, t, cond, {"other": torch.zeros(2)}, 3.0)


@pytest.mark.parametrize(
    ("schedule", "sampler"), [(schedule_from_config(BETAS), "ddim"), (RectifiedFlow(), "flow-sde")], ids=["vp", "flow"]
)
def test_recorded_steps_chain_and_have_densities(schedule, sampler: str) -> None:
    steps: list[SamplerStep] = []
    noises = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    x0 = sample(
        Dummy(schedule),
        {},
        None,
        first_noise().float(),
        sampler=sampler,
        num_steps=5,
        cfg_scale=1.0,
        eta=0.7,
        step_noise=noises.__getitem__,
        on_step=steps.append,
    )
    assert x0.dtype == torch.float32
    assert [step.index for step in steps] == [0, 1, 2, 3, 4] and steps[0].num_steps == 5
    assert all(torch.equal(a.x_prev, b.xt) and a.s == b.t for a, b in zip(steps, steps[1:], strict=False))
    assert torch.equal(steps[-1].x_prev, x0) and steps[-1].s == 0
    step = steps[2]
    assert torch.allclose(step.x_prev, step.mean + step.std * noises[2])
    density = log_density(step.x_prev, step.mean, step.std)
    expected = -0.5 * (noises[2] ** 2).flatten(1).mean(1) - step.std.flatten().log()
    assert torch.allclose(density, expected, atol=1e-4)
    t = torch.full((2,), step.t)
    assert torch.equal(step.pred_x0, schedule.to_x0(network(step.xt, schedule.network_time(t)), step.xt, t))


def test_default_sampler_and_half_precision_noise() -> None:
    for schedule, name in ((schedule_from_config(BETAS), "ddim"), (RectifiedFlow(), "flow-euler")):
        noise = first_noise().to(torch.bfloat16)
        runs = [
            sample(Dummy(schedule), {}, None, noise, sampler=sampler, num_steps=3, cfg_scale=1.0)
            for sampler in ("default", name)
        ]
        assert torch.equal(*runs) and runs[0].dtype == torch.float32


def test_sampling_keeps_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)

    class Trained(Dummy):
        def __call__(self, xt: Tensor, t: Tensor, cond) -> Tensor:
            return weight * super().__call__(xt, t, cond)

    x0 = sample(Trained(RectifiedFlow()), {}, None, first_noise(), num_steps=2, cfg_scale=1.0)
    assert not x0.requires_grad


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (RectifiedFlow(), {"sampler": "ddim"}, "sampler='ddim'.*flow-euler, flow-sde"),
        (schedule_from_config(BETAS), {"sampler": "flow-euler"}, "ddim, ddpm, euler"),
        (schedule_from_config(BETAS), {"sampler": "dpm"}, "sampler='dpm'"),
        (schedule_from_config(BETAS), {"sampler": "euler", "eta": 0.5}, "eta=0.5"),
        (schedule_from_config(BETAS), {"eta": -0.1}, "eta=-0.1"),
        (schedule_from_config(BETAS), {"eta": 1.5}, "eta=1.5"),
        (RectifiedFlow(), {"sampler": "flow-sde"}, "needs an eta"),
        (schedule_from_config(BETAS), {"sampler": "ddpm"}, "pass step_noise"),
        (RectifiedFlow(), {"num_steps": 0}, "num_steps=0"),
    ],
)
def test_bad_settings_are_named(schedule, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(Dummy(schedule), {}, None, first_noise(), **{"num_steps": 4, "cfg_scale": 1.0, **arguments})
    assert arguments.get("sampler", "default") in (*SAMPLERS, "dpm")
