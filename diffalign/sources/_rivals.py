"""What source.name=rivals makes in a part of a round, and the batches of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from diffalign import randomness
from diffalign.data import Shard
from diffalign.sampling import sample
from diffalign.sources._batches import RecordedBatches
from diffalign.sources._judge import Judge
from diffalign.sources._round_pictures import decoded
from diffalign.sources._rounds import Place, RoundFiles, total
from diffalign.sources._sampled import ReferenceDenoiser, stochastic_sampler
from diffalign.types import EndpointBatch, Setting

if TYPE_CHECKING:
    from diffalign.sources.rivals import Rivals


class RivalBatches:
    """Batches of records with their rivals: which records is a function of the step, the rivals are the round's.

    `mine` gives this process's share of a batch, `whole` all of it, from which any process can make any part.
    """

    def __init__(
        self,
        source: Rivals,
        mine: RecordedBatches,
        whole: RecordedBatches,
        policy: Any,
        reference: Any,
        setting: Setting,
    ) -> None:
        self.source, self.mine, self.whole, self.setting = source, mine, whole, setting
        self._policy, self._reference = policy, reference
        self._rows = min(source.sampling.batch_size, setting.batch_size)  # of a part, all of one step
        self._parts_per_step = math.ceil(setting.batch_size / self._rows)
        self.num_parts = source.steps_per_round * self._parts_per_step
        self._files = RoundFiles(self, setting)
        self._round = -1
        self._shards: list[Shard] = []
        self._sampler, self._eta = stochastic_sampler(policy.schedule, source.sampling.eta, is_recorded=False)

    def is_ready(self, step: int) -> bool:
        """Whether the rivals of `step` are there."""
        return step // self.source.steps_per_round == self._round

    def refresh(self, step: int) -> Mapping[str, float]:
        """Makes, or finds, the rivals of the round of `step`.

        Raises:
            UserError: training is in the middle of the round and its files are gone.
        """
        number = step // self.source.steps_per_round
        self._shards = self._files.make(number, 0, number * self.source.steps_per_round, step)
        self._round = number
        if self.setting.rank == 0:
            self._files.forget(number)
        told = {name: total(self._shards, name) for name in ("images", "network_rows", "unjudged")}
        if self.source.judge is not None:
            told |= self._judged(self.source.judge)
        return {f"rollout/{name}": value for name, value in told.items()}

    def _judged(self, judge: Judge) -> dict[str, float]:
        """Mean scores of the recorded images and of the rivals, and how often a rival beats every recorded image."""
        recorded, rivals, wins = [], [], []
        for shard in self._shards:
            for row in np.array(shard.rows("scores", 0, shard.num_rows("scores"))):
                recorded.append(row[:-1])
                rivals.append(row[-1])
                utility = judge.utility(row)
                if np.isfinite(utility[-1]) and np.isfinite(utility[:-1]).any():
                    wins.append(utility[-1] > np.nanmax(utility[:-1]))
        means: dict[str, float] = {"rival_wins": float(np.mean(wins))} if wins else {}
        if judge.prefer == "pairwise":  # an embedding's mean says nothing
            return means
        for part, rows in (("_recorded", np.concatenate(recorded)), ("", np.stack(rivals))):
            for j, name in enumerate(judge.names):
                column = rows[np.isfinite(rows[:, j]), j]
                if len(column):
                    means[name + part] = float(column.mean())
        return means

    @torch.no_grad()
    def make(self, place: Place) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        """x [n, C, h, w]: the rivals of rows of one step; with a judge scores [n, K+1, J], the rival's last, NaN where
        nobody judged. Steps past the last of the run have none."""
        offset, part = divmod(place.part, self._parts_per_step)
        step = place.round * self.source.steps_per_round + offset
        dtype = getattr(torch, self.source.latents)
        if step >= self.setting.steps:
            empty: dict[str, Tensor] = {"x": torch.empty(0, dtype=dtype)}
            if self.source.judge is not None:
                empty["scores"] = torch.empty(0, 2, len(self.source.judge.names))
            return empty, {}
        batch = self._recorded(self.whole.batch(step)[part * self._rows : (part + 1) * self._rows])
        settings, device = self.source.sampling, self._policy.device
        cond = {name: value[:, 0].to(device) for name, value in batch.cond.items()}
        uncond = {
            name: self.whole.empty[name].to(device).expand_as(value) if name in self.whole.empty else value
            for name, value in cond.items()
        }

        def noise(stream: str) -> Tensor:
            shape = batch.x0.shape[2:]
            return randomness.normal(self.setting.seed, f"rival {stream}", batch.ids, batch.visits, shape).to(device)

        is_policy = self.source.rival_from == "policy"
        with self.setting.autocast():
            x0 = sample(
                self._policy if is_policy else ReferenceDenoiser(self._reference, self._policy.schedule),
                cond,
                uncond,
                noise("start"),
                sampler=self._sampler,
                num_steps=settings.num_steps,
                cfg_scale=settings.cfg_scale,
                eta=self._eta,
                step_noise=lambda index: noise(f"step {index}"),
            )
        rows = len(batch) * settings.num_steps * (1 if settings.cfg_scale == 1 else 2)
        tensors, unjudged = {"x": x0.cpu().to(dtype)}, 0
        if self.source.judge is not None:
            scores = torch.from_numpy(self._scores(batch, tensors["x"].float(), step, part))
            is_there = torch.cat([batch.mask, torch.ones(len(batch), 1, dtype=torch.bool)], dim=1)
            unjudged = int(scores.isnan().any(dim=2)[is_there].sum())
            tensors["scores"] = scores.masked_fill(~is_there[:, :, None], torch.nan)  # a short list repeats an image
        return tensors, {"images": len(batch), "network_rows": rows, "unjudged": unjudged}

    def _recorded(self, batch: EndpointBatch) -> EndpointBatch:
        """The records' images that take part: of `winner` the one of highest utility."""
        if self.source.recorded == "all":
            return batch
        best = batch.utility.masked_fill(~batch.mask, -torch.inf).argmax(dim=1)
        rows = torch.arange(len(best))

        def pick(value: Tensor) -> Tensor:
            return value[rows, best].unsqueeze(1)

        return replace(
            batch,
            x0=pick(batch.x0),
            cond={name: pick(value) for name, value in batch.cond.items()},
            utility=pick(batch.utility),
            mask=pick(batch.mask),
            scores={},
            region=None,
        )

    def _scores(
        self, batch: EndpointBatch, rivals: Tensor, step: int, part: int
    ) -> Float[NDArray[np.float32], "n K1 J"]:
        """Of the recorded images and the rival, all decoded from latents, so that none has the decoder against it."""
        assert self.source.judge is not None
        x0 = torch.cat([batch.x0, rivals[:, None]], dim=1)
        places = self.whole.rows_of_step(step)[part * self._rows : part * self._rows + len(batch)]
        prompts = [self.source.reader[int(self.whole.data.rows[row])].prompt for row in places]
        texts = [prompt for prompt in prompts for _ in range(x0.shape[1])]
        images = decoded(self._policy, x0.flatten(0, 1).to(self._policy.device))
        return self.source.judge.score(images, texts).reshape(len(batch), x0.shape[1], -1)

    def batch(self, step: int) -> EndpointBatch:
        """This process's share of the step's global batch, the rival as every record's last candidate."""
        assert self.is_ready(step), "refresh first"
        batch = self._recorded(self.mine.batch(step))
        offset = step % self.source.steps_per_round
        rivals, scores = [], []
        for row in self.setting.rows:
            part, place = divmod(row, self._rows)
            shard = self._shards[offset * self._parts_per_step + part]
            rivals.append(np.array(shard.rows("x", place, 1)))
            if self.source.judge is not None:
                scores.append(np.array(shard.rows("scores", place, 1)))
        x0 = torch.from_numpy(np.concatenate(rivals)).float()[:, None]
        utility = torch.full((len(batch), 1), self.source.rival_utility)
        whole = self._appended(batch, x0, utility, torch.ones(len(batch), 1, dtype=torch.bool))
        if self.source.judge is not None:
            # this share's longest list may be shorter than the step's
            judged = np.concatenate(scores)[:, [*range(batch.x0.shape[1]), -1]]
            is_judged = torch.from_numpy(np.isfinite(judged).all(axis=2))
            utility = torch.from_numpy(np.nan_to_num(np.stack([self.source.judge.utility(row) for row in judged])))
            columns = torch.from_numpy(np.nan_to_num(judged)).unbind(dim=2)
            named = dict(zip(self.source.judge.names, columns, strict=True))
            return replace(whole, utility=utility.float(), mask=whole.mask & is_judged, scores=named)
        if self.source.recorded == "winner":
            whole.utility[:, 0] = self.source.rival_utility + 1
        return whole

    def _appended(self, batch: EndpointBatch, x0: Tensor, utility: Tensor, mask: Tensor) -> EndpointBatch:
        """The batch with one more candidate per record, of the first one's conditioning."""
        return replace(
            batch,
            x0=torch.cat([batch.x0, x0], dim=1),
            cond={name: torch.cat([value, value[:, :1]], dim=1) for name, value in batch.cond.items()},
            utility=torch.cat([batch.utility, utility], dim=1),
            mask=torch.cat([batch.mask, mask], dim=1),
            scores={},
        )

    def holdout(self, num_prompts: int, batch_size: int) -> Iterator[EndpointBatch]:
        """Held-out records as they are, the rival's place masked: pairs, where the data has pairs."""
        if self.source.recorded == "winner":
            return
        for batch in self.mine.holdout(num_prompts, batch_size):
            nothing = torch.zeros(len(batch), 1)
            yield self._appended(batch, batch.x0[:, :1], nothing, nothing.bool())

    def facts(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return self.mine.facts()
