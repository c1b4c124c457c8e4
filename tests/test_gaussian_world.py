"""The linear-Gaussian world: data N(0, 1), preference sigmoid(a (x - x')), an exact reference, a closed-form optimum.

Within the shift family noise_theta = noise_0 - delta_t, Diffusion-DPO with shared noise has its optimum exactly at
delta_t = a / (2 kappa_t sqrt(abar (1 - abar))), kappa_t = beta w(t) / 2. Only the `tilt` weight makes these shifts one
density N(a / beta, 1); independent noise for winner and loser biases them toward zero.
"""

from __future__ import annotations

import types

import pytest
import torch

from diffalign.likelihoods import elbo
from diffalign.registry import build
from diffalign.schedule import VariancePreserving
from diffalign.types import EndpointBatch

ABAR = torch.tensor([0.95, 0.7, 0.5, 0.2, 0.05], dtype=torch.float64)
NUM_PAIRS = 400_000
A = 1.0


class Shifted:
    """The exact denoiser of N(0, 1), shifted by a learned delta per noise level."""

    def __init__(self) -> None:
        self.schedule = VariancePreserving(ABAR, "epsilon")
        self.delta = torch.zeros(len(ABAR), dtype=torch.float64, requires_grad=True)

    def exact(self, xt, t):
        _, sigma = self.schedule.alpha_sigma(t)
        return sigma[:, None, None, None] * xt

    def __call__(self, xt, t, cond):
        level = (t * len(ABAR)).round().long() - 1
        return self.exact(xt, t) - self.delta[level][:, None, None, None]

    def predict(self, xt, t, cond, ids):
        return self.exact(xt, t)


def labelled_pairs(seed: int) -> EndpointBatch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_PAIRS, 2, 1, 1, 1, generator=generator, dtype=torch.float64)
    gap = A * (x[:, 0] - x[:, 1]).flatten()
    first_wins = torch.rand(NUM_PAIRS, generator=generator, dtype=torch.float64) < torch.sigmoid(gap)
    utility = torch.stack([first_wins, ~first_wins], dim=1).double()
    index = torch.arange(NUM_PAIRS)
    return EndpointBatch(index, torch.zeros_like(index), x, {}, utility, torch.ones(NUM_PAIRS, 2).bool())


@pytest.fixture
def one_generator(monkeypatch):
    """One generator for all records: the addressed draws are tested elsewhere and cost a generator per record."""

    def normal(seed, stream, ids, draws, shape):
        return torch.randn(len(ids), *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def uniform(seed, stream, ids, draws, shape=()):
        return (torch.arange(len(ids), dtype=torch.float64) + 0.5) % len(ABAR) / len(ABAR)

    monkeypatch.setattr(elbo, "randomness", types.SimpleNamespace(normal=normal, uniform=uniform))


def fitted_shift(beta: float, **likelihood) -> torch.Tensor:
    policy, data = Shifted(), labelled_pairs(seed=1)
    density = build("likelihood", {"name": "elbo", **likelihood})
    objective = build("objective", {"name": "pair", "beta": beta})
    optimizer = torch.optim.LBFGS([policy.delta], lr=1, max_iter=40, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(density(policy, policy, data)).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return policy.delta.detach()


SPREAD = (ABAR * (1 - ABAR)).sqrt()


@pytest.mark.slow
def test_constant_weight_reaches_its_closed_form(one_generator):
    beta = 2.0  # kappa = 1
    torch.testing.assert_close(fitted_shift(beta), A / (beta * SPREAD), rtol=0.03, atol=0.03)


@pytest.mark.slow
def test_tilt_weight_reaches_one_tilted_density(one_generator):
    beta = 0.5
    shift = fitted_shift(beta, weighting="tilt")
    ideal = SPREAD * A / beta
    torch.testing.assert_close(shift, ideal, rtol=0.03, atol=0.03)
    # all noise levels agree on the mean of the tilted density: a / beta
    torch.testing.assert_close(shift / SPREAD, torch.full((5,), A / beta, dtype=torch.float64), rtol=0.04, atol=0)


@pytest.mark.slow
def test_unshared_noise_is_biased_toward_zero(one_generator):
    shift = fitted_shift(0.5, weighting="tilt", shared_noise=False)
    published = torch.tensor([0.016, 0.215, 0.420, 0.593, 0.405], dtype=torch.float64)
    torch.testing.assert_close(shift, published, rtol=0, atol=0.02)
    assert (shift < SPREAD * A / 0.5).all()
