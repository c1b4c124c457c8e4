"""Laws that every file in objectives/ must obey, including files added later; mutants show that the laws bite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.objectives._pairs import split_pair
from diffalign.registry import build, names
from diffalign.types import Likelihoods, LossOutput

# What a file needs beyond its defaults to be built.
SPECS: dict[str, dict[str, Any]] = {"sum": {"terms": [{"name": "pair", "beta": 50}, {"name": "sft", "weight": 0.1}]}}
OBJECTIVES = {name: build("objective", {"name": name, **SPECS.get(name, {})}) for name in names("objective")}
PAIRWISE = [name for name, objective in OBJECTIVES.items() if "pair" in objective.needs]
every = pytest.mark.parametrize("name", OBJECTIVES)
pairwise = pytest.mark.parametrize("name", PAIRWISE)


def random_likelihoods(seed: int, num: int = 6, dtype: torch.dtype = torch.float64, scale: float = 0.01) -> Likelihoods:
    generator = torch.Generator().manual_seed(seed)
    error_ref = torch.rand(num, 2, generator=generator, dtype=torch.float64)
    error = (error_ref + scale * torch.randn(num, 2, generator=generator, dtype=torch.float64)).clamp(min=0)
    utility = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(num, 2).clone()
    flip = torch.rand(num, generator=generator) < 0.5
    utility[flip] = utility[flip].flip(1)
    return Likelihoods(
        logp=(-0.5 * error).to(dtype).requires_grad_(),
        logp_ref=(-0.5 * error_ref).to(dtype),
        utility=utility.to(dtype),
        mask=torch.ones(num, 2, dtype=torch.bool),
        t=torch.rand(num, generator=generator),
    )


def gradient(objective: Callable[[Likelihoods], LossOutput], likelihoods: Likelihoods) -> torch.Tensor:
    logp = likelihoods.logp.detach().clone().requires_grad_()
    objective(replace(likelihoods, logp=logp)).loss.backward()
    assert logp.grad is not None
    return logp.grad


def at_reference(likelihoods: Likelihoods) -> Likelihoods:
    assert likelihoods.logp_ref is not None
    return replace(likelihoods, logp=likelihoods.logp_ref.clone().requires_grad_())


@every
def test_per_prompt_and_finite_at_extremes(name):
    for scale in (0.0, 1e-6, 1.0, 20.0):
        likelihoods = random_likelihoods(1, scale=scale)
        output = OBJECTIVES[name](likelihoods)
        assert output.per_prompt.shape == (6,)
        assert output.per_prompt.isfinite().all()
        assert gradient(OBJECTIVES[name], likelihoods).isfinite().all()
        assert not any(value.requires_grad for value in output.metrics.values())


@every
def test_batch_order_and_slices_do_not_matter(name):
    likelihoods = random_likelihoods(2)
    whole = OBJECTIVES[name](likelihoods).per_prompt
    order = torch.tensor([4, 2, 0, 5, 1, 3])

    def rows(index: Any) -> Likelihoods:
        fields = ("logp", "logp_ref", "utility", "mask", "t")
        return replace(likelihoods, **{f: getattr(likelihoods, f)[index] for f in fields})

    torch.testing.assert_close(OBJECTIVES[name](rows(order)).per_prompt, whole[order], rtol=0, atol=0)
    parts = torch.cat([OBJECTIVES[name](rows(slice(i, i + 2))).per_prompt for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@every
def test_swapping_candidates_with_their_labels_changes_nothing(name):  # L14
    likelihoods = random_likelihoods(3)
    swapped = replace(
        likelihoods,
        logp=likelihoods.logp.flip(1),
        logp_ref=likelihoods.logp_ref.flip(1),
        utility=likelihoods.utility.flip(1),
    )
    torch.testing.assert_close(OBJECTIVES[name](swapped).per_prompt, OBJECTIVES[name](likelihoods).per_prompt)


@every
def test_masked_prompts_get_no_gradient(name):
    likelihoods = random_likelihoods(4)
    mask = likelihoods.mask.clone()
    mask[2] = False
    assert (gradient(OBJECTIVES[name], replace(likelihoods, mask=mask))[2] == 0).all()


@every
def test_reference_gets_no_gradient_through_the_policy(name):  # L16
    likelihoods = random_likelihoods(5)
    reference = likelihoods.logp_ref.clone().requires_grad_()
    OBJECTIVES[name](replace(likelihoods, logp_ref=reference.detach())).loss.backward()
    assert reference.grad is None


def check_signs(objective: Callable[[Likelihoods], LossOutput], seed: int) -> None:  # L10
    """More likelihood for the winner never raises the loss, more for the loser never lowers it."""
    likelihoods = random_likelihoods(seed)
    winner, loser = split_pair(gradient(objective, likelihoods), likelihoods.utility)
    assert (winner <= 0).all() and (loser >= 0).all()
    assert (winner < 0).any() and (loser > 0).any()


@pairwise
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_signs(name, seed):
    check_signs(OBJECTIVES[name], seed)


def check_zero(objective: Callable[[Likelihoods], LossOutput], beta: float) -> None:  # L11
    """At policy = reference: loss ln 2, margin 0, gradient +-beta / 2 per prompt."""
    likelihoods = at_reference(random_likelihoods(6))
    output = objective(likelihoods)
    torch.testing.assert_close(
        output.per_prompt, torch.full((6,), math.log(2), dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert (output.metrics["margin"] == 0).all()
    winner, loser = split_pair(gradient(objective, likelihoods), likelihoods.utility)
    torch.testing.assert_close(winner, torch.full((6,), -beta / 2 / 6, dtype=torch.float64))
    torch.testing.assert_close(loser, -winner)


def test_logistic_pair_at_the_reference():
    check_zero(OBJECTIVES["pair"], beta=5000)


@pairwise
def test_one_constant_on_both_rewards_changes_no_pair_loss(name):  # L12
    if name == "sum":
        pytest.skip("its sft term is pointwise")
    likelihoods = random_likelihoods(7)
    shifted = replace(likelihoods, logp_ref=likelihoods.logp_ref + 0.25)
    torch.testing.assert_close(OBJECTIVES[name](shifted).per_prompt, OBJECTIVES[name](likelihoods).per_prompt)


def test_smooth_at_zero_is_hard_and_sums_add():  # L5, closure
    likelihoods = random_likelihoods(8)
    hard = build("objective", {"name": "pair", "beta": 70})
    smooth = build("objective", {"name": "pair", "beta": 70, "labels": "smooth", "flip_rate": 0.0})
    torch.testing.assert_close(hard(likelihoods).per_prompt, smooth(likelihoods).per_prompt, rtol=0, atol=0)
    sft = build("objective", {"name": "sft"})
    both = build("objective", {"name": "sum", "terms": [{"name": "pair", "beta": 70}, {"name": "sft", "weight": 0.3}]})
    expected = gradient(hard, likelihoods) + 0.3 * gradient(sft, likelihoods)
    torch.testing.assert_close(gradient(both, likelihoods), expected)


# Mutants: each law must catch the mistake it is there for.
def _mutant(change: Callable[[Likelihoods], Likelihoods]) -> Callable[[Likelihoods], LossOutput]:
    pair = build("objective", {"name": "pair", "beta": 5000})
    return lambda likelihoods: pair(change(likelihoods))


MUTANTS = {
    "sign flip": (lambda x: replace(x, logp=-x.logp, logp_ref=-x.logp_ref), lambda m: check_signs(m, 3)),
    "swapped labels": (lambda x: replace(x, utility=-x.utility), lambda m: check_signs(m, 3)),
    "wrong scale": (lambda x: replace(x, logp=2 * x.logp, logp_ref=2 * x.logp_ref), lambda m: check_zero(m, 5000)),
    "detached winner": (
        lambda x: replace(x, logp=torch.where(x.utility > 0.5, x.logp.detach(), x.logp)),
        lambda m: check_signs(m, 3),
    ),
    "reference that follows the policy": (lambda x: replace(x, logp_ref=x.logp), lambda m: check_signs(m, 3)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    change, law = MUTANTS[mutant]
    with pytest.raises(AssertionError):
        law(_mutant(change))
