"""The hand-checked numbers of the published losses, in our convention: logp = -1/2 error."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from diffalign.registry import build
from diffalign.types import Likelihoods, UserError


def at_errors(e_w, e_l, k_w, k_l, dtype=torch.float64) -> Likelihoods:
    """Likelihoods of winners (first) and losers with the given policy errors e and reference errors k."""
    policy = torch.tensor([e_w, e_l], dtype=dtype).T.contiguous().requires_grad_()
    reference = torch.tensor([k_w, k_l], dtype=dtype).T
    ones = torch.ones_like(reference)
    utility = ones * torch.tensor([1.0, 0.0], dtype=dtype)
    likelihoods = Likelihoods(-0.5 * policy, -0.5 * reference, utility, ones.bool(), t=ones[:, 0] * 0.5)
    object.__setattr__(likelihoods, "errors", policy)  # to read the gradient with respect to the errors
    return likelihoods


E1 = ([0.12, 0.305, 0.041, 0.2], [0.118, 0.31, 0.04, 0.2], [0.1203, 0.3045, 0.0412, 0.2], [0.1179, 0.3096, 0.04, 0.2])
ROWS = ([0.10, 0.25, 0.08], [0.12, 0.20, 0.30], [0.13, 0.22, 0.15], [0.11, 0.24, 0.25])  # kappa*beta = 10: beta = 20


@pytest.mark.parametrize(
    "beta,loss,gradient",
    [
        (5000, 0.576606318034, [168.0883883562, 351.3603130536, 235.9629179988, 312.5]),
        (2000, 0.637174490604, [100.3280849719, 131.2447968697, 112.5415006719, 125.0]),
    ],
)
def test_diffusion_dpo_scalars(beta, loss, gradient):
    likelihoods = at_errors(*E1)
    output = build("objective", {"name": "pair", "beta": beta})(likelihoods)
    assert output.loss.item() == pytest.approx(loss, abs=1e-10)
    output.loss.backward()
    expected = torch.tensor(gradient, dtype=torch.float64)
    torch.testing.assert_close(likelihoods.errors.grad, torch.stack([expected, -expected], 1), atol=1e-6, rtol=1e-9)


def test_diffusion_dpo_margins_and_accuracy():
    output = build("objective", {"name": "pair", "beta": 5000})(at_errors(*E1))
    torch.testing.assert_close(
        output.metrics["margin"], torch.tensor([1.0, -0.25, 0.5, 0.0], dtype=torch.float64), atol=1e-9, rtol=0
    )
    assert output.metrics["implicit_accuracy"].mean().item() == 0.625  # an exact tie of the model counts one half
    per = torch.tensor([0.3132616875, 0.8259394199, 0.4740769842, 0.6931471806], dtype=torch.float64)
    torch.testing.assert_close(output.per_prompt, per, atol=1e-9, rtol=0)
    # the trap of an early public script: averaging the margins before the log-sigmoid
    assert output.loss.item() != pytest.approx(0.5490548623, abs=1e-3)


@pytest.mark.parametrize(
    "spec,expected",
    [
        ({"name": "pair", "beta": 20}, [0.513015, 1.103186, 0.263282]),  # C-ddpo
        (
            {"name": "sum", "terms": [{"name": "pair", "beta": 20}, {"name": "sft", "weight": 0.1}]},  # C-rpo
            [0.523015, 1.128186, 0.271282],
        ),
    ],
)
def test_error_level_vectors(spec, expected):
    output = build("objective", spec)(at_errors(*ROWS))
    torch.testing.assert_close(output.per_prompt, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    single = build("objective", spec)(at_errors(*ROWS, dtype=torch.float32))
    torch.testing.assert_close(
        single.per_prompt.double(), torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-5
    )


def test_smoothed_labels():  # C-cdpo: rewards given, beta 0.5, so log-ratios are rewards / beta
    r_w, r_l = [0.3, -0.2, 1.1], [0.1, 0.4, -0.5]
    zeros = [0.0] * 3
    likelihoods = at_errors([-4 * r for r in r_w], [-4 * r for r in r_l], zeros, zeros)
    pair = build("objective", {"name": "pair", "beta": 0.5, "labels": "smooth", "flip_rate": 0.1})
    output = pair(likelihoods)
    expected = torch.tensor([0.618139, 0.977488, 0.343901], dtype=torch.float64)
    torch.testing.assert_close(output.per_prompt, expected, atol=1e-6, rtol=0)
    # the minimum lies at margin ln((1 - eps) / eps)
    best = math.log(9)
    at_best = pair(at_errors([-4 * best], [0.0], [0.0], [0.0]))
    assert at_best.loss.item() == pytest.approx(0.325083, abs=1e-6)


def test_a_tie_is_half_a_win_either_way():
    likelihoods = at_errors(*ROWS)
    object.__setattr__(likelihoods, "utility", torch.full_like(likelihoods.utility, 0.5))
    output = build("objective", {"name": "pair", "beta": 20})(likelihoods)
    margin = torch.tensor([0.4, -0.7, 1.2], dtype=torch.float64)
    expected = 0.5 * (torch.nn.functional.softplus(margin) + torch.nn.functional.softplus(-margin))
    torch.testing.assert_close(output.per_prompt, expected)
    assert output.metrics["implicit_accuracy"].isnan().all()  # nothing to be right about


@pytest.mark.parametrize(
    "spec,match",
    [
        ({"name": "pair", "beta": 0}, "beta must be positive"),
        ({"name": "pair", "flip_rate": 0.1}, "labels=smooth"),
        ({"name": "pair", "labels": "smooth", "flip_rate": 0.5}, r"\[0, 0.5\)"),
        ({"name": "sum"}, "terms is empty"),
        ({"name": "sum", "terms": [{"name": "pear"}]}, "Did you mean 'pair'"),
        ({"name": "rpo"}, "sft-po .* reward-po"),
    ],
)
def test_bad_settings(spec, match):
    with pytest.raises(UserError, match=match):
        build("objective", spec)


def test_pairs_only():
    three = torch.zeros(2, 3)
    likelihoods = Likelihoods(three, three, three, three.bool())
    with pytest.raises(UserError, match="3 candidates"):
        build("objective", {"name": "pair"})(likelihoods)


def test_missing_reference_is_named():
    two = torch.zeros(2, 2)
    with pytest.raises(UserError, match="reference.name"):
        build("objective", {"name": "pair"})(Likelihoods(two, None, two, two.bool()))


REWARDS = ([0.3, -0.2, 1.1], [0.1, 0.4, -0.5])  # of winner and loser; beta 0.5, so log-ratios are twice these


def at_rewards(beta: float = 0.5) -> Likelihoods:
    """Log-ratios of rewards r = beta * logratio: an error gap of -2 logratio below the reference's."""
    zeros = [0.0] * 3
    return at_errors(*([-2 * r / beta for r in side] for side in REWARDS), zeros, zeros)


