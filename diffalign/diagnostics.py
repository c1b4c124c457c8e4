"""What preference training does to a model beside lowering its loss: pure functions of errors, features and pictures.

`error` is the squared denoising error -2 logp of `Likelihoods`, in the unit of the papers' e; `error_ref` is the
reference's on the same noise levels and noises. Where there are several draws, average them before calling: a mean of
comparisons is not the comparison of means. A `gap` is error - error_ref: above 0, the image became less likely than it
was to the reference. Everything is computed in float64, and NaN marks prompts that a number does not apply to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, logsigmoid, normalize

from diffalign.types import UserError

Values = Tensor | NDArray[Any] | Sequence[Any]  # shapes are in the docstrings

TOLERANCE = 1e-6  # of a kernel's symmetry, diagonal and smallest eigenvalue


class Displacement(NamedTuple):
    """Likelihood displacement (arXiv 2410.08847): what the winners themselves lost."""

    mean: float  # mean gap of the winners, in units of error; above 0: they became less likely
    share: float  # share of prompts whose winner's gap is above 0


class ThreeD(NamedTuple):
    """The probes of 3D-Properties (arXiv 2406.07327), as mean gaps in units of error; all 0 at the reference."""

    drop: float  # of losers: drastic drop of what is rejected
    degradation: float  # of winners: the same numbers as Displacement.mean
    dispersion: float  # of third images, of which training saw neither winner nor loser


def _doubles(values: Values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).detach().cpu()


def displacement(winner_gap: Values) -> Displacement:
    """Mean gap of the winners and the share of prompts above 0; `winner_gap` [B]. NaN without any prompt."""
    gap = _doubles(winner_gap)
    gap = gap[~gap.isnan()]
    return Displacement(float(gap.mean()), float((gap > 0).double().mean()))


def three_d(winner_gap: Values, loser_gap: Values, third_gap: Values) -> ThreeD:
    """Mean gaps of losers, winners and third images; each [B], not necessarily of one length."""
    drop, degradation, dispersion = (float(_doubles(gap).nanmean()) for gap in (loser_gap, winner_gap, third_gap))
    return ThreeD(drop, degradation, dispersion)


def ranking_accuracy(winner_error: Values, loser_error: Values) -> float:
    """Share of prompts whose winner is at least as likely as the loser, e_w <= e_l (arXiv 2405.19534); each [B].

    The model's own ranking: no reference in it, unlike implicit accuracy. A tie of the model is right, as in the paper.
    """
    winner, loser = _doubles(winner_error), _doubles(loser_error)
    applies = ~(winner.isnan() | loser.isnan())
    return float((winner <= loser)[applies].double().mean())


def difficulty(winner_error_ref: Values, loser_error_ref: Values) -> Float[Tensor, " B"]:
    """c = logp_ref(loser) - logp_ref(winner) = (k_w - k_l) / 2, in units of logp: above 0 where the reference is wrong.

    Each [B]. arXiv 2405.19534.
    """
    return (_doubles(winner_error_ref) - _doubles(loser_error_ref)) / 2


def ranking_threshold(difficulty: Values, beta: float) -> Float[Tensor, " B"]:
    """The DPO loss at or below which a pair is ranked right, and only there: -log sigmoid(beta c); `difficulty` [B].

    arXiv 2405.19534. Holds for the logistic link with hard labels and full reference strength: its margin is
    beta (logp_w - logp_l + c). `beta` is per unit of logp, as `objective.beta`.
    """
    return -logsigmoid(beta * _doubles(difficulty))


def ideal_ranking_accuracy(difficulty: Values, beta: float, preference: Values | float) -> float:
    """Ranking accuracy of the exact optimum of DPO: share of pairs with c <= logit(P) / beta (arXiv 2405.19534).

    The optimum's log-ratio gap is logit(P) / beta, so a strong reference error outlives perfect training.

    Args:
        difficulty: c [B].
        beta: per unit of logp, as `objective.beta`.
        preference: P(winner preferred to loser) in [0, 1]: [B], or one number for all.

    Raises:
        UserError: beta is not positive, or a preference outside [0, 1].
    """
    c, probability = _doubles(difficulty), _doubles(preference)  # type: ignore[arg-type]
    if beta <= 0:
        raise UserError(f"ideal_ranking_accuracy: beta must be positive (got {beta})")
    if bool(((probability < 0) | (probability > 1)).any()):
        raise UserError("ideal_ranking_accuracy: preference holds probabilities, between 0 and 1")
    right = beta * c <= torch.logit(probability)
    return float(right[~c.isnan()].double().mean())


def ches(winner: Values, loser: Values, length_normalize: bool = False) -> Float[Tensor, " ..."]:
    """CHES (arXiv 2410.08847): <sum h_w, sum h_l> - |sum h_w|^2, high where a pair's winner will be displaced.

    Args:
        winner, loser: features per spatial token, [..., L, D], at one noise level and noise for both; L may differ.
        length_normalize: means over tokens for sums, so that pictures of different sizes compare.

    Returns:
        [...]. The paper's h are a language model's last hidden states; here they are whatever layer the caller reads,
        and the caller averages the scores over noise levels.
    """
    w, x = _doubles(winner), _doubles(loser)
    w, x = (w.mean(-2), x.mean(-2)) if length_normalize else (w.sum(-2), x.sum(-2))
    return (w * x).sum(-1) - w.square().sum(-1)


def filter_ches(scores: Values, drop: float = 0.05) -> Int64[Tensor, " kept"]:
    """Indices, rising, of the pairs that stay when the share `drop` with the highest scores leaves; `scores` [B].

    A NaN goes first; of equal scores the later goes first.

    Raises:
        UserError: `drop` is not in [0, 1).
    """
    if not 0 <= drop < 1:
        raise UserError(f"filter_ches: drop must lie in [0, 1) (got {drop})")
    order = _doubles(scores).argsort(stable=True)  # NaN sorts last
    num_dropped = math.floor(drop * len(order) + 1e-9)  # 0.29 * 100 is 28.999...
    return order[: len(order) - num_dropped].sort().values


def cosine_kernel(features: Values) -> Float[Tensor, "n n"]:
    """Cosine similarities of feature vectors [n, D].

    Meant for features whose cosines are not negative: to `vendi` a vector and its opposite are one item.

    Raises:
        UserError: a zero vector, which has no direction.
    """
    x = _doubles(features)
    if not bool(x.square().sum(dim=1).all()):
        raise UserError("cosine_kernel: a feature vector is zero")
    unit = normalize(x, dim=1)
    return (unit @ unit.T).fill_diagonal_(1.0)


def vendi(kernel: Values) -> float:
    """Vendi score (arXiv 2210.02410): exp of the entropy of K / n's eigenvalues, the effective number of items.

    1 for n equal items, n for n orthogonal ones; `kernel` [n, n] holds similarities with ones on the diagonal.

    Raises:
        UserError: not such a kernel.
    """
    k = _doubles(kernel)
    num = len(k)
    if num == 0 or k.shape != (num, num):
        raise UserError(f"vendi: expected a square kernel of at least one item (got shape {list(k.shape)})")
    if float((k - k.T).abs().max()) > TOLERANCE or float((k.diagonal() - 1).abs().max()) > TOLERANCE:
        raise UserError("vendi: the kernel must be symmetric with ones on its diagonal")
    shares = torch.linalg.eigvalsh(k / num)
    if float(shares.min()) < -TOLERANCE:
        raise UserError("vendi: the kernel has a negative eigenvalue, so it is no similarity")
    return math.exp(float(torch.special.entr(shares.clamp_min(0)).sum()))


def vendi_of_features(features: Values) -> float:
    """The Vendi score of feature vectors [n, D] under cosine similarity."""
    return vendi(cosine_kernel(features))


def vendi_se(kernel: Values) -> float:
    """Jackknife standard error of `vendi` over its items (Efron and Tibshirani 1993, chapter 11); `kernel` [n, n].

    NaN below three items: of two, whichever leaves, one stays, and one item always scores 1.
    """
    k = _doubles(kernel)
    num = len(k)
    if num < 3:
        return math.nan
    others = [torch.arange(num) != left_out for left_out in range(num)]
    scores = torch.tensor([vendi(k[keep][:, keep]) for keep in others], dtype=torch.float64)
    return math.sqrt((num - 1) / num * float((scores - scores.mean()).square().sum()))


def pixel_features(images: Values, side: int = 8) -> Float[Tensor, "N D"]:
    """Pictures uint8 [N, H, W, 3] as their mean colours in [0, 1] on a coarse grid, D = 3 side^2: layout and colour."""
    x = _doubles(images).permute(0, 3, 1, 2) / 255
    return adaptive_avg_pool2d(x, side).flatten(1)


def pixel_kernel(images: Values, side: int = 8, width: float = 0.25) -> Float[Tensor, "N N"]:
    """exp(-d^2 / (2 width^2)) of pictures uint8 [N, H, W, 3], d the root mean square difference of `pixel_features`.

    A Gaussian, because a cosine is blind to brightness. `width`, in shares of the colour range, is a choice and not a
    measurement: compare diversities of one width only.
    """
    x = pixel_features(images, side)
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0 on the diagonal
    return torch.exp(-distance.square() / x.shape[1] / (2 * width**2))


def reference_mass(own_errors: Values, reference_errors: Values, quantile: float = 0.95) -> float:
    """Share of own samples that the reference finds no stranger than `quantile` of its own (after arXiv 2410.11677).

    Both are the reference's errors, on the model's own samples [N] and on the reference's samples [M], at the same
    noise levels. About `quantile` at the reference; falling when samples leave what it knows.
    """
    bound = torch.quantile(_doubles(reference_errors), quantile)
    return float((_doubles(own_errors) <= bound).double().mean())
