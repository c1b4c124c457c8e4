"""Addressed randomness: pure functions of the address, right distributions, permutations without memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import randomness

IDS, ZEROS = torch.arange(400), torch.zeros(400, dtype=torch.long)


def test_rows_do_not_depend_on_their_batch():
    whole = randomness.normal(1, "noise", IDS, ZEROS, (4,))
    torch.testing.assert_close(randomness.normal(1, "noise", IDS[7:9], ZEROS[7:9], (4,)), whole[7:9], rtol=0, atol=0)
    torch.testing.assert_close(randomness.normal(1, "noise", IDS.flip(0), ZEROS, (4,)).flip(0), whole, rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"seed": 2}, {"stream": "t"}, {"draws": ZEROS + 1}, {"ids": IDS + 1000}])
def test_every_part_of_the_address_counts(change):
    address = {"seed": 1, "stream": "noise", "ids": IDS, "draws": ZEROS, "shape": (4,)}
    assert not torch.isclose(randomness.normal(**address), randomness.normal(**address | change)).any(dim=1).all()


def test_distributions():
    normal = randomness.normal(3, "n", IDS, ZEROS, (50,))
    assert normal.mean().abs() < 0.03 and (normal.std() - 1).abs() < 0.03
    uniform = randomness.uniform(3, "u", IDS, ZEROS)
    assert 0 <= uniform.min() and uniform.max() < 1 and (uniform.mean() - 0.5).abs() < 0.05
    rows = normal - normal.mean(1, keepdim=True)
    correlation = (rows[:-1] * rows[1:]).mean(1) / (rows[:-1].std(1) * rows[1:].std(1))
    assert correlation.mean().abs() < 0.03  # neighbouring ids are independent


@given(size=st.integers(1, 300), key=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_permutations_are_permutations(size, key):
    order = [randomness.permute(index, size, key) for index in range(size)]
    assert sorted(order) == list(range(size))


def test_epochs_are_shuffled_differently():
    first, second = ([randomness.permute(index, 100, 0, "order", visit) for index in range(100)] for visit in (0, 1))
    assert first != second and first != list(range(100))
