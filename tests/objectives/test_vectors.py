"""The hand-checked numbers of the published losses, in our convention: logp = -1/2 error."""

from __future__ import annotations

import math

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
