"""The likelihood of recorded sampler steps: published numbers, torch's own densities, what carries a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from likelihood_makers import agree
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffalign.registry import build
from diffalign.sampling import SamplerStep, sample
from diffalign.schedule import RectifiedFlow, Schedule, schedule_from_config
from diffalign.types import Likelihoods, StepBatch, UserError

SD = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
}
SCHEDULES: dict[str, Any] = {
    "epsilon": schedule_from_config(SD),
    "v": schedule_from_config(SD | {"prediction_type": "v_prediction"}),
    "sample": schedule_from_config(SD | {"prediction_type": "sample"}),
    "flow": RectifiedFlow(shift=3.0),
}
ETA = {"epsilon": 1.0, "v": 0.6, "sample": 1.0, "flow": 0.7}
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)
LATENT = (2, 3, 2)
D = 12


@dataclass
class Linear:
    """a x + b shift, a network that counts its rows; `gives` makes it a reference too."""

    schedule: Any
    a: Tensor
    b: Tensor
    rows: list[int] = field(default_factory=list)

    gives = frozenset({"reference"})

    def __call__(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.rows.append(len(xt))
        shift = cond["shift"].to(xt)[:, None, None, None]
        return self.a * xt + self.b * shift * torch.cos(3 * t.to(xt))[:, None, None, None]

    def predict(self, xt: Tensor, t: Tensor, cond: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self(xt, t, cond)


def linear(kind: str, a: float = 0.4, b: float = 0.3, dtype: torch.dtype = torch.float64) -> Linear:
    leaf = [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (a, b)]
    return Linear(SCHEDULES[kind], *leaf)


def step(**settings: Any) -> Any:
    return build("likelihood", {"name": "step"} | settings)


def batch(kind: str, shared: bool = False, cfg_scale: float = 1.0, dtype: torch.dtype = torch.float64) -> StepBatch:
    """Three prompts, two candidates, two steps each at other times; x_prev near where the sampler would go."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    xt = draw(3, 1 if shared else 2, 2, *LATENT)
    real = torch.promote_types(dtype, torch.float32)
    t = torch.tensor([[0.802, 0.602], [0.502, 0.402], [0.952, 0.102]], dtype=real)
    return StepBatch(
        ids=torch.arange(3),
        visits=torch.zeros(3, dtype=torch.long),
        xt=xt.to(dtype),
        x_prev=(0.95 * xt + 0.3 * draw(3, 2, 2, *LATENT)).to(dtype),
        t=t,
        t_prev=t - 0.1,
        eta=ETA[kind],
        weight=torch.tensor([[1.0, 0.5]], dtype=real).expand(3, 2, 2),
        cond={"shift": draw(3)},
        uncond=None if cfg_scale == 1 else {"shift": draw(3)},
        cfg_scale=cfg_scale,
        utility=torch.tensor([[1.0, 0.0]], dtype=real).expand(3, 2),
        mask=torch.ones(3, 2).bool(),
    )


def gradients(net: Linear, value: Tensor) -> Tensor:
    return torch.stack(torch.autograd.grad(value, (net.a, net.b), retain_graph=True))


def distribution(net: Linear, data: StepBatch, b: int, j: int, s: int) -> Normal | None:
    """One step's, written out from the sampler's definition; None where it adds no noise."""
    xt, t, t_prev = data.xt[b, j, s], data.t[b, s], data.t_prev[b, s]

    def call(shift: Tensor) -> Tensor:
        return (net.a * xt + net.b * shift * torch.cos(3 * t)).detach()

    pred = call(data.cond["shift"][b])
    if data.uncond is not None:
        free = call(data.uncond["shift"][b])
        pred = free + data.cfg_scale * (pred - free)
    if isinstance(net.schedule, RectifiedFlow):
        noise_level = data.eta * (t / (1 - (t_prev if t == 1 else t))).sqrt()
        dt = t_prev - t
        mean = xt + (pred + noise_level**2 / (2 * t) * (xt + (1 - t) * pred)) * dt
        std = noise_level * (-dt).sqrt()
    else:
        (alpha, sigma), (alpha_s, sigma_s) = net.schedule.alpha_sigma(t), net.schedule.alpha_sigma(t_prev)
        x0, noise = {
            "epsilon": lambda: ((xt - sigma * pred) / alpha, pred),
            "v_prediction": lambda: (alpha * xt - sigma * pred, alpha * pred + sigma * xt),
            "sample": lambda: (pred, (xt - alpha * pred) / sigma),
        }[net.schedule.prediction]()
        std = data.eta * (sigma_s / sigma) * (1 - (alpha / alpha_s) ** 2).sqrt()
        mean = alpha_s * x0 + (sigma_s**2 - std**2).sqrt() * noise
    return Normal(mean, std.expand_as(mean)) if std > 0 else None


