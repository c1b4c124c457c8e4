"""Diagnostics: check vectors, and what must hold for any numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import diagnostics as d
from diffalign.registry import build
from diffalign.types import Likelihoods, UserError

BETA = 20.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_displacement_and_the_three_probes():
    found = d.displacement([0.2, -0.1, 0.3, math.nan])
    assert found == pytest.approx((0.4 / 3, 2 / 3))
    probes = d.three_d([0.2, 0.4], np.array([1.0, 2.0, math.nan]), torch.tensor([-0.5]))
    assert probes == pytest.approx((1.5, 0.3, -0.5))
    nothing = torch.zeros(5)
    assert d.displacement(nothing) == (0, 0) and d.three_d(nothing, nothing, nothing) == (0, 0, 0)


def test_ranking_accuracy_is_of_the_model_alone_and_a_tie_is_right():
    assert d.ranking_accuracy([0.1, 0.5, 0.3, math.nan], [0.2, 0.4, 0.3, 0.1]) == pytest.approx(2 / 3)
    assert math.isnan(d.ranking_accuracy([math.nan], [0.1]))


def dpo(w: torch.Tensor, x: torch.Tensor, w_ref: torch.Tensor, x_ref: torch.Tensor) -> torch.Tensor:
    """Diffusion-DPO's loss of squared errors [B]."""
    logp, logp_ref = -0.5 * torch.stack([w, x], 1), -0.5 * torch.stack([w_ref, x_ref], 1)
    utility = torch.tensor([1.0, 0.0]).expand(len(w), 2)
    return build("objective", {"name": "pair", "beta": BETA})(
        Likelihoods(logp, logp_ref, utility, torch.ones_like(utility, dtype=torch.bool))
    ).per_prompt


def test_a_pair_is_ranked_right_exactly_where_its_loss_is_below_the_threshold():
    w, x, w_ref, x_ref = torch.rand(4, 2000, generator=rng(), dtype=torch.float64)
    below = dpo(w, x, w_ref, x_ref) <= d.ranking_threshold(d.difficulty(w_ref, x_ref), BETA)
    assert below.equal(w <= x) and 0.4 < below.double().mean() < 0.6
    for c in (-0.3, 0.3):  # the reference is right, and wrong
        for gap in (-1e-9, 1e-9):  # just right, and just wrong
            w, x, w_ref, x_ref = (torch.tensor([e], dtype=torch.float64) for e in (0.5 + gap, 0.5, 0.5 + 2 * c, 0.5))
            threshold = d.ranking_threshold(d.difficulty(w_ref, x_ref), BETA)
            assert d.difficulty(w_ref, x_ref).item() == pytest.approx(c)
            assert (dpo(w, x, w_ref, x_ref) <= threshold).item() is (gap < 0)


def test_the_ideal_accuracy_is_that_of_the_tilted_reference():
    """A policy built to be DPO's optimum: log-ratio gap logit(P) / beta."""
    w_ref, x_ref, p = torch.rand(3, 500, generator=rng(1), dtype=torch.float64)
    c = d.difficulty(w_ref, x_ref)
    loser_error = x_ref
    winner_error = w_ref - 2 * torch.logit(p) / BETA
    assert d.ideal_ranking_accuracy(c, BETA, p) == pytest.approx(d.ranking_accuracy(winner_error, loser_error))
    assert d.ideal_ranking_accuracy(c, BETA, 1.0) == 1
    assert d.ideal_ranking_accuracy(c, BETA, 0.5) == pytest.approx(d.ranking_accuracy(w_ref, x_ref))
    assert d.ideal_ranking_accuracy(c, 1e9, 0.9) == pytest.approx(d.ranking_accuracy(w_ref, x_ref))
    for beta, preference in ((0.0, 0.5), (1.0, 1.5)):
        with pytest.raises(UserError):
            d.ideal_ranking_accuracy(c, beta, preference)


def test_ches_vector():
    winner, loser = [[1.0, 0.0], [0.5, 0.5]], [[0.8, 0.2], [0.4, 0.7]]
    assert d.ches(winner, loser).item() == pytest.approx(-0.25, abs=1e-12)
    assert d.ches(winner, loser, length_normalize=True).item() == pytest.approx(-0.0625, abs=1e-12)


