"""Objectives without a reference: ORPO, ASFT, MaPO; the sheets' vectors, and both ends of the error's range."""

from __future__ import annotations

import math

import pytest
import torch
from likelihood_makers import agree, check_sound, columns, from_errors, gradient, permuted

from diffalign.objectives.mapo import log_f
from diffalign.registry import build
from diffalign.types import Likelihoods, UserError

E_W, E_L = [0.10, 0.25, 0.08], [0.12, 0.20, 0.30]
SPECS = {
    "orpo": {"name": "orpo"},
    "asft": {"name": "asft"},
    "mapo": {"name": "mapo"},
    "mapo-paper": {"name": "mapo", "form": "paper"},
    "mapo-paper-1024": {"name": "mapo", "form": "paper", "beta": 1024},
}
every = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def pairs(e_w, e_l, dtype=torch.float64) -> Likelihoods:
    return from_errors(columns(e_w, e_l), None, [[1.0, 0.0]] * len(e_w), dtype=dtype)


def random_pairs(seed: int, scale: float = 0.3) -> Likelihoods:
    generator = torch.Generator().manual_seed(seed)
    errors = scale * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    wins = (torch.rand(6, generator=generator) < 0.5).tolist()
    return from_errors(errors.tolist(), None, [[1.0, 0.0] if first else [0.0, 1.0] for first in wins])


@pytest.mark.parametrize(
    "spec,expected",
    [
        ({"name": "orpo", "beta": 20, "weight": 0.5}, [0.377115, 0.755847, 0.111118]),  # C-orpo
        ({"name": "asft", "beta": 20, "weight": 1.0}, [1.458382, 2.895413, 0.931069]),  # C-asft
        ({"name": "mapo"}, [0.100736, 1.453146, 0.080000]),  # C-mapo
    ],
)
def test_vectors(spec, expected):
    loss = build("objective", spec)
    agree(loss(pairs(E_W, E_L)).per_prompt, expected)
    agree(loss(pairs(E_W, E_L, torch.float32)).per_prompt, expected, atol=5e-7, rtol=1e-5)
    agree(loss(permuted(pairs(E_W, E_L), [1, 0])).per_prompt, expected)


def test_parts_of_orpo_and_asft():
    odds = build("objective", {"name": "orpo", "beta": 20})(pairs(E_W, E_L)).metrics["margin"]
    agree(odds, [0.300293, -0.559763, 2.745548])
    bracket = build("objective", {"name": "asft", "beta": 20, "weight": 1.0})(pairs(E_W, E_L)).per_prompt
    agree(bracket - torch.tensor(E_W).double(), [1.358382, 2.645413, 0.851069])


def test_orpo_raises_the_losers_error():
    """The trap of a public script: its sign lowers the loser's error."""
    slope = gradient(build("objective", {"name": "orpo", "beta": 20, "weight": 0.5}), pairs([0.10], [0.12]))
    assert slope[0, 1].item() == pytest.approx(-3.04, abs=5e-3)
    assert slope[0, 0].item() > 1  # more than SFT's own pull


MAPO_A = ([0.10, 0.25], [0.30, 0.20])


@pytest.mark.parametrize(
    "spec,errors,loss",
    [
        ({}, MAPO_A, 0.776572802812),
        ({}, ([0.1000, 0.2500], [0.1010, 0.2504]), 0.236207671983),
        ({}, ([0.100], [0.101]), 0.157777480949),
        ({"form": "paper"}, MAPO_A, 0.25364698173),
        ({"form": "paper", "beta": 8}, MAPO_A, 0.25364698173),
        ({"form": "paper", "beta": 64}, MAPO_A, 0.185681855311),
    ],
)
def test_mapo(spec, errors, loss):
    mapo = build("objective", {"name": "mapo", **spec})
    assert mapo(pairs(*errors)).loss.item() == pytest.approx(loss, abs=1e-10)
    assert mapo(pairs(*errors, torch.float32)).loss.item() == pytest.approx(loss, rel=1e-5)


def test_mapo_margins_and_gradient():
    mapo = build("objective", {"name": "mapo"})
    agree(
        mapo(pairs(*MAPO_A)).metrics["margin"] / 1000,
        [0.975208324653 - 0.926874297251, 0.938801744375 - 0.950833194478],
    )
    paper = build("objective", {"name": "mapo", "form": "paper"})
    agree(paper(pairs(*MAPO_A)).metrics["margin"], [0.375790406341, -0.0830811688588], atol=1e-11)
    agree(gradient(mapo, pairs([0.100], [0.101])), [[11.7885183937, -10.7866902955]], atol=1e-8)
    single = gradient(mapo, pairs([0.100], [0.101], torch.float32))
    agree(single, [[11.7885183937, -10.7866902955]], atol=0, rtol=1e-4)