@pytest.mark.parametrize(
    "slots,expected,slope",
    [
        ({}, [0.598139, 1.037488, 0.183901], [-0.450166, -0.645656, -0.167982]),  # C-dpo
        ({"labels": "smooth", "flip_rate": 0.1}, [0.618139, 0.977488, 0.343901], [-0.350166, -0.545656, -0.067982]),
        ({"labels": "robust", "flip_rate": 0.1}, [0.573139, 1.112488, -0.016099], [-0.575166, -0.770656, -0.292982]),
        ({"link": "hinge"}, [0.8, 1.6, 0.0], [-1.0, -1.0, 0.0]),
        ({"link": "square"}, [0.36, 4.84, 4.84], [-2.4, -8.8, 8.8]),  # C-ipo
        ({"divergence": "forward-kl"}, [0.627942, 0.987356, 0.240209], None),
        ({"divergence": "js"}, [0.653791, 0.837775, 0.436041], None),
        ({"divergence": "alpha", "alpha": 0.5}, [0.614497, 1.006179, 0.237635], None),
        ({"beta_loser": 0.1}, [0.562915, 0.842915, 0.263282], None),  # C-flex
    ],
)
def test_reward_level_vectors(slots, expected, slope):
    likelihoods = at_rewards()
    output = build("objective", {"name": "pair", "beta": 0.5} | slots)(likelihoods)
    torch.testing.assert_close(output.per_prompt, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    if slope is not None:
        output.per_prompt.sum().backward()
        of_margin = likelihoods.errors.grad[:, 0] * -2 / 0.5  # margin = beta (-1/2) e_w + ...
        torch.testing.assert_close(of_margin, torch.tensor(slope, dtype=torch.float64), atol=1e-6, rtol=0)


def test_soft_labels_and_score_margins():  # C-soft, C-modpo
    likelihoods = replace(at_rewards(), utility=torch.tensor([[0.8, 0.2]], dtype=torch.float64).expand(3, 2))
    soft = build("objective", {"name": "pair", "beta": 0.5, "labels": "soft"})(likelihoods)
    expected = torch.tensor([0.638139, 0.917488, 0.503901], dtype=torch.float64)
    torch.testing.assert_close(soft.per_prompt, expected, atol=1e-6, rtol=0)
    gap = torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64)
    scored = replace(at_rewards(), scores={"judge": torch.stack([gap, torch.zeros_like(gap)], dim=1)})
    modpo = build("objective", {"name": "pair", "beta": 0.5, "score_weights": {"judge": 0.4}})
    expected = torch.tensor([0.693147, 1.264966, 0.076400], dtype=torch.float64)
    torch.testing.assert_close(modpo(scored).per_prompt, expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="no scores of 'judge' .it has none."):
        modpo(at_rewards())


