"""Schedules against closed forms, published check values and the tables of diffusers."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.schedule import (
    PREDICTIONS,
    WEIGHTINGS,
    RectifiedFlow,
    VariancePreserving,
    log_density,
    schedule_from_config,
)
from diffalign.types import Schedule, UserError

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def at(*timesteps: int) -> torch.Tensor:
    """t of the network's timesteps k, T = 1000."""
    return (torch.tensor(timesteps, dtype=torch.float64) + 1) / 1000


def sd(prediction: str = "epsilon", **extra) -> VariancePreserving:
    schedule = schedule_from_config({**SD, "prediction_type": prediction, **extra})
    assert isinstance(schedule, VariancePreserving)
    return schedule


def all_schedules() -> list:
    return [*(sd(prediction) for prediction in PREDICTIONS), RectifiedFlow(shift=3.0)]


def test_abar_of_stable_diffusion_has_the_published_values() -> None:
    k = [0, 1, 51, 100, 250, 500, 700, 751, 951, 999]
    expected = [0.99915, 0.998296027838, 0.950524321873, 0.894223477587, 0.673792625233, 0.276332683823]
    expected += [0.082520870610, 0.055719029298, 0.008155004567, 0.004660098513]
    alpha, sigma = sd().alpha_sigma(at(*k))
    assert (alpha**2).tolist() == pytest.approx(expected, rel=1e-9)
    assert (alpha**2 + sigma**2).tolist() == pytest.approx([1.0] * len(k), rel=1e-14)


def test_zero_terminal_snr() -> None:
    schedule = sd("v_prediction", rescale_betas_zero_snr=True)
    alpha, sigma = schedule.alpha_sigma(at(0, 249, 499, 749, 999))
    expected = [0.99915, 0.654189006539, 0.242359166556, 0.033171482832, 0.0]
    assert (alpha**2).tolist() == pytest.approx(expected, rel=1e-9)
    assert alpha[-1] == 0 and sigma[-1] == 1
    for name in WEIGHTINGS:
        assert torch.isfinite(schedule.weight(at(0, 998, 999), name)).all()


@pytest.mark.parametrize(
    ("num_steps", "k", "expected"),
    [
        (20, 951, 0.644391014012),
        (20, 751, 0.557616496156),
        (20, 501, 0.429321149322),
        (20, 251, 0.283554398686),
        (20, 51, 0.040596731902),
        (20, 1, 0.020648320165),
        (50, 501, 0.294784540277),
        (50, 1, 0.020648320165),
    ],
)
def test_ancestral_std_has_the_published_values(num_steps: int, k: int, expected: float) -> None:
    schedule = sd()
    steps = {round(t * 1000) - 1: s for t, s in schedule.timesteps(num_steps)}
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    _, std = schedule.reverse_step(x, x, at(k), torch.tensor([steps[k]], dtype=torch.float64), eta=1.0)
    assert std.item() == pytest.approx(expected, rel=1e-9)


def test_noising_has_the_published_sums() -> None:
    k = torch.arange(32, dtype=torch.float64)
    shape = (2, 4, 2, 2)
    noise, winner, loser = (
        (k + 1).sin().view(shape),
        0.5 * (0.7 * k).sin().view(shape),
        0.5 * (0.9 * k).cos().view(shape),
    )
    t = at(100, 700)
    xt = sd().add_noise(winner, noise, t)
    assert xt.sum().item() == pytest.approx(0.2933548474, abs=1e-9)
    assert xt[0, 0, 0, 1].item() == pytest.approx(0.6003305982, abs=1e-9)
    assert sd().add_noise(loser, noise, t).sum().item() == pytest.approx(-0.0372731196, abs=1e-9)
    assert sd("v_prediction").target(winner, noise, t).sum().item() == pytest.approx(0.3546587776, abs=1e-9)


