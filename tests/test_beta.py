"""Beta conventions: the sheet's worked examples, round trips, and the same loss from either number."""

from __future__ import annotations

import pytest
import torch

from diffalign.beta import CONVENTIONS, ELBO_COEFFICIENT, beta_table, convert_beta
from diffalign.types import UserError


def test_known_numbers():
    assert convert_beta(2500, "diffusers-sd") == 5000
    assert convert_beta(5000, "diffalign", "sum-half") == pytest.approx(0.30517578)  # 5000 / 16384
    # beta 5000 on SD1.5 is 0.153 per squared unit, 0.038 per nat at the median noise level
    assert convert_beta(5000, "diffalign", "sum") == pytest.approx(0.1526, abs=1e-4)
    assert convert_beta(5000, "diffalign", "nats") == pytest.approx(0.038, abs=1e-3)
    assert convert_beta(5000, "diffalign", "sum", (4, 128, 128)) == pytest.approx(0.03815, abs=1e-5)


def test_elbo_coefficient_is_the_schedules_median():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    coefficients = 1000 * betas / (2 * (1 - betas) * (1 - abar))
    assert coefficients.median().item() == pytest.approx(ELBO_COEFFICIENT, abs=1e-3)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_round_trip(name):
    there = convert_beta(123.0, name, "nats", (16, 128, 128))
    assert convert_beta(there, "nats", name, (16, 128, 128)) == pytest.approx(123.0)


def test_conventions_give_one_margin():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.rand(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = (policy.square().flatten(1).mean(1) - reference.square().flatten(1).mean(1)).diff().item()
    total = (policy.square().flatten(1).sum(1) - reference.square().flatten(1).sum(1)).diff().item()
    ours = 700.0
    latent = (4, 8, 8)
    assert convert_beta(ours, "diffalign", "diffusers-sd", latent) * mean == pytest.approx(ours / 2 * mean)
    assert convert_beta(ours, "diffalign", "sum", latent) * total == pytest.approx(ours / 2 * mean)
    assert convert_beta(ours, "diffalign", "sum-half", latent) / 2 * total == pytest.approx(ours / 2 * mean)


def test_table_and_bad_input():
    assert len(beta_table(5000, "diffalign")) == 1 + len(CONVENTIONS)
    with pytest.raises(UserError, match="choose one of diffalign"):
        convert_beta(1, "trl")
    with pytest.raises(UserError, match="latent's shape"):
        convert_beta(1, "sum", "nats", (4, 0, 64))