def test_log_f_over_the_whole_range():
    """Against the plain formula where that is exact, and against the limits where it is not."""
    x = torch.logspace(-1.5, 2.5, 401, dtype=torch.float64).requires_grad_()
    value = log_f(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    plain = x.detach()
    torch.testing.assert_close(value.detach(), plain.log() - torch.expm1(plain).log(), atol=1e-12, rtol=1e-12)
    expected = 1 / plain - 1 / -torch.expm1(-plain)
    torch.testing.assert_close(slope, expected, atol=1e-10, rtol=1e-10)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([0.0, 1e-30, 1e-9, 0.0999999, 0.1, 88.0, 1e4, 1e30], dtype=dtype, requires_grad=True)
        value = log_f(ends)
        (slope,) = torch.autograd.grad(value.sum(), ends)
        assert value.isfinite().all() and (value <= 0).all() and (value.diff() <= 1e-6).all()
        torch.testing.assert_close(slope[:3], torch.full((3,), -0.5, dtype=dtype))
        torch.testing.assert_close(slope[-2:], torch.full((2,), -1.0, dtype=dtype), atol=2e-4, rtol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extremes(spec, dtype):
    grid = [0.0, 1e-30, 1e-8, 1e-4, 0.1, 1.0, 20.0, 200.0, 1e4]
    check_sound(
        build("objective", spec), pairs(*zip(*[(e_w, e_l) for e_w in grid for e_l in grid], strict=True), dtype=dtype)
    )


@every
def test_signs(spec):  # L10
    for seed in range(10):
        likelihoods = random_pairs(seed)
        slope = gradient(build("objective", spec), likelihoods)
        winner = likelihoods.utility > 0.5
        assert (slope[winner] > 0).all() and (slope[~winner] <= 0).all() and (slope[~winner] < 0).any()


@every
def test_the_reference_is_never_touched(spec):
    """None, anything or NaN there: the same loss."""
    loss, likelihoods = build("objective", spec), random_pairs(1)
    assert loss.needs == {"pair"}
    expected = loss(likelihoods).per_prompt
    for reference in (torch.randn(6, 2).double(), torch.full((6, 2), math.nan).double()):
        other = Likelihoods(likelihoods.logp, reference, likelihoods.utility, likelihoods.mask)
        torch.testing.assert_close(loss(other).per_prompt, expected, rtol=0, atol=0)


@every
def test_a_tie_is_half_a_win_each(spec):
    loss = build("objective", spec)
    tied = from_errors([[0.1, 0.3]], None, [[0.5, 0.5]])
    one = loss(from_errors([[0.1, 0.3]], None, [[1.0, 0.0]])).per_prompt
    other = loss(from_errors([[0.1, 0.3]], None, [[0.0, 1.0]])).per_prompt
    torch.testing.assert_close(loss(tied).per_prompt, 0.5 * (one + other))
    assert loss(tied).metrics["implicit_accuracy"].isnan().all()


@every
def test_masked_prompts(spec):
    nan = math.nan
    likelihoods = from_errors(
        [[0.1, 0.3], [0.2, nan], [nan, nan]],
        None,
        [[1, 0]] * 3,
        mask=[[True, True], [True, False], [False, False]],
    )
    loss = build("objective", spec)
    output = check_sound(loss, likelihoods)
    assert (output.per_prompt[1:] == 0).all() and output.metrics["margin"][1:].isnan().all()
    assert output.metrics["implicit_accuracy"][0] == 1
    assert (gradient(loss, likelihoods)[1:] == 0).all()


@pytest.mark.parametrize(
    "spec,match",
    [
        ({"name": "orpo", "beta": 0}, "objective.beta"),
        ({"name": "orpo", "weight": -1}, "objective.weight"),
        ({"name": "asft", "beta": -2}, "objective.beta"),
        ({"name": "asft", "weight": -1}, "objective.weight"),
        ({"name": "mapo", "beta": 0}, "objective.beta"),
        ({"name": "mapo", "steepness": 0}, "objective.steepness"),
        ({"name": "mapo", "form": "paper", "timesteps": 100}, "no effect"),
        ({"name": "mapo", "form": "book"}, "objective.form"),
    ],
)
def test_bad_settings(spec, match):
    with pytest.raises(UserError, match=match):
        build("objective", spec)


@every
def test_pairs_only(spec):
    three = torch.zeros(2, 3)
    with pytest.raises(UserError, match="3 candidates"):
        build("objective", spec)(Likelihoods(three, None, three, three.bool()))