def test_step_density_has_the_published_values() -> None:
    k = torch.arange(16, dtype=torch.float64)
    xt, pred = (0.37 * k).cos().view(1, 4, 2, 2), (0.53 * k + 0.2).sin().view(1, 4, 2, 2)
    pred_ref = pred + 0.01 * k.cos().view(1, 4, 2, 2)
    constant = 0.5 * math.log(2 * math.pi)  # the published densities keep it
    schedule = sd()

    mean, std = schedule.reverse_step(pred, xt, at(751), at(701), eta=1.0)
    mean_ref, _ = schedule.reverse_step(pred_ref, xt, at(751), at(701), eta=1.0)
    x_prev = mean_ref + std * (1.1 * k).cos().view(1, 4, 2, 2)
    x0 = schedule.to_x0(pred_ref, xt, at(751))
    assert x0.flatten()[:3].tolist() == pytest.approx([3.3773840864, 1.1821806300, -0.7738781063], rel=1e-8)
    assert mean_ref.flatten()[:3].tolist() == pytest.approx([1.1292387458, 0.8621855309, 0.5171304307], rel=1e-8)
    assert mean.flatten()[:3].tolist() == pytest.approx([1.1332292177, 0.8643415920, 0.5154698084], rel=1e-8)
    assert x_prev.flatten()[:3].tolist() == pytest.approx([1.6868552420, 1.1151182108, 0.1889724997], rel=1e-8)
    logp, logp_ref = log_density(x_prev, mean, std), log_density(x_prev, mean_ref, std)
    assert logp.item() - constant == pytest.approx(-0.5939752114, abs=1e-9)
    assert logp_ref.item() - constant == pytest.approx(-0.5965394357, abs=1e-9)

    last, final = schedule.timesteps(20)[-1]
    assert (last, final) == (2 / 1000, 1 / 1000)  # timestep 1 to the abar of timestep 0, still noisy
    mean, std = schedule.reverse_step(pred, xt, at(1), at(0), eta=1.0)
    mean_ref, _ = schedule.reverse_step(pred_ref, xt, at(1), at(0), eta=1.0)
    x_prev = mean_ref + std * (1.1 * k).cos().view(1, 4, 2, 2)
    assert mean_ref.flatten()[0].item() == pytest.approx(0.9961052124, rel=1e-8)
    assert x_prev.flatten()[0].item() == pytest.approx(1.0167535325, rel=1e-8)
    assert log_density(x_prev, mean, std).item() - constant == pytest.approx(2.7030853063, abs=1e-8)
    assert log_density(x_prev, mean_ref, std).item() - constant == pytest.approx(2.6994980393, abs=1e-8)


@pytest.mark.parametrize("schedule", all_schedules(), ids=[*PREDICTIONS, "flow"])
def test_target_gives_back_data_and_noise(schedule: Schedule) -> None:
    assert isinstance(schedule, Schedule)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.001, 0.42, 1.0], dtype=torch.float64)
    xt, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    assert torch.allclose(schedule.to_x0(target, xt, t), x0, atol=1e-12)
    assert torch.allclose(schedule.to_noise(target, xt, t), noise, atol=1e-12)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(xt[1], alpha[1] * x0[1] + sigma[1] * noise[1])
    clean = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(schedule.add_noise(x0, noise, clean), x0)


@pytest.mark.parametrize("schedule", all_schedules(), ids=[*PREDICTIONS, "flow"])
def test_results_are_float32_at_least_and_broadcast_over_rows(schedule: Schedule) -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2).to(torch.bfloat16)
    t = torch.tensor([0.25, 0.75])
    assert {
        result.dtype
        for result in (
            *schedule.alpha_sigma(t),
            schedule.add_noise(x0, noise, t),
            schedule.target(x0, noise, t),
            schedule.to_x0(noise, x0, t),
            schedule.to_noise(noise, x0, t),
            schedule.sample_t(t, "native"),
            schedule.network_time(t),
            *(schedule.weight(t, name) for name in WEIGHTINGS),
        )
    } == {torch.float32}
    both = schedule.add_noise(x0, noise, t)
    assert torch.equal(both[1], schedule.add_noise(x0[1], noise[1], t[1]))


