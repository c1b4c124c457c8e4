"""What source.name=rollout makes in a part of a round, and the batches of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor

from diffalign import randomness
from diffalign.data import PromptCond, Shard
from diffalign.sources import _round_pictures, _votes
from diffalign.sources._recorder import Recorder
from diffalign.sources._rounds import Place, total
from diffalign.sources._sampled import prompts_of_part
from diffalign.types import EndpointBatch, Setting, StepBatch

if TYPE_CHECKING:
    from diffalign.sources.rollout import Rollout

GROUP = -1  # in place of (winner, loser): all candidates of the prompt


class Rollouts:
    """A `Maker`: a part holds `sampling.batch_size` images, or one prompt's where these are more."""

    def __init__(self, source: Rollout, policy: Any, reference: Any, cond: PromptCond, setting: Setting) -> None:
        self.source, self.policy, self.reference, self.cond, self.setting = source, policy, reference, cond, setting
        self._votes: dict[str, NDArray[np.float64]] = {}  # of the round, where people judge
        self.prompts_per_part = max(1, source.sampling.batch_size // source.images_per_prompt)
        self.num_parts = math.ceil(source.prompts_per_round / self.prompts_per_part)
        self.recorder = Recorder(source, policy, reference, cond, setting)

    # Making

    def make(self, place: Place) -> tuple[Mapping[str, Tensor], Mapping[str, float]]:
        """Samples and judges the part's prompts.

        x [P K (R+1), C, h, w]: per image the x_t of the R recorded steps and what the last one gave; of finished images
        R is 0. logp_old [P K, R], times [R, 2] (t, s), scores [P K, J], prompt [P], id [P]; with record_reference
        pred_ref, with record_means mean_old [P K, R, C, h, w].
        """
        source = self.source
        per_round = source.prompts_per_round
        prompts, ids = prompts_of_part(place, self.cond, self.prompts_per_part, per_round, self.setting)
        num, k = len(prompts), source.images_per_prompt
        sampled = self.recorder.sample(prompts, ids)
        images = _round_pictures.decoded(self.policy, sampled["x"][:, -1].float())
        texts = [self.cond.prompts[p] for p in prompts.tolist() for _ in range(k)]
        unjudged = np.full((num * k, len(source.judge.names)), np.nan, np.float32)
        scores = unjudged if source.votes else source.judge.score(images, texts)
        if source.keep_images:
            _round_pictures.save(images, place.folder(self.setting), place.part)
        tensors = {
            **sampled,
            "x": sampled["x"].flatten(0, 1),
            "scores": torch.from_numpy(scores),
            "prompt": prompts,
            "id": ids,
        }
        steps = source.sampling.num_steps + (len(sampled["times"]) if source.record_reference else 0)
        rows = num * k * steps * (1 if source.sampling.cfg_scale == 1 else 2)
        counts = {"images": num * k, "network_rows": rows, "unjudged": int(np.isnan(scores).any(axis=1).sum())}
        return tensors, counts

    # Drawing

    def open(self, shards: Sequence[Shard], folder: Path) -> None:
        """Where people judge: writes the ballot and takes their votes.

        Raises:
            WaitsForVotes: they have not voted yet.
            UserError: votes that cannot be read.
        """
        if not self.source.votes:
            return
        k = self.source.images_per_prompt
        rows = []
        for part, shard in enumerate(shards):
            for p, text in enumerate(self._texts(shard)):
                files = [str(_round_pictures.picture(Path(), part, p * k + c)) for c in range(k)]
                rows.append((_votes.ballot_id(part, p), text, files))
        if self.setting.rank == 0:
            _votes.write_ballot(folder, rows)
        sizes = {name: k for name, _, _ in rows}
        self._votes = _votes.counted(folder, sizes, self.setting.rank == 0, self.setting.barrier)

    def units(self, shard: Shard) -> NDArray[np.int64]:
        """Rows (prompt of the part, winner, loser, step): -1 for all candidates, and for all steps."""
        source, k = self.source, self.source.images_per_prompt
        ids = np.array(shard.rows("id", 0, shard.num_rows("id")))
        steps = range(self.recorder.num_shared, shard.num_rows("times")) if source.record == "steps" else [-1]
        found = []
        for p, scores in enumerate(self._scores(shard)):
            chosen = self._accepted(int(ids[p]), scores)
            if source.compare == "groups":
                values = source.judge.utility(chosen)
                judged = values[np.isfinite(values)]
                compared = [(GROUP, GROUP)] if len(judged) > 1 and np.ptp(judged) > source.min_margin else []
            else:
                compared = source.judge.pairs(chosen, source.pairs, source.min_margin)
            for winner, loser in compared:
                used = steps
                if source.record == "steps" and source.steps_used is not None:
                    wanted = source.steps_used
                    used = _subset(steps, wanted, self.setting.seed, int(ids[p]), winner * k + loser)
                found += [(p, winner, loser, step) for step in used]
        return np.array(found, dtype=np.int64).reshape(-1, 4)

    def _scores(self, shard: Shard) -> Float[NDArray[np.float32], "P K J"]:
        k = self.source.images_per_prompt
        if self.source.votes:
            part = int(shard.path.stem.rpartition("-")[2])
            names = [_votes.ballot_id(part, p) for p in range(shard.num_rows("id"))]
            rows = np.array([self._votes.get(name, np.full(k, np.nan)) for name in names], dtype=np.float32)
        else:
            rows = np.array(shard.rows("scores", 0, shard.num_rows("scores")))
        return rows.reshape(-1, k, len(self.source.judge.names))

    def _accepted(self, prompt_id: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores with those of rejected candidates taken away (NaN).

        Statistical rejection sampling (arXiv 2309.06657): what is accepted is distributed as the sampled model times
        exp(score / reject), up to the best score being an estimate from the candidates.
        """
        if self.source.reject is None:
            return scores
        utility = self.source.judge.utility(scores)
        if np.isnan(utility).all():
            return scores
        u = randomness.uniform(
            self.setting.seed, "reject", torch.full((len(utility),), prompt_id), torch.arange(len(utility))
        ).numpy()
        is_accepted = u < np.exp((utility - np.nanmax(utility)) / self.source.reject)
        return np.where(is_accepted[:, None], scores, np.nan)

    def collate(self, picks: Sequence[tuple[Shard, NDArray[np.int64]]], visits: Int64[Tensor, " B"]) -> Any:
        """Records of the drawn units."""
        rows = [self._row(shard, *unit.tolist()) for shard, unit in picks]
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "scores"}
        scores = {
            name: torch.stack([row["scores"][:, j] for row in rows]) for j, name in enumerate(self.source.judge.names)
        }
        cond = self.cond.cond(joined["prompt"])
        shared = {"ids": joined["ids"], "visits": visits, "utility": joined["utility"], "mask": joined["mask"]}
        if self.source.record == "images":
            k = joined["x"].shape[1]
            spread = {name: x[:, None].expand(-1, k, *x.shape[1:]) for name, x in cond.items()}
            return EndpointBatch(**shared, x0=joined["x"][:, :, -1], cond=spread, scores=scores)
        scale = self.source.sampling.cfg_scale
        return StepBatch(
            **shared,
            xt=joined["xt"],
            x_prev=joined["x_prev"],
            t=joined["times"][..., 0],
            t_prev=joined["times"][..., 1],
            eta=self.recorder.eta,
            weight=joined["weight"],
            cond=cond,
            uncond=None if scale == 1 else self.cond.uncond(len(rows)),
            cfg_scale=scale,
            pred_ref=joined.get("pred_ref"),
            mean_old=joined.get("mean_old"),
            logp_old=(joined["weight"] * joined["logp_old"]).sum(dim=2),
            scores=scores,
        )

    def _row(self, shard: Shard, p: int, winner: int, loser: int, step: int) -> dict[str, Tensor]:
        source, k = self.source, self.source.images_per_prompt
        candidates = list(range(k)) if winner == GROUP else [winner, loser]
        scores = self._accepted(int(shard.rows("id", p, 1)[0]), self._scores(shard)[p])[candidates]
        per_image = shard.num_rows("x") // shard.num_rows("scores")
        prompt_id = int(shard.rows("id", p, 1)[0])
        mask = torch.from_numpy(np.isfinite(scores).all(axis=1))
        row = {
            "ids": torch.tensor(randomness.address(prompt_id, winner, loser, step)),
            "prompt": torch.tensor(int(shard.rows("prompt", p, 1)[0])),
            "scores": torch.from_numpy(np.nan_to_num(scores)),  # as the utility: what is NaN is masked
            "mask": mask,
            "utility": self._utility(shard, p, winner, loser),
        }
        if source.record == "images":
            x = [shard.rows("x", (p * k + c) * per_image + per_image - 1, 1) for c in candidates]
            return row | {"x": torch.from_numpy(np.stack(x)).float()}
        num = shard.num_rows("times")
        used = [step] if step >= 0 else list(range(num))
        weight = 1.0
        if step < 0 and source.steps_used is not None:
            used = _subset(range(num), source.steps_used, self.setting.seed, prompt_id, winner * k + loser)
            weight = num / len(used)
        times = np.array(shard.rows("times", 0, num))[used]
        places = np.array(used)
        paths = np.stack([np.array(shard.rows("x", (p * k + c) * per_image, num + 1)) for c in candidates])
        x_t, x_prev = (torch.from_numpy(paths[:, places + after]).float() for after in (0, 1))
        old = np.stack([np.array(shard.rows("logp_old", p * k + c, 1))[0, used] for c in candidates])
        weights = torch.full(old.shape, weight)
        if source.step_weight == "cosine":
            weights = _cosine_weights(x_prev, int(row["utility"].masked_fill(~mask, -torch.inf).argmax()))
        for name, is_recorded in (("pred_ref", source.record_reference), ("mean_old", source.record_means)):
            if is_recorded:
                recorded = np.stack([np.array(shard.rows(name, p * k + c, 1))[0, used] for c in candidates])
                row[name] = torch.from_numpy(recorded)
        return row | {
            "xt": x_t,
            "x_prev": x_prev,
            "times": torch.from_numpy(times).float(),
            "weight": weights,
            "logp_old": torch.from_numpy(old),
        }

    def _utility(self, shard: Shard, p: int, winner: int, loser: int) -> Float[Tensor, " K"]:
        source = self.source
        if winner != GROUP and source.utility == "won":
            return torch.tensor([1.0, 0.0])
        value = source.judge.utility(self._scores(shard)[p])
        if source.utility == "win-rate" and source.judge.prefer != "pairwise":  # whose utility is the win rate
            value = _win_rates(value, source.temperature)
        chosen = value if winner == GROUP else value[[winner, loser]]
        return torch.from_numpy(np.nan_to_num(chosen)).float()  # what is NaN is masked

    # Telling

    def summary(self, shards: Sequence[Shard], num_units: int) -> dict[str, float]:
        """What a round came to: its size, how much of it can be learned from, and the judge's mean scores."""
        flat = np.concatenate([self._scores(shard).reshape(-1, len(self.source.judge.names)) for shard in shards])
        per_prompt = np.concatenate([np.isin(range(len(self._scores(s))), self.units(s)[:, 0]) for s in shards])
        told = {
            "images": total(shards, "images"),
            "network_rows": total(shards, "network_rows"),
            "unjudged": total(shards, "unjudged"),
            "units": float(num_units),
            "kept_prompts": float(per_prompt.mean()),
        }
        if self.source.judge.prefer == "pairwise":  # an embedding's mean says nothing
            return told
        return told | {name: float(np.nanmean(flat[:, j])) for j, name in enumerate(self.source.judge.names)}

    def keep(self, shards: Sequence[Shard], folder: Path) -> None:
        """The round's pictures as preference records, for `source.data.path` of any later run."""
        if self.source.keep_images:
            groups = ((self._texts(shard), self._scores(shard)) for shard in shards)
            _round_pictures.write_records(groups, folder, self.source.judge)

    def _texts(self, shard: Shard) -> list[str]:
        return [self.cond.prompts[int(place)] for place in shard.rows("prompt", 0, shard.num_rows("prompt"))]

    def facts(self) -> Mapping[str, Any]:
        """What run.json says about the data."""
        return _round_pictures.prompt_facts(self.cond.prompts, self.source.judge)


def _subset(steps: Sequence[int], wanted: int, *key: int) -> list[int]:
    """`wanted` of the steps, in order, by an address."""
    num = len(steps)
    return sorted(steps[randomness.permute(i, num, "steps", *key)] for i in range(min(wanted, num)))


def _win_rates(utility: NDArray[np.float64], temperature: float | None) -> NDArray[np.float64]:
    """The mean probability to beat the others: sigmoid(gap / temperature), or 1, 1/2, 0 without one."""
    gap = utility[:, None] - utility[None]
    wins = 0.5 * (np.sign(gap) + 1) if temperature is None else expit(gap / temperature)
    np.fill_diagonal(wins, 0)
    others = np.isfinite(utility).sum() - 1
    return np.where(np.isfinite(utility), np.nansum(wins, axis=1) / max(others, 1), np.nan)


def _cosine_weights(x_prev: Float[Tensor, "K S C h w"], best: int) -> Float[Tensor, "K S"]:
    """TreePO: 1 + cos(h_t^i, h_t^best) over its sum, so that the weighted log-ratios are a mean over steps."""
    flat = x_prev.flatten(2)
    weight = 1 + torch.cosine_similarity(flat, flat[best : best + 1], dim=2)
    return weight / weight.sum(dim=1, keepdim=True)
