"""Objectives on recorded steps and on the policy's own images: D3PO, SPO, GRPO, P3O, DiffusionNFT, SePPO, XPO."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from likelihood_makers import Rows, agree, check_sound, columns, from_errors, gradient

from diffalign.registry import build
from diffalign.types import Likelihoods, UserError


def of_steps(logp: Rows, ref: Rows | None, utility: Rows, old: Rows | None = None, mask=None) -> Likelihoods:
    """Rows are prompts, columns candidates; step log-densities as they stand."""
    made = from_errors(logp, ref, utility, mask)
    scaled = {"logp": (-2 * made.logp).detach().requires_grad_()}
    if made.logp_ref is not None:
        scaled["logp_ref"] = -2 * made.logp_ref
    if old is not None:
        scaled["logp_old"] = torch.tensor(old, dtype=torch.float64)
    return replace(made, **scaled)


def slope(objective, likelihoods: Likelihoods) -> torch.Tensor:
    """d(mean of per_prompt)/d logp: [B, K]."""
    return -2 * gradient(objective, likelihoods) / len(likelihoods.logp)


D3PO = {"name": "pair", "beta": 0.1, "ratio_clip": 0.1}
SPO = {"name": "pair", "beta": 10, "ratio_clip": 0.1}
L0, REF0 = [-0.50, -0.20, 1.10, 0.30], [-0.52, -0.35, 1.00, 0.30]
L1, REF1 = [-0.61, -0.20, 0.90, 0.25], [-0.60, -0.30, 0.95, 0.33]
PREFERRED = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]


def test_d3po():
    """methods_core E4; the tied pair is masked: the code's ln 2 is 0 here, its zero gradient stays."""
    mask = [[True, True]] * 3 + [[False, False]]
    likelihoods = of_steps(columns(L0, L1), columns(REF0, REF1), PREFERRED, mask=mask)
    output = check_sound(build("objective", D3PO), likelihoods)
    agree(output.per_prompt, [0.6916483056, 0.6931471806, 0.6859080651, 0.0], atol=1e-9)
    assert output.loss.item() + math.log(2) / 4 == pytest.approx(0.690962682957, abs=1e-11)
    expected = columns([-0.01248125, 0.0, 0.0, 0.0], [0.01248125, 0.0, 0.0124091827, 0.0])
    agree(slope(build("objective", D3PO), likelihoods), expected, atol=1e-9)
    clipped = output.metrics["clip_fraction"]
    # 1.0202, 0.9900; 1.1618, 1.1052; 1.1052, 0.9512
    agree(clipped[:3], [0.0, 1.0, 0.5])
    assert clipped[3].isnan()


def test_a_kept_tie_is_half_a_win_with_clipped_ratios_too():
    likelihoods = of_steps(columns(L0, L1), columns(REF0, REF1), PREFERRED)
    output = build("objective", D3PO)(likelihoods)
    margin = 0.1 * (0.0 - (0.25 - 0.33))
    agree(output.per_prompt[3:], [0.5 * (math.log1p(math.exp(margin)) + math.log1p(math.exp(-margin)))], atol=1e-12)