@pytest.mark.parametrize("schedule", all_schedules(), ids=[*PREDICTIONS, "flow"])
def test_everything_stays_on_the_device_of_t(schedule) -> None:
    """The meta device holds no values: a result there took no copy of them to the host."""
    x0, noise = torch.empty(2, 2, 1, 2, 2, device="meta")
    t = torch.empty(2, device="meta")
    results = [
        *schedule.alpha_sigma(t),
        schedule.add_noise(x0, noise, t),
        schedule.target(x0, noise, t),
        *schedule.reverse_step(noise, x0, t, t, 0.5),
        schedule.sample_t(t, "native"),
        schedule.network_time(t),
        *(schedule.weight(t, name) for name in WEIGHTINGS),
    ]
    assert {result.device.type for result in results} == {"meta"}


def test_float32_t_reaches_the_exact_timestep() -> None:
    schedule = sd()
    t = schedule.sample_t((torch.arange(1000) + 0.5) / 1000, "uniform")
    assert t.dtype == torch.float32
    assert torch.equal(schedule.network_time(t), torch.arange(1000.0))
    assert torch.allclose(schedule.alpha_sigma(t.double())[0] ** 2, schedule.alphas_cumprod, rtol=1e-14, atol=0)
    assert schedule.network_time(torch.zeros(1)).item() == 0


def test_uniform_u_hits_every_timestep_equally_often() -> None:
    t = sd().sample_t((torch.arange(4000).double() + 0.5) / 4000, "native")
    assert torch.equal((t * 1000).round().long().bincount()[1:], torch.full((1000,), 4))
    assert sd().sample_t(torch.tensor([0.0, 1 - 2.0**-24]), "uniform").tolist() == pytest.approx([0.001, 1.0])


def test_between_grid_points_sigma_over_alpha_is_linear() -> None:
    alpha, sigma = sd().alpha_sigma(torch.tensor([0.5, 0.5003, 0.501], dtype=torch.float64))
    ratio = sigma / alpha
    assert ratio[1].item() == pytest.approx((0.7 * ratio[0] + 0.3 * ratio[2]).item(), rel=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_native_t_of_rectified_flow_is_shifted_logit_normal(shift: float) -> None:
    schedule = RectifiedFlow(shift=shift, logit_mean=0.5, logit_std=1.5)
    u = torch.tensor([0.5, 0.8413447460685429, 0.022750131948179195], dtype=torch.float64)  # 0, +1, -2 sigma
    t = schedule.sample_t(u, "native")
    # shift t/(1+(shift-1)t) adds ln(shift) to the logit
    assert torch.logit(t).tolist() == pytest.approx([0.5 + z * 1.5 + math.log(shift) for z in (0, 1, -2)], abs=1e-9)
    assert schedule.sample_t(u, "uniform").tolist() == u.tolist()
    ends = torch.tensor([0.0, 1 - 2.0**-24])
    for name in ("uniform", "native"):
        assert ((schedule.sample_t(ends, name) > 0) & (schedule.sample_t(ends, name) < 1)).all()


def test_network_time_of_rectified_flow() -> None:
    assert RectifiedFlow().network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 1000]


def test_weights_of_variance_preserving() -> None:
    t = at(30, 300, 900)
    alpha, sigma = sd().alpha_sigma(t)
    snr = alpha**2 / sigma**2
    capped = snr.clamp(max=5)
    assert capped[0] == 5 and capped[1] < 5
    expected = {"epsilon": capped / snr, "v_prediction": capped / (snr + 1), "sample": capped}
    for prediction, weight in expected.items():
        assert torch.allclose(sd(prediction).weight(t, "min-snr"), weight, rtol=1e-12)
        assert torch.equal(sd(prediction).weight(t, "constant"), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(sd().weight(t, "tilt"), 1 / (alpha**2 * sigma**2), rtol=1e-12)
    assert torch.allclose(sd("v_prediction").weight(t, "tilt"), 1 / sigma**2, rtol=1e-12)
    assert torch.allclose(sd("sample").weight(t, "tilt"), 1 / sigma**4, rtol=1e-12)


def test_elbo_weight_telescopes() -> None:
    weight = sd().weight(at(*range(1000)), "elbo")
    abar = sd().alphas_cumprod
    # sum_k beta_k abar_k / alpha_k = 1 - abar_T; the published median and mean of T c_t are half the weight's
    assert (weight * abar * (1 - abar)).mean().item() == pytest.approx(1 - abar[-1].item(), rel=1e-12)
    assert (weight / 2).mean().item() == pytest.approx(6.51, abs=0.005)
    assert (weight / 2).median().item() == pytest.approx(4.0, abs=0.1)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)[500] ** 2
    assert weight[500].item() == pytest.approx(1000 * (beta / ((1 - beta) * (1 - abar[500]))).item(), rel=1e-9)


