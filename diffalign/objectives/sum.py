"""A weighted sum of objectives: it closes the algebra, so SFT and KL terms are objectives and not options."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from diffalign.registry import build
from diffalign.types import Likelihoods, LossOutput, Objective, UserError


@dataclass(frozen=True)
class Sum:
    """sum_k weight_k objective_k.

    terms: config sections of objectives, each with an optional `weight` (default 1), for example
        `[{name: pair, beta: 5000}, {name: sft, weight: 0.1}]`, the SFT-PO of arXiv 2405.16436.
    """

    terms: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("objective.terms is empty: list at least one objective, such as {name: pair}")
        _ = self.objectives  # wrong keys are reported before any weight is loaded

    @cached_property
    def objectives(self) -> list[tuple[float, str, Objective]]:
        """(weight, name, objective) per term."""
        terms = []
        for term in self.terms:
            spec = {key: value for key, value in term.items() if key != "weight"}
            terms.append((float(term.get("weight", 1.0)), str(spec.get("name")), build("objective", spec)))
        return terms

    @property
    def needs(self) -> frozenset[str]:
        """The union of the terms' needs."""
        return frozenset().union(*(objective.needs for _, _, objective in self.objectives))

    def __call__(self, likelihoods: Likelihoods) -> LossOutput:
        total: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        for weight, name, objective in self.objectives:
            output = objective(likelihoods)
            total = weight * output.per_prompt if total is None else total + weight * output.per_prompt
            metrics |= dict(output.metrics)
            metrics[f"term/{name}"] = output.per_prompt.detach()
        assert total is not None
        return LossOutput(per_prompt=total, metrics=metrics)
