"""What source.name=branching makes in a part of a round: pairs of next states of one x_t, and the batches of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from diffalign import randomness
from diffalign.data import PromptCond, Shard
from diffalign.models._preview import decoder
from diffalign.sampling import grid
from diffalign.sources._chain import Chain, Transition
from diffalign.sources._round_pictures import prompt_facts
from diffalign.sources._rounds import Place, total
from diffalign.sources._sampled import prompts_of_part, stochastic_sampler
from diffalign.types import Setting, StepBatch, UserError

if TYPE_CHECKING:
    from diffalign.sources.branching import Branching


@dataclass
class _Kept:
    """Pairs so far: per transition x_t [J, C, h, w] of winner and loser, x_prev [2, C, h, w] and the rest."""

    xt: list[Tensor] = field(default_factory=list)
    x_prev: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


class Pools:
    """A `Maker`: a part holds `sampling.batch_size` candidates, or one prompt's where these are more.

    A prompt costs first_step + 1 network evaluations before the first verdict and `candidates` for each later step, as
    in the released code: the evaluation that gives a candidate's preview is the one that its own next step needs.
    After the last step that branches nothing is sampled: only the pairs are wanted.
    """

    def __init__(self, source: Branching, policy: Any, cond: PromptCond, setting: Setting) -> None:
        self.source, self.policy, self.cond, self.setting = source, policy, cond, setting
        self.prompts_per_part = max(1, source.sampling.batch_size // source.candidates)
        self.num_parts = math.ceil(source.prompts_per_round / self.prompts_per_part)
        self.sampler, self.eta = stochastic_sampler(policy.schedule, source.sampling.eta, is_recorded=True)
        self.grid = grid(policy.schedule, self.sampler, source.sampling.num_steps, self.eta)
        self.stds = [float(self._std(t, s)) for t, s in self.grid]
        self.end = len(self.grid) if self.stds[-1] > 0 else len(self.grid) - 1  # DDIM's last step may add none
        if source.last_step is not None:
            self.end = min(self.end, source.last_step + 1)
        if self.end <= source.first_step:
            raise UserError(f"source.first_step={source.first_step}: no step from there on adds noise to differ by")
        self.decode = decoder(policy, source.preview)

    # Making

    @torch.no_grad()
    def make(self, place: Place) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        """Samples the part's prompts.

        xt [U, J, C, h, w] (J is 1 where a pair shares it), x_prev [U, 2, C, h, w] winner first, logp_old [U, 2], times
        [U, 2] (t, s), scores [U, 2, J'], prompt [U], id [U]. Counts by step: pools_<i>, kept_<i>, ties_<i>, gap_<i>.
        The run's precision is the network's alone: previews are decoded and judged as everywhere else.
        """
        source, k = self.source, self.source.candidates
        prompts, ids = prompts_of_part(place, self.cond, self.prompts_per_part, source.prompts_per_round, self.setting)
        how: dict[str, Any] = {"policy": self.policy, "cond": self.cond, "source": source}
        how |= {"grid": self.grid, "eta": self.eta, "seed": self.setting.seed, "autocast": self.setting.autocast}
        chain = Chain(**how, prompts=prompts, ids=ids)
        kept, counts = _Kept(), dict[str, float]()
        is_open = np.ones(len(prompts), dtype=bool)  # prompts that may still give a pair
        for index in range(source.first_step):
            chain.step(index)
        pred: Tensor | None = chain.predict(chain.xt, index=source.first_step, copies=1)
        for start in range(source.first_step, self.end, source.window):
            end = min(start + source.window, self.end)
            path = chain.branch(range(start, end), pred)
            flat, is_last = path[-1].x_prev.flatten(0, 1), end == len(self.grid)
            previews, level = flat, 0.0
            if not is_last:
                level = self.grid[end][0]
                next_pred = chain.predict(flat, index=end, copies=k)
                previews = chain.preview(flat, next_pred, index=end, copies=k)
            scores = self._scores(previews, prompts, level)
            counts["previews"] = counts.get("previews", 0) + len(flat)
            counts["unjudged"] = counts.get("unjudged", 0) + int(np.isnan(scores).any(axis=2).sum())
            self._select(path, scores, prompts, ids, is_open, kept, counts)
            if not is_open.any():
                break
            going_on = self._going_on(scores, ids, start).to(flat.device)
            rows = torch.arange(len(prompts), device=flat.device) * k + going_on
            chain.xt = flat[rows]
            pred = None if is_last else next_pred[rows]
        counts["network_rows"] = chain.network_rows
        return self._tensors(kept), counts

    def _scores(self, latents: Tensor, prompts: Tensor, level: float) -> Float[NDArray[np.float32], "P k J"]:
        texts = [self.cond.prompts[p] for p in prompts.tolist() for _ in range(self.source.candidates)]
        time = float(self.policy.schedule.network_time(torch.tensor(level, dtype=torch.float64)))
        scores = self.source.judge.score_pixels(self.decode(latents), texts, time)
        return scores.reshape(len(prompts), self.source.candidates, -1)

    def _select(
        self,
        path: Sequence[Transition],
        scores: Float[NDArray[np.float32], "P k J"],
        prompts: Tensor,
        ids: Tensor,
        is_open: NDArray[np.bool_],
        kept: _Kept,
        counts: dict[str, float],
    ) -> None:
        """Adds the pairs of one window, every transition of it, and counts."""
        source, first = self.source, path[0].index
        values = np.stack([source.judge.utility(group) for group in scores])
        threshold = self._threshold(first)
        chosen = []
        for p, row in enumerate(values):
            judged = np.flatnonzero(np.isfinite(row))
            if len(judged) < 2 or not is_open[p]:
                continue
            winner, loser = int(judged[row[judged].argmax()]), int(judged[row[judged].argmin()])
            if source.keep == "first-bad":
                loser = 0  # the trajectory itself
                if not np.isfinite(row[0]) or (source.bad_below is not None and row[0] >= source.bad_below):
                    continue
            gap = math.tanh((row[winner] - row[loser]) / (2 * source.temperature)) if winner != loser else 0.0
            counts[f"pools_{first}"] = counts.get(f"pools_{first}", 0) + 1
            counts[f"gap_{first}"] = counts.get(f"gap_{first}", 0) + gap
            counts[f"ties_{first}"] = counts.get(f"ties_{first}", 0) + int(np.ptp(row[judged]) == 0)
            if gap > threshold:
                counts[f"kept_{first}"] = counts.get(f"kept_{first}", 0) + 1
                is_open[p] = source.keep == "every"
                chosen.append((p, winner, loser))
        dtype = getattr(torch, source.latents)
        for p, winner, loser in chosen:
            pair = [winner, loser]
            for transition in path:
                is_shared = source.window == 1
                kept.xt.append((transition.xt[p, :1] if is_shared else transition.xt[p, pair]).to("cpu", dtype))
                kept.x_prev.append(transition.x_prev[p, pair].to("cpu", dtype))
                kept.logp.append(transition.logp[p, pair].float().cpu())
                kept.times.append(self.grid[transition.index])
                kept.scores.append(torch.from_numpy(scores[p, pair]))
                kept.prompt.append(int(prompts[p]))
                kept.ids.append(randomness.address(int(ids[p]), transition.index))

    def _threshold(self, index: int) -> float:
        """LPO: linear in the step's noise; else constant."""
        source = self.source
        if source.threshold_noisiest is None:
            return source.threshold
        stds = self.stds[source.first_step : self.end]
        low, high = min(stds), max(stds)
        part = (self.stds[index] - low) / max(high - low, 1e-12)
        return source.threshold + (source.threshold_noisiest - source.threshold) * part

    def _std(self, t: float, s: float) -> Tensor:
        one = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        times = (torch.tensor([end], dtype=torch.float64) for end in (t, s))
        return self.policy.schedule.reverse_step(one, one, *times, self.eta)[1]

    def _going_on(self, scores: NDArray[np.float32], ids: Tensor, index: int) -> Int64[Tensor, " P"]:
        source = self.source
        if source.go_on == "first":
            return torch.zeros(len(ids), dtype=torch.int64)
        if source.go_on == "random":
            key = (self.setting.seed, "go on", index)
            return torch.tensor([randomness.address(*key, record) % source.candidates for record in ids.tolist()])
        sign = 1 if source.go_on == "winner" else -1
        values = sign * np.stack([source.judge.utility(group) for group in scores])
        return torch.from_numpy(np.where(np.isfinite(values), values, -np.inf).argmax(axis=1))

    def _tensors(self, kept: _Kept) -> dict[str, Tensor]:
        shape = self.policy.latent_shape(*self.policy.resolution)
        dtype, j = getattr(torch, self.source.latents), 1 if self.source.window == 1 else 2
        num_scores = len(self.source.judge.names)

        def stacked(values: list[Tensor], *axes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.stack(values) if values else torch.empty(0, *axes, dtype=dtype)

        return {
            "xt": stacked(kept.xt, j, *shape, dtype=dtype),
            "x_prev": stacked(kept.x_prev, 2, *shape, dtype=dtype),
            "logp_old": stacked(kept.logp, 2),
            "times": torch.tensor(kept.times, dtype=torch.float64).reshape(-1, 2),
            "scores": stacked(kept.scores, 2, num_scores),
            "prompt": torch.tensor(kept.prompt, dtype=torch.int64),
            "id": torch.tensor(kept.ids, dtype=torch.int64),
        }

    # Drawing

    def open(self, shards: Sequence[Shard], folder: Path) -> None:
        """Nothing to wait for: the previews are judged as they are made."""

    def units(self, shard: Shard) -> NDArray[np.int64]:
        """Rows (transition,)."""
        return np.arange(shard.num_rows("id"))[:, None]

    def collate(self, picks: Sequence[tuple[Shard, NDArray[np.int64]]], visits: Int64[Tensor, " B"]) -> StepBatch:
        """Steps of a winner and a loser each."""

        def column(name: str) -> Tensor:
            rows = [np.array(shard.rows(name, int(unit[0]), 1)) for shard, unit in picks]
            return torch.from_numpy(np.concatenate(rows))

        times, scores, num = column("times").float(), column("scores"), len(picks)
        scale = self.source.sampling.cfg_scale
        return StepBatch(
            ids=column("id"),
            visits=visits,
            xt=column("xt").float().unsqueeze(2),
            x_prev=column("x_prev").float().unsqueeze(2),
            t=times[:, :1],
            t_prev=times[:, 1:],
            eta=self.eta,
            weight=torch.ones(num, 2, 1),
            cond=self.cond.cond(column("prompt")),
            uncond=None if scale == 1 else self.cond.uncond(num),
            cfg_scale=scale,
            utility=torch.tensor([1.0, 0.0]).expand(num, 2),
            mask=torch.ones(num, 2, dtype=torch.bool),
            logp_old=column("logp_old"),
            scores={name: scores[:, :, j] for j, name in enumerate(self.source.judge.names)},
        )

    # Telling

    def summary(self, shards: Sequence[Shard], num_units: int) -> dict[str, float]:
        """Pairs, ties and kept shares, over all and by step; network rows per kept pair."""
        steps = range(self.source.first_step, len(self.grid), self.source.window)
        by_step = {i: [total(shards, f"{name}_{i}") for name in ("pools", "kept", "ties", "gap")] for i in steps}
        pools, kept, ties, gap = (sum(counts[i] for counts in by_step.values()) for i in range(4))
        rows = total(shards, "network_rows")
        told = {
            "pools": pools,
            "pairs": kept,
            "units": float(num_units),
            "kept": kept / max(pools, 1),
            "ties": ties / max(pools, 1),
            "probability_gap": gap / max(pools, 1),
            "previews": total(shards, "previews"),
            "unjudged": total(shards, "unjudged"),
            "network_rows": rows,
            "network_rows_per_pair": rows / max(kept, 1),
        }
        for i, (of_step, kept_there, ties_there, _) in by_step.items():
            if of_step:
                told[f"kept/t{self.grid[i][0]:.2f}"] = kept_there / of_step
                told[f"ties/t{self.grid[i][0]:.2f}"] = ties_there / of_step
        return told

    def keep(self, shards: Sequence[Shard], folder: Path) -> None:
        """Nothing for people: previews of noisy states make no data set."""

    def facts(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return prompt_facts(self.cond.prompts, self.source.judge)