@pytest.mark.parametrize(
    "spec,expected",
    [
        ({"reference_strength": 0.5}, [0.554355, 1.037488, 0.167786]),  # C-gamma
        ({"reference_strength": 0.0}, [0.598139, 0.974077, 0.105083]),
        ({"reference_strength": 0.0, "margin": 0.5}, [0.854355, 1.313262, 0.167786]),  # C-simpo
    ],
)
def test_reference_strength_and_margin(spec, expected):
    output = build("objective", {"name": "pair", "beta": 20} | spec)(at_errors(*ROWS))
    torch.testing.assert_close(output.per_prompt, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_cpo_is_simpo_without_margin_plus_sft():  # C-cpo
    terms = [{"name": "pair", "beta": 20, "reference_strength": 0}, {"name": "sft"}]
    cpo = build("objective", {"name": "sum", "terms": terms})
    assert cpo.needs == {"pair"}
    without = replace(at_errors(*ROWS), logp_ref=None)
    expected = torch.tensor([0.698139, 1.224077, 0.185083], dtype=torch.float64)
    torch.testing.assert_close(cpo(without).per_prompt, expected, atol=1e-6, rtol=0)


def test_tdpo2_and_where_its_gradient_goes():  # C-tdpo: kl = d / 2 in units of logp
    likelihoods = at_errors([0.025], [0.0625], [0.025], [0.0175])
    kl = torch.tensor([[0.015, 0.0125]], dtype=torch.float64, requires_grad=True)
    output = build("objective", {"name": "pair", "beta": 20, "kl_correction": 0.5})(replace(likelihoods, kl=kl))
    assert output.loss.item() == pytest.approx(0.483589, abs=1e-6)
    output.loss.backward()
    assert kl.grad[0, 0] == 0 and kl.grad[0, 1] > 0  # the winner's side is detached, the loser's KL is pushed down
    assert build("objective", {"name": "pair", "beta": 20})(likelihoods).loss.item() == pytest.approx(
        0.493249, abs=1e-6
    )