def test_weights_of_rectified_flow() -> None:
    schedule = RectifiedFlow(shift=3.0)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(schedule.weight(t, "tilt"), ((1 - t) ** 2 + t**2) ** 2 / t**2, rtol=1e-12)
    assert torch.allclose(schedule.weight(t, "elbo"), 2 * (1 - t) / t, rtol=1e-12)
    assert torch.allclose(schedule.weight(t, "min-snr"), torch.minimum((1 - t) ** 2, 5 * t**2), rtol=1e-12)
    for name in WEIGHTINGS:
        assert torch.isfinite(schedule.weight(torch.tensor([0.0, 1.0]), name)).all()


@pytest.mark.parametrize("schedule", all_schedules(), ids=[*PREDICTIONS, "flow"])
def test_weighted_native_error_is_the_weighted_noise_error(schedule: Schedule) -> None:
    torch.manual_seed(0)
    x0, noise, error = torch.randn(3, 1, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.3], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    xt, pred = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t) + error
    noise_error = (schedule.to_noise(pred, xt, t) - noise) ** 2
    tilt = (alpha**2 + sigma**2) ** 2 / (alpha * sigma) ** 2
    assert (schedule.weight(t, "tilt") * error**2).item() == pytest.approx((tilt * noise_error).item(), rel=1e-10)


@pytest.mark.parametrize("schedule", all_schedules(), ids=[*PREDICTIONS, "flow"])
def test_unknown_names_list_what_is_legal(schedule: Schedule) -> None:
    t = torch.tensor([0.5])
    with pytest.raises(UserError, match="weighting='snr'.*constant, min-snr, tilt, elbo"):
        schedule.weight(t, "snr")
    with pytest.raises(UserError, match="t_distribution='normal'.*uniform, native"):
        schedule.sample_t(t, "normal")


def test_flow_sde_step_is_the_papers() -> None:
    schedule = RectifiedFlow()
    xt, pred = torch.tensor([0.8, -0.3], dtype=torch.float64).view(2, 1, 1, 1, 1)
    (t, s), eta = torch.tensor([[0.6], [0.5]], dtype=torch.float64), 0.7
    mean, std = schedule.reverse_step(pred, xt, t, s, eta)
    sigma = eta * (t / (1 - t)).sqrt()
    expected = 0.8 + (-0.3 + sigma**2 / (2 * t) * (0.8 + (1 - t) * -0.3)) * (s - t)
    assert mean.item() == pytest.approx(expected.item(), rel=1e-12)
    assert std.item() == pytest.approx((sigma * (t - s).sqrt()).item(), rel=1e-12)
    mean, std = schedule.reverse_step(pred, xt, t, s, 0.0)
    assert mean.item() == pytest.approx(0.8 + 0.3 * 0.1, rel=1e-12) and std.item() == 0
    one = torch.ones(1).double()
    _, std = schedule.reverse_step(pred, xt, one, one * 0.9, eta)
    assert std.item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), rel=1e-9)


def test_flow_noise_level_of_root_two_is_ancestral() -> None:
    """The std of x_s given x_t and x0 under the forward process in the limit of short steps, as DDIM with eta 1."""
    flow, short = RectifiedFlow(), 1e-6
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    (alpha, sigma), (alpha_s, sigma_s) = flow.alpha_sigma(t), flow.alpha_sigma(t - short)
    ancestral = sigma_s / sigma * (sigma**2 - (alpha / alpha_s * sigma_s) ** 2).sqrt()
    x = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    _, std = flow.reverse_step(x, x, t, t - short, eta=2**0.5)
    torch.testing.assert_close(std.flatten(), ancestral, rtol=1e-5, atol=0)