def test_ches_of_equal_features_is_zero_and_the_most_for_unit_sums():
    h = torch.nn.functional.normalize(torch.randn(7, 1, 5, generator=rng(), dtype=torch.float64), dim=-1)
    scores = d.ches(h[:1].expand(7, 1, 5), h)
    assert scores.shape == (7,) and scores[0].abs() < 1e-12 and scores.argmax() == 0
    long = h.expand(7, 4, 5)  # more tokens scale the sums, not the means
    assert torch.allclose(d.ches(long, h, length_normalize=True), d.ches(h, h, length_normalize=True), atol=1e-12)


def test_filter_ches_drops_the_highest():
    assert d.filter_ches([0.1, 0.9, -1.0, 0.5], 0.25).tolist() == [0, 2, 3]
    assert d.filter_ches([0.1, 0.9, -1.0, 0.5], 0.0).tolist() == [0, 1, 2, 3]
    assert d.filter_ches([math.nan, 0.9, -1.0, 0.5], 0.5).tolist() == [2, 3]
    assert d.filter_ches([1.0, 1.0, 1.0], 0.34).tolist() == [0, 1]
    assert len(d.filter_ches(torch.arange(100), 0.29)) == 71
    with pytest.raises(UserError, match="drop"):
        d.filter_ches([1.0], 1.0)


def test_vendi_vector():
    assert d.vendi([[1.0, 0.5], [0.5, 1.0]]) == pytest.approx(1.754765, abs=1e-6)


@given(st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_vendi_counts_what_differs(num, seed):
    vector = torch.randn(1, 9, generator=rng(seed))
    assert d.vendi_of_features(vector.expand(num, 9)) == pytest.approx(1, abs=1e-9)
    assert d.vendi_of_features(3 * torch.eye(num)) == pytest.approx(num, abs=1e-9)
    features = torch.randn(num, 9, generator=rng(seed))
    score = d.vendi_of_features(features)
    assert 1 - 1e-9 <= score <= num + 1e-9
    assert d.vendi_of_features(features.flip(0)) == pytest.approx(score)
    assert d.vendi_of_features(torch.cat([features, features])) == pytest.approx(score)  # copies add nothing


def test_vendi_refuses_what_is_no_similarity():
    for kernel in ([[1.0, 0.5]], [[2.0]], [[1.0, 0.5], [0.1, 1.0]], [[1.0, 2.0], [2.0, 1.0]], np.zeros((0, 0))):
        with pytest.raises(UserError, match="vendi"):
            d.vendi(kernel)
    with pytest.raises(UserError, match="zero"):
        d.vendi_of_features([[0.0, 0.0]])


def test_the_jackknife_error():
    assert math.isnan(d.vendi_se([[1.0]])) and math.isnan(d.vendi_se(np.eye(2)))
    assert d.vendi_se(np.ones((4, 4))) == pytest.approx(0, abs=1e-9)
    kernel = np.eye(3)
    kernel[0, 1] = kernel[1, 0] = 1.0  # two equal, one apart: without the odd one 1, without a twin 2
    mean = 5 / 3
    assert d.vendi_se(kernel) == pytest.approx(math.sqrt(2 / 3 * (2 * (2 - mean) ** 2 + (1 - mean) ** 2)), abs=1e-9)


def test_pixels_see_layout_colour_and_brightness():
    pictures = np.zeros((5, 32, 48, 3), np.uint8)
    pictures[1] = 255
    pictures[2] = 127
    pictures[3, :, :24] = 255
    pictures[4, :, 24:] = 255
    features = d.pixel_features(pictures)
    assert features.shape == (5, 8 * 8 * 3) and features[3].mean() == pytest.approx(0.5)
    assert d.vendi(d.pixel_kernel(pictures[[3, 3, 3]])) == pytest.approx(1)
    assert 4 < d.vendi(d.pixel_kernel(pictures)) < 5  # grey is like each of the others, a little
    opposite = d.pixel_kernel(pictures[:2])
    assert d.vendi(opposite) == pytest.approx(2, abs=1e-3)  # a cosine of centred colours would say 1
    noise = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), dtype=np.uint8)
    assert (d.pixel_kernel(noise).diagonal() == 1).all() and d.vendi(d.pixel_kernel(noise)) > 1


def test_reference_mass():
    own, reference = torch.randn(2, 20000, generator=rng(2))
    assert d.reference_mass(own, reference) == pytest.approx(0.95, abs=0.006)  # the model is the reference: 3 sigma
    assert d.reference_mass(own + 10, reference) == 0 and d.reference_mass(own - 10, reference) == 1
