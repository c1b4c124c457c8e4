"""Batches of recorded preferences as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign import randomness
from diffalign.data import split_holdout
from diffalign.types import EndpointBatch, Setting

NUM_SAMPLE_PROMPTS = 8  # held-out prompts offered for sample grids


class RecordedBatches:
    """Batches as a pure function of the step.

    Each bucket is an endless stream of its records, re-permuted every epoch. A step takes the next `batch_size` records
    of one bucket, the bucket drawn in proportion to its records, so that all of a global batch has one shape.
    """

    def __init__(self, source: Any, data: Any, policy: Any, setting: Setting) -> None:
        self.source, self.data, self.policy, self.setting = source, data, policy, setting
        self.train_rows, self.holdout_rows = split_holdout(data, source.holdout, setting.seed)
        bucket_of = data.bucket_of(self.train_rows)
        self.members = {int(bucket): self.train_rows[bucket_of == bucket] for bucket in np.unique(bucket_of)}
        self.empty = {key: value[0] for key, value in data.empty_text.items()}
        self._plan_buckets()

    def _plan_buckets(self) -> None:
        """The bucket of every step, and how many steps of that bucket came before: 16 bytes a step."""
        buckets = np.array(sorted(self.members))
        counts = np.array([len(self.members[int(bucket)]) for bucket in buckets], float)
        # the first s draws are the same whatever the number of steps
        draws = np.random.default_rng([self.setting.seed, 1]).random(self.setting.steps)
        chosen = np.searchsorted(np.cumsum(counts / counts.sum())[:-1], draws, side="right")
        self.bucket_of_step = buckets[chosen]
        self.earlier = np.zeros(self.setting.steps, np.int64)
        for position in range(len(buckets)):
            here = chosen == position
            self.earlier[here] = np.arange(here.sum())

    def batch(self, step: int) -> EndpointBatch:
        """This process's share of the global batch of 0-based `step`."""
        members = self.members[int(self.bucket_of_step[step])]
        first = int(self.earlier[step]) * self.setting.batch_size
        places = [first + row for row in self.setting.rows]
        visits = [place // len(members) for place in places]
        rows = [
            members[randomness.permute(place % len(members), len(members), self.setting.seed, "order", visit)]
            for place, visit in zip(places, visits, strict=True)
        ]
        return self._collate(np.array(rows), torch.tensor(visits))

    def holdout(self, num_prompts: int, batch_size: int) -> Iterator[EndpointBatch]:
        """This process's shares of up to `num_prompts` held-out records; the same draws at every call.

        Every process gets as many batches of the same size: the last records that do not fill a round are left out.
        """
        rows = self.holdout_rows[:num_prompts]
        share = max(1, batch_size // self.setting.size)
        bucket_of = self.data.bucket_of(rows) if len(rows) else rows
        for bucket in np.unique(bucket_of):
            of_bucket = rows[bucket_of == bucket]
            for start in range(0, len(of_bucket), share * self.setting.size):
                chunk = of_bucket[start : start + share * self.setting.size]
                fair = len(chunk) // self.setting.size
                if fair:
                    mine = chunk[self.setting.rank * fair : (self.setting.rank + 1) * fair]
                    yield self._collate(mine, torch.zeros(fair, dtype=torch.long), is_training=False)

    def facts(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return {
            "fingerprint": self.source.reader.fingerprint(),
            "num_records": len(self.train_rows),
            "num_holdout": len(self.holdout_rows),
            "buckets": {str(self.data.buckets[bucket]): len(rows) for bucket, rows in self.members.items()},
            "report": self._report(),
            "sample_prompts": self._sample_prompts(),
        }

    def _report(self) -> dict[str, Any]:
        """Counts of the rows used and left out, without the list of the bad ones (the cache's report.json has it)."""
        report = self.data.report.as_dict()
        return {key: report[key] for key in ("num_rows", "num_kept", "bad", "dropped")}

    def _sample_prompts(self) -> list[str]:
        rows = self.holdout_rows if len(self.holdout_rows) else self.train_rows
        prompts: dict[str, None] = {}
        for row in rows[: 8 * NUM_SAMPLE_PROMPTS]:
            prompts[self.source.reader[int(self.data.rows[row])].prompt] = None
            if len(prompts) == NUM_SAMPLE_PROMPTS:
                break
        return list(prompts)

    def _collate(self, rows: np.ndarray, visits: Tensor, is_training: bool = True) -> EndpointBatch:
        """Records to a batch: posterior sample, flips, prompt dropout and size conditioning, all addressed."""
        seed = self.setting.seed
        ids = torch.from_numpy(np.ascontiguousarray(self.data.ids[rows]))
        flips = None
        if self.source.flip and is_training:
            flips = (randomness.uniform(seed, "flip", ids, visits) < 0.5).numpy()
        raw = self.data.batch(rows, flips)
        mean, std = raw["mean"], raw["std"]
        x0 = mean + std * randomness.normal(seed, "posterior", ids, visits, mean.shape[1:])
        text: dict[str, Tensor] = raw["text"]
        if self.source.prompt_dropout and is_training:
            dropped = randomness.uniform(seed, "dropout", ids, visits) < self.source.prompt_dropout
            text = {
                key: torch.where(dropped.reshape(-1, *[1] * (value.dim() - 1)), self.empty[key], value)
                for key, value in text.items()
            }
        cond = text | self._size_cond(raw)
        return EndpointBatch(ids, visits, x0, cond, raw["utility"], raw["mask"], raw["scores"])

    def _size_cond(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        num, candidates = raw["mask"].shape
        target = raw["target_size"].unsqueeze(1).expand(num, candidates, 2)
        flat = (raw["original_size"].flatten(0, 1), raw["crop"].flatten(0, 1), target.flatten(0, 1))
        sizes = self.policy.size_cond(*flat)
        return {key: value.reshape(num, candidates, *value.shape[1:]) for key, value in sizes.items()}