def test_log_density_against_torch() -> None:
    torch.manual_seed(0)
    x, mean = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    std = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1) + 0.5 * math.log(2 * math.pi)
    assert torch.allclose(log_density(x, mean, std), expected, rtol=1e-12)


def test_leading_grid_of_stable_diffusion() -> None:
    steps = sd().timesteps(20)
    assert [round(t * 1000) - 1 for t, _ in steps] == list(range(951, 0, -50))
    assert [s for _, s in steps[:-1]] == [t for t, _ in steps[1:]]
    assert steps[-1][1] == 1 / 1000
    assert sd().timesteps(20, is_final_clean=True)[-1][1] == 0
    assert sd().timesteps(20, steps_offset=0)[-1] == (1 / 1000, 1 / 1000)


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.01, 0.1, 0.2, 0.4], "num_train_timesteps": 4},
    ],
)
def test_config_gives_the_table_of_diffusers(config: dict) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    schedule = schedule_from_config(scheduler.config)
    assert isinstance(schedule, VariancePreserving)
    # diffusers' tables are float32: differences where abar is nearly 0 are its rounding
    assert torch.allclose(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert schedule.prediction == config.get("prediction_type", "epsilon")
    assert (schedule.spacing, schedule.steps_offset, schedule.is_final_clean) == ("trailing", 1, True)


@pytest.mark.parametrize(("prediction", "velocity"), [("epsilon", False), ("v_prediction", True)])
def test_noising_and_velocity_equal_diffusers(prediction: str, velocity: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    schedule = VariancePreserving(scheduler.alphas_cumprod, prediction)
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 2, 2, 2, dtype=torch.float64)
    k = torch.tensor([0, 3, 500, 999])
    xt, target = schedule.add_noise(x0, noise, at(*k)), schedule.target(x0, noise, at(*k))
    assert torch.allclose(xt, scheduler.add_noise(x0, noise, k), rtol=1e-11, atol=1e-13)
    expected = scheduler.get_velocity(x0, noise, k) if velocity else noise
    assert torch.allclose(target, expected, rtol=1e-11, atol=1e-13)


def test_flow_config() -> None:
    schedule = schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert schedule == RectifiedFlow(shift=3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'.*scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras'"),
        ({"clip_sample": True}, "clip_sample=True.*set it to False"),
        ({"thresholding": True}, "thresholding"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"variance_type": "learned_range"}, "variance_type"),
        ({"beta_end": 1.5}, "betas must lie"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
    ],
)
def test_unsupported_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule_from_config({**SD, **change})


def test_unsupported_families_and_flow_settings_are_named() -> None:
    with pytest.raises(UserError, match="_class_name='EDMEulerScheduler'"):
        schedule_from_config({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5})
    for key in ("use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "shift_terminal"):
        with pytest.raises(UserError, match=key):
            schedule_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", key: 0.1})
    with pytest.raises(UserError, match="shift"):
        RectifiedFlow(shift=0.0)


@pytest.mark.parametrize("table", [[0.5, 0.5], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1], []])
def test_bad_tables_are_refused(table: list[float]) -> None:
    with pytest.raises(UserError, match="alphas_cumprod"):
        VariancePreserving(torch.tensor(table))


@pytest.mark.parametrize("num_steps", [0, 1001, 1000])
def test_steps_that_do_not_fit_are_refused(num_steps: int) -> None:
    with pytest.raises(
        UserError, match=f"num_steps={num_steps}"
    ):  # 1000 steps and an offset of 1 would ask for k = 1000
        sd().timesteps(num_steps)
    if num_steps < 1:
        with pytest.raises(UserError, match="num_steps"):
            RectifiedFlow().timesteps(num_steps)
