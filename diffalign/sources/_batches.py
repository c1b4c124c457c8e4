"""Batches of recorded preferences as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffalign import randomness
from diffalign.data import split_holdout
from diffalign.sources._classes import ClassDraws
from diffalign.sources._masks import MaskFolder
from diffalign.sources._part import rows_of
from diffalign.sources._users import UserDraws
from diffalign.types import EndpointBatch, Setting

NUM_SAMPLE_PROMPTS = 8  # held-out prompts offered for sample grids


class RecordedBatches:
    """Batches as a pure function of the step.

    Each bucket is an endless stream of its records, re-permuted every epoch. A step takes the next `batch_size` records
    of one bucket, the bucket drawn in proportion to its records, so that all of a global batch has one shape.

    With `source.desirable_share` a bucket has two streams, `_classes`: a visit is then one of its own kind's epoch.
    """

    def __init__(self, source: Any, data: Any, policy: Any, setting: Setting) -> None:
        self.source, self.data, self.policy, self.setting = source, data, policy, setting
        self.train_rows, self.holdout_rows = split_holdout(data, source.holdout, setting.seed)
        self.train_rows, self.part_facts = rows_of(source.part, data, self.train_rows, setting.seed)
        self.users = None
        if source.users is not None:
            self.users = UserDraws(source, data, policy, setting, self.train_rows, self.holdout_rows)
            self.train_rows, self.holdout_rows = self.users.train_rows, self.users.holdout_rows
        bucket_of = data.bucket_of(self.train_rows)
        self.members = {int(bucket): self.train_rows[bucket_of == bucket] for bucket in np.unique(bucket_of)}
        self.empty = {key: value[0] for key, value in data.empty_text.items()}
        self.masks = None if source.masks is None else MaskFolder(source.masks)
        self._plan_buckets()
        self.classes = None
        if source.desirable_share is not None:
            share, kinds = source.desirable_share, data.is_desirable
            self.classes = ClassDraws(self.members, kinds, self.bucket_of_step, share, setting)

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

    def _place(self, step: int, row: int) -> tuple[np.ndarray, int]:
        """(records of a stream, place in it) of a row of a step's global batch."""
        bucket = int(self.bucket_of_step[step])
        first = int(self.earlier[step]) * self.setting.batch_size
        if self.classes is not None:
            return self.classes.place(bucket, step, row, first)
        return self.members[bucket], first + row

    def is_ready(self, step: int) -> bool:
        """Always: nothing depends on the policy's weights."""
        return True

    def refresh(self, step: int) -> Mapping[str, float]:
        """Nothing to do."""
        return {}

    def batch(self, step: int) -> EndpointBatch:
        """This process's share of the global batch of 0-based `step`."""
        rows, visits = self._draw(step)
        return self._collate(np.array(rows), torch.tensor(visits))

    def rows_of_step(self, step: int) -> list[int]:
        """Places in `data` of the records of this process's share."""
        return self._draw(step)[0]

    def _draw(self, step: int) -> tuple[list[int], list[int]]:
        rows, visits = [], []
        for row in self.setting.rows:
            members, place = self._place(step, row)
            visit, index = divmod(place, len(members))
            rows.append(int(members[randomness.permute(index, len(members), self.setting.seed, "order", visit)]))
            visits.append(visit)
        return rows, visits

    def holdout(self, num_prompts: int, batch_size: int, of_unseen: bool = False) -> Iterator[EndpointBatch]:
        """This process's shares of up to `num_prompts` held-out records; the same draws at every call.

        `of_unseen`: those of held-out users. Every process gets as many batches of the same size: the last records that
        do not fill a round are left out.
        """
        rows = (self.users.unseen_rows if of_unseen and self.users else self.holdout_rows)[:num_prompts]
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
        return (
            {
                "fingerprint": self.source.reader.fingerprint(),
                "num_records": len(self.train_rows),
                "num_holdout": len(self.holdout_rows),
                "buckets": {str(self.data.buckets[bucket]): len(rows) for bucket, rows in self.members.items()},
                "report": self._report(),
                "sample_prompts": self._sample_prompts(),
            }
            | dict(self.part_facts)
            | ({} if self.users is None else {"users": self.users.facts()})
        )

    def records(self, rows: np.ndarray) -> EndpointBatch:
        """Records of one bucket, by their places in `data`, as they are: their first visit, no flips, no dropout."""
        return self._collate(rows, torch.zeros(len(rows), dtype=torch.long), is_training=False)

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
        noise = randomness.normal(seed, "posterior", ids, visits, mean.shape[1:])
        x0 = mean + std * _shared_by_equals(mean, noise)
        text: dict[str, Tensor] = raw["text"]
        if self.source.prompt_dropout and is_training:
            dropped = randomness.uniform(seed, "dropout", ids, visits) < self.source.prompt_dropout
            text = {
                key: torch.where(dropped.reshape(-1, *[1] * (value.dim() - 1)), self.empty[key], value)
                for key, value in text.items()
            }
        cond = text | self._size_cond(raw)
        if self.users is not None:
            cond |= self.users.cond(rows, ids, visits, x0.shape[1], is_training)
        region = None
        if self.masks is not None:
            height, width = raw["target_size"][0].tolist()
            region = self.masks.read(ids, x0.shape[1], (height, width), x0.shape[3:], flips)
        return EndpointBatch(ids, visits, x0, cond, raw["utility"], raw["mask"], raw["scores"], region)

    def _size_cond(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        num, candidates = raw["mask"].shape
        target = raw["target_size"].unsqueeze(1).expand(num, candidates, 2)
        flat = (raw["original_size"].flatten(0, 1), raw["crop"].flatten(0, 1), target.flatten(0, 1))
        sizes = self.policy.size_cond(*flat)
        return {key: value.reshape(num, candidates, *value.shape[1:]) for key, value in sizes.items()}


def _shared_by_equals(
    mean: Float[Tensor, "B K C h w"], noise: Float[Tensor, "B K C h w"]
) -> Float[Tensor, "B K C h w"]:
    """The noise, where a candidate repeats an earlier one's image (under another caption) that one's."""
    is_same = (mean[:, :, None] == mean[:, None]).flatten(3).all(dim=3)  # [B, K, K], the diagonal true
    first = is_same.int().argmax(dim=2)
    return noise.gather(1, first[:, :, None, None, None].expand_as(noise))