K = torch.arange(16, dtype=torch.float64)


@dataclass
class Fixed:
    """A network with a given answer, whatever it is asked."""

    schedule: Schedule
    answer: Tensor

    gives = frozenset({"reference"})

    def __call__(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.answer.expand(len(xt), -1, -1, -1)

    def predict(self, xt: Tensor, t: Tensor, cond: Any, ids: Tensor) -> Tensor:
        return self(xt, t, cond).detach()


def published(timestep: int, *noises: Tensor) -> tuple[Fixed, Fixed, StepBatch, Tensor, Tensor]:
    """methods_core E3: policy, reference, the step with a candidate for each noise, mean_ref and std."""
    schedule = SCHEDULES["epsilon"]
    xt, eps = torch.cos(0.37 * K).reshape(1, 4, 2, 2), torch.sin(0.53 * K + 0.2).reshape(1, 4, 2, 2)
    eps_ref = eps + 0.01 * torch.cos(K).reshape(1, 4, 2, 2)
    t, s = torch.tensor([(timestep + 1) / 1000]).double(), torch.tensor([(max(timestep - 50, 0) + 1) / 1000]).double()
    mean, std = schedule.reverse_step(eps_ref, xt, t, s, 1.0)
    x_prev = torch.stack([mean + std * noise.reshape(1, 4, 2, 2) for noise in noises], dim=1)
    num = len(noises)
    data = StepBatch(
        ids=torch.zeros(1).long(),
        visits=torch.zeros(1).long(),
        xt=xt[:, None, None],
        x_prev=x_prev[:, :, None],
        t=t[:, None],
        t_prev=s[:, None],
        eta=1.0,
        weight=torch.ones(1, num, 1).double(),
        cond={},
        uncond=None,
        cfg_scale=1.0,
        utility=torch.tensor([[1.0, 0.0]]).double()[:, :num],
        mask=torch.ones(1, num).bool(),
    )
    return Fixed(schedule, eps.requires_grad_()), Fixed(schedule, eps_ref), data, mean, std


def test_published_step_at_751():
    policy, reference, data, mean, std = published(751, torch.cos(1.1 * K))
    agree(mean.flatten()[:3], [1.1292387458, 0.8621855309, 0.5171304307], atol=1e-9)
    agree(data.x_prev.flatten()[:3], [1.6868552420, 1.1151182108, 0.1889724997], atol=1e-9)
    agree(std.flatten(), [0.557616496156], atol=1e-9)
    t, s = data.t[:, 0], data.t_prev[:, 0]
    agree(
        policy.schedule.reverse_step(policy.answer, data.xt[:, 0, 0], t, s, 1.0)[0].flatten()[:3],
        [1.1332292177, 0.8643415920, 0.5154698084],
        atol=1e-9,
    )
    x0 = policy.schedule.to_x0(reference.answer, data.xt[:, 0, 0], t)
    agree(x0.flatten()[:3], [3.3773840864, 1.1821806300, -0.7738781063], atol=1e-8)
    result = step()(policy, reference, data)
    agree(result.logp, [[-0.5939752114]], atol=1e-7)  # the release holds the log-density's constant in float32
    agree(result.reference_logp, [[-0.5965394357]], atol=1e-7)
    agree(result.logratio.exp(), [[1.0025675147]], atol=1e-9)
    assert result.logp.dtype == torch.float64


def test_published_last_step():
    """Timestep 1 goes to the abar of timestep 0: still noisy."""
    policy, reference, data, mean, std = published(1, torch.cos(1.1 * K))
    agree(mean.flatten()[:1], [0.9961052124], atol=1e-9)
    agree(data.x_prev.flatten()[:1], [1.0167535325], atol=1e-9)
    agree(std.flatten(), [0.020648320165], atol=1e-9)
    result = step()(policy, reference, data)
    agree(result.logp, [[2.7030853063]], atol=1e-7)
    agree(result.reference_logp, [[2.6994980393]], atol=1e-7)
    agree(result.logratio.exp(), [[1.0035937089]], atol=1e-9)


def test_published_spo_pair():
    """methods_core E5, the tensors: candidates share x_t, so one evaluation makes the pair."""
    policy, reference, data, _, std = published(501, torch.cos(1.1 * K), torch.sin(1.7 * K))
    agree(std.flatten(), [0.429321149322], atol=1e-9)
    result = step()(policy, reference, data)
    agree(result.logratio, [[0.0022450105, 0.0003747978]], atol=1e-9)
    output = build("objective", {"name": "pair", "beta": 10, "ratio_clip": 0.1})(result)
    assert output.metrics["margin"].item() == pytest.approx(0.0187021273, abs=1e-9)
    assert output.loss.item() == pytest.approx(0.6838398375, abs=1e-9)
    (slope,) = torch.autograd.grad(output.loss, policy.answer)
    assert slope.norm().item() == pytest.approx(0.6989713931, abs=1e-9)
    assert slope.flatten()[0].item() == pytest.approx(0.1938409219, abs=1e-9)
    # linear in the prediction: mean (x_w - x_l)(mean - mean_ref) / std^2
    t, s = data.t[:, 0], data.t_prev[:, 0]
    means = [policy.schedule.reverse_step(net.answer, data.xt[:, 0, 0], t, s, 1.0)[0] for net in (policy, reference)]
    gap = (data.x_prev[:, 0, 0] - data.x_prev[:, 1, 0]) * (means[0] - means[1]) / std**2
    assert gap.mean().item() == pytest.approx(0.0018702127, abs=1e-9)
    torch.testing.assert_close(result.logratio[0, 0] - result.logratio[0, 1], gap.mean())


@every_schedule
@pytest.mark.parametrize("cfg_scale", [1.0, 5.0])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_densities_are_those_of_torch(kind, cfg_scale, shared, reduction):
    policy, reference, data = linear(kind), linear(kind, 0.35, 0.5), batch(kind, shared, cfg_scale)
    result = step(reduction=reduction)(policy, reference, data)
    per = D if reduction == "mean" else 1
    for b in range(3):
        for k in range(2):
            expected = torch.zeros(3, dtype=torch.float64)
            for s in range(2):
                ours, theirs = (distribution(net, data, b, 0 if shared else k, s) for net in (policy, reference))
                x_prev, weight = data.x_prev[b, k, s], data.weight[b, k, s] / per
                values = [ours.log_prob(x_prev), theirs.log_prob(x_prev), kl_divergence(ours, theirs)]
                expected += weight * torch.stack([value.sum() for value in values])
            found = torch.stack([result.logp[b, k], result.reference_logp[b, k], result.step_kl[b, k]])
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(result.t, data.t.mean(dim=1))


@every_schedule
def test_one_evaluation_for_candidates_of_one_latent(kind):
    """Sharing x_t is what repeating it gives, for half the rows; guidance doubles them in the same call."""
    for cfg_scale, rows in ((1.0, 6), (3.0, 12)):
        data = batch(kind, shared=True, cfg_scale=cfg_scale)
        once, twice = (linear(kind) for _ in range(2))
        reference = linear(kind, 0.35)
        short = step()(once, reference, data)
        long = step()(twice, linear(kind, 0.35), replace(data, xt=data.xt.expand(3, 2, 2, *LATENT)))
        assert once.rows == reference.rows == [rows] and twice.rows == [2 * rows]
        torch.testing.assert_close(short.logp, long.logp, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(short.logratio, long.logratio, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients(once, short.logp[0, 0]), gradients(twice, long.logp[0, 0]))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ratio_is_exactly_one_at_the_reference(kind, dtype):
    for cfg_scale in (1.0, 5.0):
        policy = linear(kind)
        result = step()(policy, policy, batch(kind, cfg_scale=cfg_scale, dtype=dtype))
        assert (result.logratio == 0).all() and (result.step_kl == 0).all()
        output = build("objective", {"name": "pair", "beta": 10, "ratio_clip": 0.1})(result)
        agree(output.per_prompt, [0.69314718056] * 3)
        on_policy = replace(batch(kind, dtype=dtype), logp_old=step()(policy, policy, batch(kind, dtype=dtype)).logp)
        again = step()(policy, policy, on_policy)
        metrics = build("objective", {"name": "grpo"})(again).metrics
        assert (metrics["ratio_deviation"] == 0).all()


@every_schedule
def test_latents_of_half_precision(kind):
    """What is stored is what is judged: float32 arithmetic on the rounded latents."""
    policy, data = linear(kind, dtype=torch.float32), batch(kind, dtype=torch.bfloat16)
    half = step()(policy, linear(kind, 0.35, dtype=torch.float32), data)
    assert half.logp.dtype == torch.float32
    rounded = replace(data, xt=data.xt.float(), x_prev=data.x_prev.float())
    single = step()(policy, linear(kind, 0.35, dtype=torch.float32), rounded)
    torch.testing.assert_close(half.logp, single.logp, rtol=0, atol=0)
    double = replace(batch(kind), xt=data.xt.double(), x_prev=data.x_prev.double())
    exact = step()(linear(kind), linear(kind, 0.35), double)
    torch.testing.assert_close(half.logratio.double(), exact.logratio, rtol=1e-3, atol=2e-5)


def test_networks_of_half_precision():
    """Their answer is taken to float32 before anything is subtracted or divided."""

    class Half(Linear):
        def __call__(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
            return super().__call__(xt, t, cond).bfloat16()

    policy = linear("epsilon", dtype=torch.float32)
    half = Half(policy.schedule, policy.a, policy.b)
    result = step()(half, half, batch("epsilon", dtype=torch.float32))
    assert result.logp.dtype == torch.float32 and (result.logratio == 0).all()
    exact = step()(policy, policy, batch("epsilon", dtype=torch.float32))
    torch.testing.assert_close(result.logp, exact.logp, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind,eta", [("epsilon", 0.0), ("v", 0.0), ("flow", 0.0)])
def test_steps_without_noise_count_nothing(kind, eta):
    policy = linear(kind)
    result = step()(policy, linear(kind, 0.35), replace(batch(kind), eta=eta))
    for values in (result.logp, result.reference_logp, result.step_kl):
        assert (values == 0).all()
    assert (gradients(policy, result.logp.sum() + result.step_kl.sum()) == 0).all()


def test_a_step_to_clean_data_counts_nothing():
    """DDIM's last step has no noise where it ends at t = 0; the steps before it count as ever."""
    data = batch("epsilon")
    to_clean = replace(data, t_prev=torch.stack([data.t_prev[:, 0], torch.zeros(3).double()], dim=1))
    policy = linear("epsilon")
    found = step()(policy, linear("epsilon", 0.35), to_clean)
    first = replace(data, weight=data.weight * torch.tensor([1.0, 0.0]))
    expected = step()(policy, linear("epsilon", 0.35), first)
    torch.testing.assert_close(found.logp, expected.logp, rtol=0, atol=0)
    grad = gradients(policy, found.logp.sum())
    assert grad.isfinite().all() and torch.equal(grad, gradients(policy, expected.logp.sum()))


@every_schedule
def test_a_weight_of_zero_carries_no_gradient(kind):
    """M-DPO's action mask: what the policy did not draw, whatever was recorded there, neither counts nor trains."""
    data, policy = batch(kind), linear(kind)
    weight = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(3, 2, 2)
    pasted = data.x_prev.clone()
    pasted[:, :, 1] = 17.0
    masked = step()(policy, linear(kind, 0.35), replace(data, weight=weight, x_prev=pasted))
    alone = replace(
        data,
        xt=data.xt[:, :, :1],
        x_prev=data.x_prev[:, :, :1],
        t=data.t[:, :1],
        t_prev=data.t_prev[:, :1],
        weight=weight[:, :, :1],
    )
    expected = step()(policy, linear(kind, 0.35), alone)
    torch.testing.assert_close(masked.logratio, expected.logratio)
    torch.testing.assert_close(masked.step_kl, expected.step_kl)
    torch.testing.assert_close(gradients(policy, masked.logp.sum()), gradients(policy, expected.logp.sum()))
    none = step()(policy, linear(kind, 0.35), replace(data, weight=torch.zeros(3, 2, 2).double()))
    assert (none.logp == 0).all() and (gradients(policy, none.logp.sum()) == 0).all()


@every_schedule
def test_a_detached_unconditional_branch_changes_the_gradient_alone(kind):
    data, reference = batch(kind, cfg_scale=4.0), linear(kind, 0.35)
    trained, detached = (linear(kind) for _ in range(2))
    one, other = step()(trained, reference, data), step(uncond="detached")(detached, reference, data)
    torch.testing.assert_close(one.logp, other.logp, rtol=0, atol=0)
    torch.testing.assert_close(one.step_kl, other.step_kl, rtol=0, atol=0)
    slopes = gradients(trained, one.logp.sum()), gradients(detached, other.logp.sum())
    # the branches share a x: its slope is 1 - 4 + 4 times that of one branch, or 4 times
    torch.testing.assert_close(4 * slopes[0][0], slopes[1][0])
    assert not torch.isclose(slopes[0][1], slopes[1][1])


@every_schedule
def test_micro_batches_are_slices(kind):
    data = replace(batch(kind, cfg_scale=2.0), logp_old=torch.arange(6).reshape(3, 2).double())
    whole = step()(linear(kind), linear(kind, 0.35), data)
    assert len(data) == 3 and len(data[:2]) == 2
    for rows in (slice(0, 1), slice(1, 3)):
        part = step()(linear(kind), linear(kind, 0.35), data[rows].to("cpu"))
        for name in ("logp", "logp_ref", "kl", "logp_old", "utility", "mask", "t"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows], rtol=1e-13, atol=1e-13)


@every_schedule
def test_old_densities_follow_the_reduction(kind):
    """A source records means; against a sum they are as many times larger."""
    policy, data = linear(kind), batch(kind)
    data = replace(data, logp_old=step()(policy, policy, data).logp.detach())
    for reduction in ("mean", "sum"):
        result = step(reduction=reduction)(policy, policy, data)
        torch.testing.assert_close(result.old_logp, result.logp)
    assert step(reduction="sum")(policy, policy, replace(data, logp_old=None)).logp_old is None


def drawn_means(kind: str, net: Linear, data: StepBatch) -> Tensor:
    """The means of the Gaussians that `net` draws x_prev from, [B, K, S, C, H, W]."""
    xt, t, s = data.xt.expand_as(data.x_prev), *(x[:, None].expand(3, 2, 2).flatten() for x in (data.t, data.t_prev))
    cond = {"shift": data.cond["shift"][:, None, None].expand(3, 2, 2).flatten()}
    flat = xt.flatten(0, 2)
    mean, _ = SCHEDULES[kind].reverse_step(net(flat, t, cond).detach(), flat, t, s, data.eta)
    return mean.reshape(data.x_prev.shape)


@every_schedule
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_normalized_ratios_are_grpo_guards(kind, shared, reduction):
    """std (log-ratio + |mean - mean_old|^2 / (2 std^2)) of each step, the log-ratio as torch has it."""
    policy, old, data = linear(kind), linear(kind, 0.37, 0.4), batch(kind, shared)
    data = replace(data, mean_old=drawn_means(kind, old, data), logp_old=torch.full((3, 2), 7.0).double())
    reference = linear(kind, 0.35, 0.5)
    result = step(reduction=reduction, ratio="normalized")(policy, reference, data)
    per = D if reduction == "mean" else 1
    for b in range(3):
        for k in range(2):
            expected = torch.zeros(2, dtype=torch.float64)
            for s in range(2):
                j, x_prev = 0 if shared else k, data.x_prev[b, k, s]
                before = distribution(old, data, b, j, s)
                for i, net in enumerate((policy, reference)):
                    now = distribution(net, data, b, j, s)
                    std = now.stddev.flatten()[0]
                    log_ratio = (now.log_prob(x_prev) - before.log_prob(x_prev)).sum()
                    bias = (now.mean - before.mean).square().sum() / (2 * std**2)
                    expected[i] += data.weight[b, k, s] / per * std * (log_ratio + bias)
            found = torch.stack([result.logp[b, k].detach(), result.reference_logp[b, k]])
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert (result.old_logp == 0).all()
    torch.testing.assert_close(result.rate, torch.full((3,), 10.0).double())
    torch.testing.assert_close(result.kl, step(reduction=reduction)(policy, reference, data).kl)
    at_old = step(ratio="normalized")(old, old, data)
    torch.testing.assert_close(at_old.logp, torch.zeros(3, 2).double(), rtol=0, atol=1e-14)


@every_schedule
def test_normalized_ratios_are_odd_in_the_noise(kind):
    """So their mean over the draws is 0 however far the policy has gone, as the plain log-ratio's is not."""
    policy, old, data = linear(kind), linear(kind, 0.37, 0.4), batch(kind)
    means = drawn_means(kind, old, data)
    found = []
    for sign in (1, -1):
        drawn = means + sign * (data.x_prev - means)
        found.append(step(ratio="normalized")(policy, policy, replace(data, mean_old=means, x_prev=drawn)).logp)
    torch.testing.assert_close(found[0], -found[1])


def test_normalized_ratios_need_the_means():
    with pytest.raises(UserError, match="source.record_means=true"):
        step(ratio="normalized")(linear("flow"), linear("flow"), batch("flow"))
    assert step(ratio="normalized").needs == {"means"} and step().needs == frozenset()


def test_no_reference_is_never_called():
    policy = linear("epsilon")
    result = step()(policy, build("reference", {"name": "none"}).bind(None), batch("epsilon"))
    assert result.logp_ref is None and result.kl is None and policy.rows == [12]
    assert step().gives == {"logp", "old"}


def trajectories(kind: str, net: Linear, num: int, num_steps: int = 4, latent: tuple[int, ...] = LATENT) -> StepBatch:
    """`num` prompts of two candidates from one x_T, drawn by `net` and recorded by the sampler itself."""
    generator = torch.Generator().manual_seed(1)
    steps: list[SamplerStep] = []
    shift = torch.randn(num, generator=generator, dtype=torch.float64)
    noise = torch.randn(num, 1, *latent, generator=generator, dtype=torch.float64).expand(num, 2, *latent)

    def step_noise(index: int) -> Tensor:
        return torch.randn(2 * num, *latent, generator=torch.Generator().manual_seed(index + 2), dtype=torch.float64)

    sample(
        net,
        {"shift": shift.repeat_interleave(2)},
        None,
        noise.flatten(0, 1),
        sampler="flow-sde" if kind == "flow" else "ddim",
        num_steps=num_steps,
        cfg_scale=1.0,
        eta=ETA[kind],
        step_noise=step_noise,
        on_step=steps.append,
    )

    def recorded(name: str) -> Tensor:
        return torch.stack([getattr(one, name).unflatten(0, (num, 2)) for one in steps], dim=2)

    return StepBatch(
        ids=torch.arange(num),
        visits=torch.zeros(num).long(),
        xt=recorded("xt"),
        x_prev=recorded("x_prev"),
        t=torch.tensor([one.t for one in steps]).double().expand(num, -1),
        t_prev=torch.tensor([one.s for one in steps]).double().expand(num, -1),
        eta=ETA[kind],
        weight=torch.ones(num, 2, len(steps)).double(),
        cond={"shift": shift},
        uncond=None,
        cfg_scale=1.0,
        utility=torch.tensor([[1.0, 0.0]]).double().expand(num, 2),
        mask=torch.ones(num, 2).bool(),
    )


def one_step(data: StepBatch, s: int) -> StepBatch:
    names = {name: getattr(data, name)[:, :, s : s + 1] for name in ("xt", "x_prev", "weight")}
    return replace(data, **names, t=data.t[:, s : s + 1], t_prev=data.t_prev[:, s : s + 1])


@every_schedule
def test_a_trajectory_is_the_sum_of_its_steps(kind):
    """The joint log-ratio of the chain, written out; a pair of trajectories is M-DPO with every step drawn."""
    drawn_by, policy = linear(kind, 0.35), linear(kind)
    data = trajectories(kind, drawn_by, num=3)
    assert torch.equal(data.xt[:, :, 1:], data.x_prev[:, :, :-1])  # a chain
    whole = step(reduction="sum")(policy, drawn_by, data)
    steps = [step(reduction="sum")(policy, drawn_by, one_step(data, s)) for s in range(4)]
    torch.testing.assert_close(whole.logratio, torch.stack([one.logratio for one in steps]).sum(dim=0))
    joint = torch.zeros(3, 2, dtype=torch.float64)
    for b in range(3):
        for k in range(2):
            for s in range(4):
                both = distribution(policy, data, b, k, s), distribution(drawn_by, data, b, k, s)
                if both[0] is not None:
                    ours, theirs = (one.log_prob(data.x_prev[b, k, s]).sum() for one in both)
                    joint[b, k] += ours - theirs
    torch.testing.assert_close(whole.logratio.detach(), joint, rtol=1e-6, atol=1e-8)
    m_dpo = build("objective", {"name": "pair", "beta": 0.1})(whole)
    gap = 0.1 * (joint[:, 0] - joint[:, 1])
    torch.testing.assert_close(m_dpo.per_prompt.detach(), torch.nn.functional.softplus(-gap), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind,a", [("epsilon", 0.355), ("flow", 0.40)])
def test_ratios_of_whole_trajectories_are_importance_weights(kind, a):
    """Under the weights that drew them their mean is 1, and what they weigh is drawn as the other policy draws it."""
    drawn_by, policy = linear(kind, 0.35), linear(kind, a)
    data = trajectories(kind, drawn_by, num=100_000, latent=(1, 1, 1))
    with torch.no_grad():
        ratio = step(reduction="sum")(policy, drawn_by, data).logratio.exp()
    error = ratio.std() / ratio.numel() ** 0.5
    assert 1e-4 < error < 0.02 and abs(ratio.mean() - 1) < 4 * error
    size = data.x_prev[:, :, -1].flatten(1).square()
    other = trajectories(kind, policy, num=100_000, latent=(1, 1, 1)).x_prev[:, :, -1].flatten(1).square()
    change = (other - size).mean()  # from the same noises, so known far better than either mean
    weighed = (ratio - 1) * size
    error = weighed.std() / size.numel() ** 0.5
    assert abs(weighed.mean() - change) < 4 * error < 0.5 * abs(change)


def test_branch_trees_are_weights_and_a_listwise_loss():
    """TreePO, C-tree: steps weigh 1 + cos of their features with the first branch's, scores are weighted means."""
    features = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    tree_weight = 1 + torch.nn.functional.cosine_similarity(features[1], features[0], dim=0)
    assert tree_weight.item() == pytest.approx(1.5)
    policy, reference, data = linear("epsilon"), linear("epsilon", 0.35), trajectories("epsilon", linear("epsilon"), 3)
    omega = torch.tensor([[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, tree_weight, 1.0]], dtype=torch.float64).expand(3, 2, 4)
    result = step()(policy, reference, replace(data, weight=omega / omega.sum(dim=2, keepdim=True)))
    each = torch.stack([step()(policy, reference, one_step(data, s)).logratio for s in range(4)], dim=2)
    score = (omega * each).sum(dim=2) / omega.sum(dim=2)
    torch.testing.assert_close(result.logratio, score)
    torch.testing.assert_close(result.logratio[:, 0], each[:, 0].mean(dim=1))  # equal features: the plain mean

    def listwise(logratio: Tensor) -> Tensor:
        made = Likelihoods(logratio, torch.zeros_like(logratio), data.utility, data.mask)
        return build("objective", {"name": "lambda_rank", "beta": 1})(made).per_prompt

    found = build("objective", {"name": "lambda_rank", "beta": 1})(result).per_prompt
    torch.testing.assert_close(found, listwise(score))
    # C-lambda-2 of two branches: a weight of 0.532456 on the pair's loss
    expected = 0.532456 * torch.nn.functional.softplus(score[:, 1] - score[:, 0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
