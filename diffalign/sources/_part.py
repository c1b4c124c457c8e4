"""What one stage of a staged run sees: its share of the pairs (a curriculum), or its stretch of the endless stream.

Curry-DPO (arXiv 2403.07230) makes K - 1 pairs of K ranked images, best against each other one, and trains those with
the s-th largest score gap of their prompt in stage s. Pairs of any origin are ordered by their gap instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffalign.types import EndpointBatch, UserError

Order = Literal["all", "easy-to-hard", "hard-to-easy", "random"]
Split = Literal["quantiles", "prompts"]


@dataclass(frozen=True)
class Part:
    """Stage `stage` (from 1) of `num`; `order`, `by` and `split` as in section `stages`."""

    stage: int = 1
    num: int = 1
    order: Order = "all"
    by: str | None = None
    split: Split = "quantiles"

    def __post_init__(self) -> None:
        if not 1 <= self.stage <= self.num:
            raise UserError(f"source.part.stage must be between 1 and source.part.num={self.num} (got {self.stage})")

    @property
    def is_curriculum(self) -> bool:
        """Whether the pairs are divided between the stages, rather than all seen in each."""
        return self.order != "all"


def stages_of(ease: np.ndarray, num: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The stage, 1 to `num` (int16 [n]), of pairs of that ease (float [n], high first; of equals the earlier first).

    Without `groups` the pairs are cut into `num` equal parts. With them (int [n], the prompt of each pair) every
    group's pairs are: pair r of m goes to part floor(r num / m), so that with m = num it is Curry-DPO's.
    """
    n = len(ease)
    stages = np.empty(n, np.int16)
    if groups is None:
        order = np.argsort(-ease, kind="stable")
        bounds = [-(-stage * n // num) for stage in range(num + 1)]
        for stage in range(num):
            stages[order[bounds[stage] : bounds[stage + 1]]] = stage + 1
        return stages
    order = np.lexsort((-ease, groups))
    _, first, inverse, counts = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    stages[order] = (np.arange(n) - first[inverse]) * num // counts[inverse] + 1
    return stages


def rows_of(part: Part | None, data: Any, rows: np.ndarray, seed: int) -> tuple[np.ndarray, Mapping[str, Any]]:
    """The rows of `rows` (int64 [n], records of `data`) that the stage trains on, and what run.json says about them.

    Every row is in exactly one stage of a curriculum.

    Raises:
        UserError: no gap to order by, or fewer pairs than stages.
    """
    if part is None or not part.is_curriculum:
        return rows, {}
    if part.order == "random":
        column, ease = None, np.random.default_rng([seed, 3]).random(len(rows))
    else:
        column, gaps = data.gaps(rows, part.by)
        ease = gaps if part.order == "easy-to-hard" else -gaps
    groups = data.prompt_keys[rows] if part.split == "prompts" else None
    mine = stages_of(ease, part.num, groups) == part.stage
    if not mine.any():
        raise UserError(f"stage {part.stage} of {part.num} has no pair of {len(rows)}: set a smaller stages.num")
    facts: dict[str, Any] = {"stage": part.stage, "num": part.num, "order": part.order, "by": column}
    if column is not None:
        facts |= {"gap": {"min": gaps[mine].min(), "mean": gaps[mine].mean(), "max": gaps[mine].max()}}
    return rows[mine], {"part": facts}


@dataclass(frozen=True)
class Continued:
    """Batches that go on after `first` steps of others: stages that share all pairs then see no draw twice."""

    batches: Any
    first: int

    def is_ready(self, step: int) -> bool:
        """Always: nothing depends on the policy's weights."""
        return True

    def refresh(self, step: int) -> Mapping[str, float]:
        """Nothing to do."""
        return {}

    def batch(self, step: int) -> EndpointBatch:
        """This process's share of the global batch of 0-based `step` of the stage."""
        return self.batches.batch(self.first + step)

    def holdout(self, num_prompts: int, batch_size: int) -> Iterator[EndpointBatch]:
        """The same held-out records at every stage."""
        return self.batches.holdout(num_prompts, batch_size)

    def facts(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return self.batches.facts()