def test_spo():
    """methods_core E5, the loss."""
    d_w, d_l = [0.010, -0.020, 0.150, 0.0], [-0.005, 0.030, -0.200, 0.0]
    likelihoods = of_steps(columns(d_w, d_l), [[0.0, 0.0]] * 4, [[1.0, 0.0]] * 4)
    output = check_sound(build("objective", SPO), likelihoods)
    agree(output.per_prompt, [0.6209570478, 0.9740769842, 0.1261308799, 0.6931471806], atol=1e-9)
    assert output.loss.item() == pytest.approx(0.603578023111, abs=1e-11)
    winner = [-1.1564253866, -1.556148328, 0.0, -1.25]
    agree(slope(build("objective", SPO), likelihoods), columns(winner, [-x for x in winner]), atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_clip_is_hard_on_both_sides(sign):
    """Row 42's vector, and no overflow where exp has one; outside, right or wrong, exactly no gradient."""
    ratios = [0.05, 0.3, -0.3, 1e4, -1e4]
    expected = [0.05, 0.0953, -0.1054, 0.0953, -0.1054]
    utility = [[1.0, 0.0] if sign > 0 else [0.0, 1.0]] * 5
    pair = build("objective", {"name": "pair", "beta": 1.0, "ratio_clip": 0.1})
    for dtype in (torch.float64, torch.float32):
        likelihoods = of_steps([[x, 0.0] for x in ratios], [[0.0, 0.0]] * 5, utility)
        likelihoods = replace(likelihoods, logp=likelihoods.logp.detach().to(dtype).requires_grad_())
        output = check_sound(pair, likelihoods)
        agree(output.metrics["margin"], [sign * x for x in expected], atol=1e-4)
        grad = slope(pair, likelihoods)
        assert (grad[1:, 0] == 0).all() and grad[0, 0] * sign < 0
        agree(output.metrics["clip_fraction"], [0.0, 0.5, 0.5, 0.5, 0.5])


def test_a_wide_clip_is_no_clip():
    likelihoods = of_steps(columns(L0, L1), columns(REF0, REF1), PREFERRED)
    clipped = build("objective", {"name": "pair", "beta": 3, "beta_loser": 2, "ratio_clip": 0.9})(likelihoods)
    plain = build("objective", {"name": "pair", "beta": 3, "beta_loser": 2})(likelihoods)
    torch.testing.assert_close(clipped.per_prompt, plain.per_prompt, rtol=0, atol=0)
    assert "clip_fraction" not in plain.metrics and (clipped.metrics["clip_fraction"] == 0).all()


@pytest.mark.parametrize(
    "spec,match",
    [
        ({"name": "pair", "ratio_clip": 0.0}, r"objective.ratio_clip must lie in \(0, 1\)"),
        ({"name": "pair", "ratio_clip": 1.0}, r"objective.ratio_clip must lie in \(0, 1\)"),
        ({"name": "pair", "ratio_clip": 0.1, "reference_strength": 0}, "leave reference_strength at 1"),
        ({"name": "grpo", "clip": 0}, "objective.clip"),
        ({"name": "grpo", "clip": 1}, "objective.clip"),
        ({"name": "grpo", "max_advantage": 0}, "objective.max_advantage"),
        ({"name": "nft", "beta": 0}, "objective.beta"),
        ({"name": "nft", "scale": 0}, "objective.scale"),
        ({"name": "nft", "scale": 1.0, "utility": "probability"}, "objective.utility=reward"),
        ({"name": "seppo", "beta": 0}, "objective.beta"),
        ({"name": "explore", "beta": -1}, "objective.beta"),
    ],
)
def test_bad_settings(spec, match):
    with pytest.raises(UserError, match=match):
        build("objective", spec)


def test_needs():
    def needs(**spec):
        return build("objective", spec).needs

    assert needs(**D3PO) == {"pair", "reference"}
    assert needs(name="grpo") == needs(name="grpo", advantages="leave-one-out") == {"old", "list"}
    assert needs(name="grpo", advantages="given") == {"old"}
    assert needs(name="nft") == {"reference", "list"} and needs(name="nft", utility="probability") == {"reference"}
    assert needs(name="sum", terms=[{"name": "grpo"}, {"name": "kl"}]) == {"old", "list", "reference"}
    with pytest.raises(UserError, match="likelihood.name=step"):
        build("objective", {"name": "grpo"})(from_errors([[0.1, 0.2]], None, [[1.0, 0.0]]))
    for name in ("grpo", "nft"):
        one = of_steps([[0.1]], [[0.1]], [[1.0]], [[0.1]])
        with pytest.raises(UserError, match="1 candidate"):
            build("objective", {"name": name})(replace(one, kl=torch.zeros(1, 1)))


REWARDS = [[1.0, 2.0, 4.0, 5.0], [0.3, 0.3, 0.3, 0.3], [0.0, 0.0, 0.0, 1.0]]
OLD = [[-0.9, -0.8, -0.7, -0.6]] * 3
MOVED = [[0.3, -0.3, 0.1, 0.25], [0.2, 0.0, -0.2, 0.1], [-0.25, 0.05, 0.25, -0.3]]


def group(**changes) -> Likelihoods:
    logp = [[o + m for o, m in zip(*rows, strict=True)] for rows in zip(OLD, MOVED, strict=True)]
    return replace(of_steps(logp, None, REWARDS, OLD), **changes)


def standardised(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-4)


def test_grpo_is_the_clipped_surrogate():
    rewards, moved = torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(MOVED, dtype=torch.float64)
    advantage, ratio = standardised(rewards), moved.exp()
    advantage[1] = 0
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean(
        dim=1
    )  # as PPO's codes say it
    grpo = build("objective", {"name": "grpo", "clip": 0.2})
    output = check_sound(grpo, group())
    torch.testing.assert_close(output.per_prompt, expected)
    assert output.per_prompt[1] == 0 and (slope(grpo, group())[1] == 0).all()  # a group of equals teaches nothing
    torch.testing.assert_close(output.metrics["ratio_deviation"], (ratio - 1).abs().mean(dim=1))
    agree(output.metrics["clip_fraction"], [0.75, 0.25, 0.75])
    torch.testing.assert_close(output.metrics["advantage"], advantage.abs().mean(dim=1))
    # no gradient where the ratio already went the right way past the clip, the full one where it went the wrong way
    grad = 3 * 4 * slope(grpo, group())
    is_past = torch.where(advantage > 0, ratio > 1.2, ratio < 0.8)
    torch.testing.assert_close(grad, torch.where(is_past, 0.0, -advantage * ratio))
    assert is_past[0].tolist() == [False, True, False, True] and is_past[2].tolist() == [True, False, False, False]


def test_grpo_at_the_weights_that_drew():
    """A ratio of exactly 1: the gradient is the policy gradient -A / K, whatever the clip."""
    at_old = replace(group(), logp=torch.tensor(OLD, dtype=torch.float64).requires_grad_())
    for spec in ({"name": "grpo"}, {"name": "grpo", "clip": 0.2}):
        output = build("objective", spec)(at_old)
        assert (output.metrics["ratio_deviation"] == 0).all() and (output.metrics["clip_fraction"] == 0).all()
        expected = -standardised(torch.tensor(REWARDS, dtype=torch.float64)) / 4
        expected[1] = 0
        torch.testing.assert_close(3 * slope(build("objective", spec), at_old), expected)


def test_grpo_weighs_by_the_rate_of_the_steps():
    """GRPO-Guard's loss over |dt|; the metrics count ratios and stay."""
    rate = torch.tensor([2.0, 5.0, 0.5], dtype=torch.float64)
    grpo = build("objective", {"name": "grpo", "clip": 0.2})
    plain, rated = grpo(group()), grpo(replace(group(), rate=rate))
    torch.testing.assert_close(rated.per_prompt, rate * plain.per_prompt)
    assert all(torch.equal(rated.metrics[name], plain.metrics[name]) for name in plain.metrics)


def test_equal_rewards_teach_exactly_nothing():
    """Three times 0.1 has a mean that is not 0.1, and the standard deviation would magnify what is left."""
    level = of_steps([[0.1, 0.0, -0.1]], None, [[0.1] * 3], [[0.0] * 3])
    for name in ("group", "leave-one-out"):
        grpo = build("objective", {"name": "grpo", "advantages": name})
        assert grpo(level).per_prompt == 0 and (slope(grpo, level) == 0).all()


def test_advantages_are_bounded():
    many = [[1.0] + [0.0] * 63]
    likelihoods = of_steps([[0.0] * 64], None, many, [[0.0] * 64])
    bounded = -64 * slope(build("objective", {"name": "grpo"}), likelihoods)
    free = -64 * slope(build("objective", {"name": "grpo", "max_advantage": None}), likelihoods)
    assert bounded[0, 0].item() == 5 and free[0, 0].item() == pytest.approx(math.sqrt(63), rel=1e-2)
    torch.testing.assert_close(bounded[0, 1:], free[0, 1:])


def test_given_advantages_and_masks():
    grpo = build("objective", {"name": "grpo", "advantages": "given", "clip": 0.2})
    given = standardised(torch.tensor(REWARDS, dtype=torch.float64))
    ours = build("objective", {"name": "grpo", "clip": 0.2})
    torch.testing.assert_close(grpo(group(utility=given)).per_prompt, ours(group()).per_prompt, atol=1e-12, rtol=1e-12)
    mask = torch.tensor([[True, True, True, False]] * 2 + [[False] * 4])
    broken = torch.tensor(REWARDS, dtype=torch.float64).masked_fill(~mask, torch.nan)
    for name in ("group", "leave-one-out", "given"):
        spec = {"name": "grpo", "clip": 0.2, "advantages": name}
        output = build("objective", spec)(group(mask=mask, utility=broken))
        assert output.per_prompt.isfinite().all() and output.per_prompt[2] == 0
        assert output.metrics["advantage"][2].isnan()
        assert (slope(build("objective", spec), group(mask=mask, utility=broken))[~mask] == 0).all()


def test_ratios_of_any_size_are_finite():
    far = [[500.0, -500.0], [-500.0, 500.0]]
    likelihoods = of_steps(far, None, [[1.0, 0.0]] * 2, [[0.0, 0.0]] * 2)
    for dtype in (torch.float64, torch.float32):
        as_dtype = replace(
            likelihoods,
            logp=likelihoods.logp.detach().to(dtype).requires_grad_(),
            utility=likelihoods.utility.to(dtype),
        )
        check_sound(build("objective", {"name": "grpo"}), as_dtype)


def test_p3o_is_leave_one_out_of_a_pair():
    """Row 40: -1/2 (R_1 - R_2)(log-likelihood gap) at the old weights; a constant on the rewards changes nothing."""
    rewards = [[0.7, 0.2], [0.1, 0.6], [0.4, 0.4]]
    old = [[-0.5, -0.4]] * 3
    p3o = build("objective", {"name": "grpo", "advantages": "leave-one-out", "clip": 0.2})
    at_old = of_steps(old, None, rewards, old)
    agree(3 * slope(p3o, at_old), [[-0.25, 0.25], [0.25, -0.25], [0.0, 0.0]])
    moved = of_steps([[-0.4, -0.45]] * 3, None, rewards, old)
    ratio = torch.tensor([[0.1, -0.05]] * 3, dtype=torch.float64).exp()
    gap = torch.tensor([0.5, -0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(p3o(moved).per_prompt, -0.5 * gap * (ratio[:, 0] - ratio[:, 1]))
    shifted = replace(moved, utility=moved.utility + torch.tensor([[3.0], [-1.0], [0.5]]))
    torch.testing.assert_close(p3o(shifted).per_prompt, p3o(moved).per_prompt)


def test_the_policy_gradient_is_unbiased():
    """Over the old policy's own draws its mean is the gradient of the expected reward: three actions, exactly."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([1.0, 0.2, 0.6], dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    logp = logits.log_softmax(0)
    both = torch.stack([logp[first], logp[second]], dim=1)
    utility = torch.stack([reward[first], reward[second]], dim=1)
    pairs = Likelihoods(both, None, utility, torch.ones(9, 2).bool(), logp_old=both.detach())
    loss = build("objective", {"name": "grpo", "advantages": "leave-one-out"})(pairs).per_prompt
    probability = both.detach().sum(dim=1).exp()
    (found,) = torch.autograd.grad((probability * loss).sum(), logits)
    torch.testing.assert_close(found, -expected)


def test_grpo_with_kl():
    kl = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3, dtype=torch.float64)
    both = build("objective", {"name": "sum", "terms": [{"name": "grpo"}, {"name": "kl", "weight": 0.04}]})
    likelihoods = group(kl=kl)
    expected = build("objective", {"name": "grpo"})(likelihoods).per_prompt + 0.04 * 0.25
    torch.testing.assert_close(both(likelihoods).per_prompt, expected)


@pytest.mark.parametrize("beta", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("rewards", ["reward", "probability"])
def test_nft_against_explicit_tensors(beta, rewards):
    """r |v+ - target|^2 + (1 - r) |v- - target|^2 and its gradient with respect to v, from errors and step KL alone."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    v_old, target, utility = draw(5, 4, 12), draw(5, 4, 12), torch.rand(5, 4, generator=generator).double()
    v = (v_old + 0.3 * draw(5, 4, 12)).requires_grad_()
    v_plus, v_minus = (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v
    gap = utility - utility.mean(dim=1, keepdim=True)
    r = utility if rewards == "probability" else 0.5 + 0.5 * (gap / 0.4).clamp(-1, 1)
    assert rewards == "probability" or ((r == 1) | (r == 0)).any()  # some are at the bound
    each = r * (v_plus - target).square().mean(2) + (1 - r) * (v_minus - target).square().mean(2)
    expected = each.mean(dim=1)
    (slope_of_v,) = torch.autograd.grad(expected.sum(), v)

    likelihoods = Likelihoods(
        logp=-0.5 * (v - target).square().mean(2),
        logp_ref=-0.5 * (v_old - target).square().mean(2),
        utility=utility,
        mask=torch.ones(5, 4).bool(),
        kl=0.5 * (v - v_old).square().mean(2),
    )
    spec = {"name": "nft", "beta": beta, "utility": rewards} | ({"scale": 0.4} if rewards == "reward" else {})
    output = build("objective", spec)(likelihoods)
    torch.testing.assert_close(output.per_prompt, expected)
    (found,) = torch.autograd.grad(output.per_prompt.sum(), v)
    torch.testing.assert_close(found, slope_of_v)
    torch.testing.assert_close(output.metrics["optimality"], r.mean(dim=1))
    torch.testing.assert_close(output.metrics["distance"], (v.detach() - v_old).square().mean(dim=(1, 2)))


def nft_state(utility: Rows, **changes) -> Likelihoods:
    made = from_errors([[0.3, 0.4, 0.5, 0.6]], [[0.35, 0.35, 0.5, 0.5]], utility)
    return replace(made, kl=torch.full((1, 4), 0.01, dtype=torch.float64), **changes)


def test_nft_scale_and_limits():
    likelihoods = nft_state([[1.0, 2.0, 4.0, 5.0]])
    z = 5 * (torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64).std(correction=0).item() + 1e-4)
    ours = build("objective", {"name": "nft"})(likelihoods).per_prompt
    torch.testing.assert_close(ours, build("objective", {"name": "nft", "scale": z})(likelihoods).per_prompt)
    # r = 1 and beta = 1: plain fine-tuning on the image
    sure = build("objective", {"name": "nft", "utility": "probability"})
    agree(sure(nft_state([[1.0] * 4])).per_prompt, [0.45], atol=1e-12)
    # r = 1/2: only the distance to the old policy is left, and with equal rewards that is what a group gives
    flat = build("objective", {"name": "nft", "beta": 0.5})(nft_state([[0.3] * 4]))
    agree(flat.per_prompt, [0.425 + 0.25 * 0.02], atol=1e-12)
    # at v_old the two targets are one, and the pull is 2 r - 1
    at_old = from_errors([[0.35, 0.5]], [[0.35, 0.5]], [[1.0, 0.2]])
    at_old = replace(at_old, kl=torch.zeros(1, 2, dtype=torch.float64))
    agree(sure(at_old).per_prompt, [0.425], atol=1e-12)
    agree(gradient(sure, at_old), [[0.5, -0.3]])
    mask = torch.tensor([[True, True, False, False]])
    output = build("objective", {"name": "nft"})(nft_state([[1.0, 2.0, 9.0, 9.0]], mask=mask))
    two = nft_state([[1.0, 2.0, 9.0, 9.0]]).select([0, 1])
    torch.testing.assert_close(output.per_prompt, build("objective", {"name": "nft"})(two).per_prompt)


def test_nft_of_two_draws_is_the_mean_of_their_losses():
    nft = build("objective", {"name": "nft", "beta": 0.5})
    one = nft_state([[1.0, 2.0, 4.0, 5.0]])
    other = replace(one, logp=one.logp - 0.03, logp_ref=one.logp_ref + 0.01, kl=one.kl + 0.02)
    mean = replace(one, logp=one.logp - 0.015, logp_ref=one.logp_ref + 0.005, kl=one.kl + 0.01, draws=(one, other))
    torch.testing.assert_close(nft(mean).per_prompt, 0.5 * (nft(one).per_prompt + nft(other).per_prompt))


B = (columns([0.1000, 0.2500], [0.3000, 0.2000]), columns([0.1004, 0.2497], [0.2999, 0.2003]))
ROWS = (columns([0.10, 0.25, 0.08], [0.12, 0.20, 0.30]), columns([0.13, 0.22, 0.15], [0.11, 0.24, 0.25]))


@pytest.mark.parametrize(
    "flip,expected,mean",
    [
        ("sign", [0.47407698418, 0.69314718056], 0.58361208237),
        ("indicator", [0.47407698418, 0.854355244469], 0.664216114324),
        ("none", [0.47407698418, 1.03748795049], 0.755782467333),
    ],
)
def test_seppo(flip, expected, mean):
    """methods_more 12."""
    likelihoods = from_errors(*B, [[1.0, 0.0]] * 2)
    seppo = build("objective", {"name": "seppo", "beta": 2000, "flip": flip})
    output = check_sound(seppo, likelihoods)
    agree(output.per_prompt, expected, atol=1e-10)
    assert output.loss.item() == pytest.approx(mean, abs=1e-10)
    agree(output.metrics["flip_rate"], [0.0, 1.0])
    grad = gradient(seppo, likelihoods)
    agree(grad[0], [377.540668798, -377.540668798])
    if flip == "sign":
        agree(grad[1], [500.0, 500.0])
    if flip == "indicator":
        assert grad[1, 0] > 0 and grad[1, 1] == 0
    if flip == "none":
        dpo = build("objective", {"name": "pair", "beta": 2000})
        torch.testing.assert_close(output.per_prompt, dpo(likelihoods).per_prompt)
        torch.testing.assert_close(grad, gradient(dpo, likelihoods))


def test_seppo_rows():
    """C-seppo: the reference is better on the second winner."""
    likelihoods = from_errors(*ROWS, [[1.0, 0.0]] * 3)
    output = build("objective", {"name": "seppo", "beta": 20})(likelihoods)
    agree(output.per_prompt, [0.513015, 0.644397, 0.263282])
    agree(output.metrics["flip_rate"], [0.0, 1.0, 0.0])


def test_seppo_at_the_reference_and_at_ties():
    for flip in ("sign", "indicator", "none"):
        seppo = build("objective", {"name": "seppo", "beta": 20, "flip": flip})
        at_reference = from_errors(ROWS[1], ROWS[1], [[1.0, 0.0]] * 3)
        agree(seppo(at_reference).per_prompt, [math.log(2)] * 3, atol=1e-15)
        agree(gradient(seppo, at_reference), [[5.0, -5.0]] * 3, atol=1e-12)  # of the plain pair: A = 0 is s = 1
        tied = from_errors(*ROWS, [[0.5, 0.5]] * 3)
        output = seppo(tied)
        torch.testing.assert_close(output.per_prompt, seppo(tied.select([1, 0])).per_prompt)
        one, other = (seppo(replace(tied, utility=torch.tensor([won] * 3))) for won in ([1.0, 0.0], [0.0, 1.0]))
        torch.testing.assert_close(output.per_prompt, 0.5 * (one.per_prompt + other.per_prompt))
        assert output.metrics["flip_rate"].isnan().all()


def test_the_anchor_carries_no_gradient():
    """The gradient is that of the loss with its side fixed."""
    likelihoods = from_errors(*ROWS, [[1.0, 0.0]] * 3)
    u = likelihoods.logratio
    side = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    torch.nn.functional.softplus(-20 * (u[:, 0] - side * u[:, 1])).sum().backward()
    expected = -0.5 * likelihoods.logp.grad
    torch.testing.assert_close(gradient(build("objective", {"name": "seppo", "beta": 20}), likelihoods), expected)


EXPLORED = ([0.11, 0.21, 0.19], [0.12, 0.20, 0.15])  # of the reference's own sample: policy's and reference's errors


def with_sample() -> Likelihoods:
    errors = [[*row, e] for row, e in zip(ROWS[0], EXPLORED[0], strict=True)]
    reference = [[*row, e] for row, e in zip(ROWS[1], EXPLORED[1], strict=True)]
    return from_errors(errors, reference, [[1.0, 0.0, 0.0]] * 3)


PAIR = {"name": "pair", "beta": 20, "candidates": [0, 1]}


def test_xpo():
    """C-xpo is the raw form, alpha 0.01 at 10 nats per unit of error; the bounded one and its slope, by hand."""
    raw = {"name": "sft", "weight": -0.01 * 10, "candidates": [2]}
    output = build("objective", {"name": "sum", "terms": [PAIR, raw]})(with_sample())
    agree(output.per_prompt, [0.502015, 1.082186, 0.244282])
    bounded = build("objective", {"name": "sum", "terms": [PAIR, {"name": "explore", "beta": 20, "weight": 0.01,
                                                                  "candidates": [2]}]})  # fmt: skip
    likelihoods = with_sample()
    alone = build("objective", {"name": "pair", "beta": 20})(likelihoods.select([0, 1])).per_prompt
    value = torch.sigmoid(10 * torch.tensor([0.01, -0.01, -0.04], dtype=torch.float64))
    torch.testing.assert_close(bounded(likelihoods).per_prompt, alone + 0.01 * value)
    grad = gradient(bounded, likelihoods)
    torch.testing.assert_close(grad[:, 2], -0.01 * 10 * value * (1 - value))
    assert (grad[:, 2] < 0).all()  # a larger error on the reference's image is rewarded
    explore = build("objective", {"name": "explore", "beta": 20})
    far = from_errors([[0.0], [9.0]], [[9.0], [0.0]], [[1.0], [1.0]])
    agree(explore(far).per_prompt, [1.0, 0.0], atol=1e-12)
    assert check_sound(explore, far).metrics["explore"].shape == (2,)
