"""One beta in every convention, so that nobody asks whether 5000 is a typo.

Ours: margin = -(beta / 2) [(e_w - k_w) - (e_l - k_l)], e and k the policy's and the reference's squared error averaged
over the D latent dimensions. What others call beta differs by the 1/2, by sum or mean, and by folded-in constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from diffalign.errors import UserError

# T beta_t / (2 alpha_t (1 - abar_t)), median over t = 1..1000 of the SD schedule (scaled linear, 0.00085 to 0.012): the
# ELBO's coefficient of the *sum* of squares under uniform t and sigma_t^2 = beta_t. tests/test_beta.py computes it.
ELBO_COEFFICIENT = 4.058


@dataclass(frozen=True)
class Convention:
    """`factor(D)`: our beta for one unit of theirs, D the number of latent dimensions."""

    margin: str
    where: str
    factor: Callable[[int], float]


CONVENTIONS: Mapping[str, Convention] = {
    "diffalign": Convention(
        "-(B/2) [mean]",
        "here; Salesforce DiffusionDPO; diffusers SDXL script; DCPO; flow_grpo's DPO",
        lambda dimensions: 1.0,
    ),
    "diffusers-sd": Convention("-B [mean]", "diffusers SD1.5 script; Diffusion-KTO code", lambda dimensions: 2.0),
    "sum-half": Convention("-(B/2) [sum]", "Flow-DPO paper's formula", lambda dimensions: float(dimensions)),
    "sum": Convention(
        "-B [sum]",
        "Diffusion-DPO paper eq. 14 with T and the weight folded into B; RankDPO paper",
        lambda dimensions: 2.0 * dimensions,
    ),
    "nats": Convention(
        "B (log-ratio in nats)",
        "language models; the ELBO's own unit at the median noise level of the SD schedule",
        lambda dimensions: 2.0 * dimensions * ELBO_COEFFICIENT,
    ),
}


def convert_beta(value: float, source: str, target: str = "diffalign", latent: Sequence[int] = (4, 64, 64)) -> float:
    """`value` of convention `source` in convention `target`, for latents of this shape.

    `nats` is exact only where the margin's weight is the ELBO's; for `constant` weights it is the median noise level's.

    Raises:
        UserError: an unknown convention, or a latent shape that is none.
    """
    for name in (source, target):
        if name not in CONVENTIONS:
            raise UserError(f"unknown beta convention {name!r}: choose one of {', '.join(CONVENTIONS)}")
    dimensions = math.prod(latent)
    if not latent or dimensions < 1:
        raise UserError(f"the latent's shape must be positive numbers such as 4 64 64 (got {list(latent)})")
    return value * CONVENTIONS[source].factor(dimensions) / CONVENTIONS[target].factor(dimensions)


def beta_table(value: float, source: str, latent: Sequence[int] = (4, 64, 64)) -> list[str]:
    """One line per convention: the same strength, as each place would write it.

    Raises:
        UserError: as `convert_beta`.
    """
    lines = [f"the same strength for latents {' x '.join(map(str, latent))} (D = {math.prod(latent)}):"]
    for name, convention in CONVENTIONS.items():
        number = convert_beta(value, source, name, latent)
        lines.append(f"  {name:13s} {number:<12.6g} {convention.margin:22s} {convention.where}")
    return lines
