"""Likelihoods with given errors or rewards, and the gradient of an objective with respect to the policy's errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffalign.types import Likelihoods, LossOutput, Objective

Rows = Sequence[Sequence[float]]


def from_errors(
    errors: Rows, reference: Rows | None, utility: Rows, mask: Any = None, dtype: torch.dtype = torch.float64
) -> Likelihoods:
    """Rows are prompts, columns candidates; logp = -1/2 error."""
    e = torch.tensor(errors, dtype=torch.float64)
    k = None if reference is None else torch.tensor(reference, dtype=torch.float64)
    return Likelihoods(
        logp=(-0.5 * e).to(dtype).requires_grad_(),
        logp_ref=None if k is None else (-0.5 * k).to(dtype),
        utility=torch.tensor(utility, dtype=dtype),
        mask=torch.ones(e.shape, dtype=torch.bool) if mask is None else torch.tensor(mask),
    )


def from_rewards(
    rewards: Rows, utility: Rows, beta: float, mask: Any = None, dtype: torch.dtype = torch.float64
) -> Likelihoods:
    """beta logratio is the reward."""
    errors = [[-2 * r / beta for r in row] for row in rewards]
    return from_errors(errors, [[0.0] * len(row) for row in rewards], utility, mask, dtype)


def columns(*candidates: Sequence[float]) -> list[list[float]]:
    """Candidates' values over prompts to rows of prompts."""
    return [list(row) for row in zip(*candidates, strict=True)]


def gradient(objective: Objective, likelihoods: Likelihoods) -> torch.Tensor:
    """d(sum of per_prompt)/d error: [B, K]."""
    likelihoods.logp.grad = None
    objective(likelihoods).per_prompt.sum().backward()
    assert likelihoods.logp.grad is not None
    return -0.5 * likelihoods.logp.grad


def check_sound(objective: Objective, likelihoods: Likelihoods) -> LossOutput:
    """[B], finite with finite gradients, metrics detached."""
    output = objective(likelihoods)
    assert output.per_prompt.shape == (len(likelihoods.utility),)
    assert output.per_prompt.isfinite().all()
    assert gradient(objective, likelihoods).isfinite().all()
    for value in output.metrics.values():
        assert value.shape == output.per_prompt.shape and not value.requires_grad
    return output


def permuted(likelihoods: Likelihoods, order: Sequence[int]) -> Likelihoods:
    """The same prompts with their candidates in another order."""
    index = torch.tensor(order)
    reference = likelihoods.logp_ref
    return Likelihoods(
        likelihoods.logp.detach()[:, index].requires_grad_(),
        None if reference is None else reference[:, index],
        likelihoods.utility[:, index],
        likelihoods.mask[:, index],
    )


def agree(actual: torch.Tensor, expected: Any, atol: float = 1e-6, rtol: float = 0.0) -> None:
    """Values against numbers given in decimals."""
    torch.testing.assert_close(
        actual.detach().double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=rtol
    )
