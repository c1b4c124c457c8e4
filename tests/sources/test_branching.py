"""Branching samplers: which steps make pools, which pairs are kept, where it goes on, what the batches hold."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from diffalign.data import Shard, write_shard
from diffalign.registry import build
from diffalign.schedule import RectifiedFlow, schedule_from_config
from diffalign.sources import _chain
from diffalign.sources._judge import Judge
from diffalign.sources._pools import Pools
from diffalign.sources._rounds import Place, Rounds
from diffalign.types import ScorerInfo, Setting, StepBatch, UserError

PROMPTS = ("a red thing", "a blue thing", "two things")
NAN = float("nan")
MSPO = [[751, 701, 651, 601], [551, 501, 451, 401], [351, 301, 251, 201], [151, 101, 51, 1]]
E5 = [[21.0, 21.5, 20.7, 21.2], [20.10, 20.00, 20.30, 20.25], [22.00, 22.40, 22.90, 22.10]]  # three prompts
E5_GAPS = [0.3799489623, 0.1488850336, 0.4218990053]


def schedule(**more: Any) -> Any:
    """Stable Diffusion's, with the released sampler's leading steps that end at timestep 0."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    return schedule_from_config({"_class_name": "DDIMScheduler", **betas, "steps_offset": 1, **more})


class Policy:
    """A network of one line that remembers what it was asked; its decoder shows three latent channels."""

    users = None
    resolution = (8, 8)
    device = torch.device("cpu")
    vae_factor = 2

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.asked: list[tuple[float, torch.Tensor]] = []  # (time, x_t) of every call
        self.decoded: list[torch.Tensor] = []

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // 2, width // 2

    def __call__(self, xt: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        assert len(set(t.tolist())) == 1 and len(xt) == len(t) == len(cond["place"])
        self.asked.append((float(t[0]), xt.clone()))
        return 0.8 * xt + 0.1 * cond["place"][:, :, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        self.decoded.append(latents.clone())
        return (latents / 8 + 0.5).clamp(0, 1)


class Cond:
    """Conditioning that says which prompt it is of."""

    def __init__(self, prompts: tuple[str, ...] = PROMPTS) -> None:
        self.prompts = prompts

    def cond(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"place": places.float()[:, None]}

    def uncond(self, num: int) -> dict[str, torch.Tensor]:
        return {"place": torch.full((num, 1), -1.0)}


@dataclass(frozen=True)
class Bright:
    """The mean of a picture times `sign`; 0 for prompts that say so."""

    sign: float = 1.0
    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image", "prompt"), "of 255", (0.0, 255.0))

    def score(self, images: list[Any], prompts: list[str]) -> list[float]:
        assert not torch.is_autocast_enabled("cpu")
        means = [float(np.asarray(image, dtype=np.float64).mean()) for image in images]
        return [0.0 if "nothing" in prompt else self.sign * mean for mean, prompt in zip(means, prompts, strict=True)]


@dataclass(frozen=True)
class StepBright(Bright):
    """Told the timestep, which it remembers."""

    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image", "prompt", "timestep"), "of 1", (0.0, 1.0))
    told: ClassVar[list[float]] = []

    def score_tensor(self, pixels: torch.Tensor, prompts: list[str], timestep: torch.Tensor) -> torch.Tensor:
        assert len(set(timestep.tolist())) == 1 and len(timestep) == len(pixels) == len(prompts)
        StepBright.told.append(float(timestep[0]))
        return 100 * pixels.flatten(1).mean(dim=1)


BRIGHT = {"name": "test_branching:Bright", "as": "bright"}
STEP_BRIGHT = {"name": "test_branching:StepBright", "as": "bright"}


class Given(Judge):
    """Scores [step, prompt, candidate] as a test gives them; keeps the pixels and texts it was shown."""

    def __init__(self, scores: Any) -> None:
        super().__init__([BRIGHT], (), "sum", None)
        self.given = iter(np.asarray(scores, dtype=np.float32))
        self.texts: list[list[str]] = []

    def score_pixels(self, pixels: torch.Tensor, prompts: Any, timestep: float) -> Any:
        self.texts.append(list(prompts))
        return next(self.given).reshape(-1, 1)


def settings(folder: Path, **more: Any) -> Setting:
    return Setting(seed=3, steps=8, batch_size=4, folder=folder, **more)


def sourced(folder: Path, prompts: tuple[str, ...] = PROMPTS, **fields: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    sampling = {"num_steps": 4, "cfg_scale": 3.0, "batch_size": 16} | fields.pop("sampling", {})
    values = {"prompts": str(folder / "prompts.txt"), "scorers": [BRIGHT], "latents": "float32", "first_step": 1}
    values |= {"prompts_per_round": 3, "steps_per_round": 2, "sampling": sampling, "threshold": 0.0}
    return build("source", {"name": "branching", **values, **fields})


def pools(folder: Path, scores: Any = None, policy: Any = None, setting: Setting | None = None, **fields: Any) -> Pools:
    source = sourced(folder, **fields)
    if scores is not None:
        source.__dict__["judge"] = Given(scores)
    prompts = fields.get("prompts", PROMPTS)
    policy = policy or Policy(schedule(set_alpha_to_one=False))
    cond: Any = Cond(prompts)
    return Pools(source, policy, cond, setting or settings(folder))


def made(maker: Pools, part: int = 0, round: int = 0) -> Shard:
    path = Path(maker.setting.folder) / f"part-{part}-{round}.safetensors"
    tensors, counts = maker.make(Place(round, 0, part))
    write_shard(path, tensors, {name: float(value) for name, value in counts.items()})
    return Shard(path)


def column(shard: Shard, name: str) -> np.ndarray:
    return np.array(shard.rows(name, 0, shard.num_rows(name)))


def everything(maker: Pools, shard: Shard) -> StepBatch:
    units = maker.units(shard)
    return maker.collate([(shard, unit) for unit in units], torch.zeros(len(units), dtype=torch.int64))


def timesteps(times: Any) -> list[int]:
    return [round(1000 * t) - 1 for t in np.asarray(times).tolist()]


# Which steps make pools, and when they are judged


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(StepBright, "told", [])
    return StepBright.told


TWENTY = {"sampling": {"num_steps": 20, "batch_size": 6}, "first_step": 4, "scorers": [STEP_BRIGHT]}


def test_windows_of_the_sdxl_code(told, tmp_path):
    maker = pools(tmp_path, **TWENTY, candidates=2, window=4)
    shard = made(maker)
    assert told == [551, 351, 151, 0]
    times = column(shard, "times")
    prompt = column(shard, "prompt")
    for place in range(3):
        mine = times[prompt == place]
        assert timesteps(mine[:, 0]) == sum(MSPO, []) and np.array_equal(mine[1:, 0], mine[:-1, 1])
        assert timesteps(mine[-1:, 1]) == [0]
    asked = timesteps([t for t, _ in maker.policy.asked])
    assert asked == [951, 901, 851, 801, *sum(MSPO, [])]  # every step once
    # the last window is judged on what it sampled, the others on the clean picture that their end implies
    assert [len(x) for x in maker.policy.decoded] == [6] * 4
    last = torch.from_numpy(column(shard, "x_prev"))[torch.from_numpy(times[:, 1] == times[:, 1].min())]
    final = {x.numpy().tobytes() for x in maker.policy.decoded[-1]}
    assert {x.numpy().tobytes() for x in last.flatten(0, 1)} == final
    xt = maker.policy.asked[8][1][6:]  # at 551, the guided half
    clean = maker.policy.decoded[0]
    level = torch.full((6,), 0.552)
    place = torch.from_numpy(prompt[::16]).float().repeat_interleave(2)  # prompts are in order of the part
    pred = 0.8 * xt + 0.1 * (-1 + 3 * (place[:, None, None, None] + 1))
    torch.testing.assert_close(clean, maker.policy.schedule.to_x0(pred, xt, level), rtol=1e-4, atol=1e-4)


def test_every_step_of_the_sd15_code(told, tmp_path):
    maker = pools(tmp_path, **TWENTY, candidates=2)
    shard = made(maker)
    assert told == [*sum(MSPO, [])[1:], 0]
    assert timesteps(column(shard, "times")[:16, 0]) and set(timesteps(column(shard, "times")[:, 0])) == set(
        sum(MSPO, [])
    )
    stds = maker.stds
    wanted = {0: 0.644391014012, 4: 0.557616496156, 9: 0.429321149322, 18: 0.040596731902, 19: 0.020648320165}
    assert {i: stds[i] for i in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("window", [1, 3, 4])
def test_a_sampler_that_ends_clean_has_no_pool_at_its_end(window, told, tmp_path):
    maker = pools(tmp_path, policy=Policy(schedule()), **TWENTY, candidates=2, window=window)
    shard = made(maker)
    starts = list(range(4, 19, window))
    ends = [min(start + window, 19) for start in starts]
    assert told == [951 - 50 * end for end in ends] and 1 not in timesteps(column(shard, "times")[:, 0])
    for name in ("xt", "x_prev", "logp_old", "scores"):
        assert np.isfinite(column(shard, name)).all()
    summary = maker.summary([shard], len(maker.units(shard)))
    assert summary["pools"] == 3 * len(starts) and summary["units"] == 3 * 15
    assert shard.info["network_rows"] == 2 * 3 * (5 + 15 * 2)


def test_flow_adds_noise_to_its_last_step_too(told, tmp_path):
    fields = {"scorers": [STEP_BRIGHT], "first_step": 0}
    maker = pools(tmp_path, policy=Policy(RectifiedFlow(shift=3.0)), **fields)
    shard = made(maker)
    assert maker.eta == 0.7 and told[-1] == 0 and len(told) == 4
    assert told[:3] == pytest.approx([1000 * t for t, _ in maker.grid[1:]], rel=1e-5)
    assert len(maker.units(shard)) == 3 * 4 and np.isfinite(column(shard, "logp_old")).all()


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
@pytest.mark.parametrize("candidates,window,first_step", [(4, 1, 1), (2, 2, 0), (3, 2, 3)])
def test_network_rows(candidates, window, first_step, cfg_scale, tmp_path):
    """A call for each step, first_step + 1 rows of a prompt before the first verdict and k at every later step."""
    sampling = {"num_steps": 6, "cfg_scale": cfg_scale}
    maker = pools(tmp_path, candidates=candidates, window=window, first_step=first_step, sampling=sampling)
    shard = made(maker)
    num = min(3, 16 // candidates)
    branches = 1 if cfg_scale == 1 else 2
    wanted = num * (first_step + 1 + (6 - first_step - 1) * candidates) * branches
    rows = [len(xt) for _, xt in maker.policy.asked]
    assert len(rows) == 6 and sum(rows) == wanted == shard.info["network_rows"]
    assert (everything(maker, shard).uncond is None) == (cfg_scale == 1)
    assert shard.info["previews"] == num * candidates * math.ceil((6 - first_step) / window)
    assert maker.source.sampling_rows(1) == wanted / num * maker.source.prompts_per_round / maker.source.steps_per_round


@pytest.mark.parametrize("window,last_step", [(1, None), (2, None), (1, 3), (2, 3)])
@pytest.mark.parametrize("preview_steps", [2, 3, 10])
def test_network_rows_of_longer_previews(preview_steps, window, last_step, tmp_path):
    """Each further step of a preview is a row of its candidate, while the sampler has steps left."""
    fields = {"sampling": {"num_steps": 6, "cfg_scale": 1.0}, "candidates": 2, "window": window, "last_step": last_step}
    found = []
    for steps in (1, preview_steps):
        maker = pools(tmp_path / str(steps), preview_steps=steps, **fields)
        rows = made(maker).info["network_rows"] / 3
        assert maker.source.sampling_rows(1) == rows * 3 / maker.source.steps_per_round
        found.append(rows)
    stop = 6 if last_step is None else last_step + 1
    ends = [min(start + window, stop) for start in range(1, stop, window)]
    assert found[1] - found[0] == 2 * sum(min(preview_steps, 6 - end) - 1 for end in ends if end < 6)


@pytest.mark.parametrize("kind", ["flow", "ddim"])
@pytest.mark.parametrize("steps,stops", [(1, [2]), (2, [2, 4]), (3, [2, 3, 4]), (9, [2, 3, 4, 5])])
def test_previews_are_steps_of_the_ode(steps, stops, kind, tmp_path):
    """From x_prev of step 1 over the sampler's own levels, and the last step's clean prediction."""
    policy = Policy(RectifiedFlow(shift=3.0) if kind == "flow" else schedule())
    sampling = {"num_steps": 6, "cfg_scale": 1.0}
    maker = pools(tmp_path, policy=policy, sampling=sampling, candidates=2, last_step=1, preview_steps=steps)
    batch = everything(maker, made(maker))
    places = batch.cond["place"].repeat_interleave(2, dim=0)
    x = batch.x_prev[:, :, 0].flatten(0, 1)
    for stop, following in zip(stops, [*stops[1:], None], strict=True):
        t = torch.full((len(x),), maker.grid[stop][0])
        pred = policy(x, t, {"place": places})
        if following is None:
            x = policy.schedule.to_x0(pred, x, t)
        else:
            x, std = policy.schedule.reverse_step(pred, x, t, torch.full((len(x),), maker.grid[following][0]), 0.0)
            assert not std.any()
    (decoded,) = policy.decoded
    gaps = torch.cdist(decoded.flatten(1).double(), x.flatten(1).double())  # the batch has winners first
    assert len(decoded) == len(x) == 6 and gaps.min(dim=0).values.max() < 1e-4 and gaps.min(dim=1).values.max() < 1e-4


def test_nothing_is_sampled_after_the_last_step_that_branches(tmp_path):
    fields = {"candidates": 2, "first_step": 1, "sampling": {"num_steps": 6}}
    maker, whole = pools(tmp_path, last_step=2, **fields), pools(tmp_path, **fields)
    shard = made(maker)
    num = shard.info["pools_1"]
    assert [name for name in shard.info if name.startswith("pools_")] == ["pools_1", "pools_2"]
    assert shard.info["network_rows"] == num * (2 + 2 * 2) * (1 if maker.source.sampling.cfg_scale == 1 else 2)
    rows = maker.source.sampling_rows(1) * maker.source.steps_per_round / maker.source.prompts_per_round
    assert rows == shard.info["network_rows"] / num
    early, all_of_them = (everything(m, s) for m, s in ((maker, shard), (whole, made(whole))))
    assert torch.equal(early.xt[:2], all_of_them.xt[:2])  # the steps that do branch are as they were


# Which pairs are kept


def one_pool(folder: Path, scores: Any, **fields: Any) -> tuple[Pools, list[Shard]]:
    """A part per prompt with one pool each, at the last step."""
    k = len(scores[0])
    fields = {"candidates": k, "first_step": 3, "prompts_per_round": len(scores), **fields}
    maker = pools(folder, [[row] for row in scores], sampling={"batch_size": k}, **fields)
    assert maker.num_parts == len(scores)
    return maker, [made(maker, part) for part in range(len(scores))]


@pytest.mark.parametrize("threshold,kept", [(0.0, [1, 1, 1]), (0.3, [1, 0, 1]), (0.4, [0, 0, 1]), (0.5, [0, 0, 0])])
def test_the_published_selection(threshold, kept, tmp_path):
    maker, shards = one_pool(tmp_path, E5, threshold=threshold)
    assert [shard.info["gap_3"] for shard in shards] == pytest.approx(E5_GAPS, rel=1e-5)
    assert [shard.num_rows("id") for shard in shards] == kept
    for shard, pictures, winner, loser, is_kept in zip(
        shards, maker.policy.decoded, [1, 2, 2], [2, 1, 0], kept, strict=True
    ):
        assert shard.info.get("kept_3", 0) == is_kept and shard.info["pools_3"] == 1
        if is_kept:
            assert torch.equal(torch.from_numpy(column(shard, "x_prev"))[0], pictures[[winner, loser]])
    if sum(kept):
        batch = everything(maker, shards[2])
        assert batch.scores["bright"].tolist() == [[pytest.approx(22.9), 22.0]]
        assert batch.utility.tolist() == [[1, 0]] and batch.mask.all()


def test_the_threshold_is_strict_and_of_the_temperature(tmp_path):
    gap = math.tanh(0.25)
    for number, (threshold, temperature, kept) in enumerate(
        [(gap, 1.0, 0), (math.nextafter(gap, 0), 1.0, 1), (0.0999, 2.5, 0), (0.0996, 2.5, 1)]
    ):
        _, shards = one_pool(tmp_path / str(number), [[1.5, 1.0]], threshold=threshold, temperature=temperature)
        assert shards[0].num_rows("id") == kept
        assert shards[0].info["gap_3"] == pytest.approx(math.tanh(0.25 / temperature))


@pytest.mark.filterwarnings("error")
def test_what_nobody_judged_makes_no_pair_and_ties_are_counted(tmp_path):
    scores = [[NAN, 2, NAN, 1], [-5, NAN, -1, NAN], [NAN, NAN, 3, NAN], [NAN] * 4, [7, 7, 7, 7], [2, NAN, 2, 1]]
    maker, shards = one_pool(tmp_path, scores)
    assert [shard.num_rows("id") for shard in shards] == [1, 1, 0, 0, 0, 1]
    assert [column(shard, "scores")[0, :, 0].tolist() for shard in shards if shard.num_rows("id")] == [
        [2, 1],
        [-1, -5],
        [2, 1],
    ]
    told = maker.summary(shards, 3)
    assert (told["pools"], told["pairs"], told["ties"], told["kept"]) == (4, 3, 0.25, 0.75)
    assert told["unjudged"] == 2 + 2 + 3 + 4 + 1


def test_a_weighted_sum_of_scorers(tmp_path):
    scorers = [BRIGHT, BRIGHT | {"as": "dark", "sign": -1.0}]
    maker = pools(tmp_path, scorers=scorers, weights=[0.25, 1.0], temperature=100.0)
    batch = everything(maker, made(maker))
    assert set(batch.scores) == {"bright", "dark"} and len(batch) > 3
    assert (batch.scores["bright"][:, 0] < batch.scores["bright"][:, 1]).all()
    assert torch.equal(batch.scores["bright"], -batch.scores["dark"])


def test_texts_are_the_prompts_own(tmp_path):
    maker = pools(tmp_path, np.arange(3 * 3 * 4).reshape(3, 3, 4))
    shard = made(maker)
    order = [PROMPTS[place] for place in column(shard, "prompt")[:3]]
    assert sorted(order) == sorted(PROMPTS)
    assert maker.source.judge.texts == [[prompt for prompt in order for _ in range(4)]] * 3
    assert everything(maker, shard).cond["place"].flatten().tolist() == column(shard, "prompt").tolist()


def test_a_threshold_that_follows_the_noise(tmp_path):
    for number, is_final_clean in enumerate((False, True)):
        policy = Policy(schedule(set_alpha_to_one=is_final_clean))
        fields = {"threshold": 0.1, "threshold_noisiest": 0.5, "policy": policy}
        maker = pools(tmp_path / str(number), **TWENTY | fields)
        last = 18 if is_final_clean else 19
        stds = np.array(maker.stds[4 : last + 1])
        found = [maker._threshold(index) for index in range(4, last + 1)]
        assert found[0] == pytest.approx(0.5) and found[-1] == pytest.approx(0.1)
        assert found == pytest.approx((0.1 + 0.4 * (stds - stds[-1]) / (stds[0] - stds[-1])).tolist())
        assert pools(tmp_path / str(number), **TWENTY)._threshold(7) == 0


def test_threshold_of_the_step(tmp_path):
    """The same scores pass at the end and not at the beginning."""
    fields = {"threshold": 0.1, "threshold_noisiest": 0.6}
    maker = pools(tmp_path, np.tile([[1.0, 2.0, 1.5, 1.2]], (3, 3, 1)), **fields)
    shard = made(maker)
    assert [shard.info.get(f"kept_{i}", 0) for i in (1, 2, 3)] == [0, 3, 3]
    assert maker._threshold(1) == pytest.approx(0.6) and maker._threshold(2) < math.tanh(0.5)


# From where sampling goes on


@pytest.fixture
def entered(monkeypatch):
    """(first step, x_t of the chain) as every window is entered, and the candidates' states that it gave."""
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    original = _chain.Chain.branch

    def branch(self: Any, steps: Any, pred: Any) -> Any:
        path = original(self, steps, pred)
        seen.append((steps[0], self.xt.clone(), path[-1].x_prev.clone()))
        return path

    monkeypatch.setattr(_chain.Chain, "branch", branch)
    return seen


def chosen(seen: list[Any]) -> list[list[int]]:
    """Which candidate every prompt went on from, by window."""
    found = []
    for (_, _, candidates), (_, xt, _) in zip(seen, seen[1:], strict=False):
        same = (candidates == xt[:, None]).flatten(2).all(dim=2)
        assert (same.sum(dim=1) == 1).all()
        found.append(same.int().argmax(dim=1).tolist())
    return found


SCORES = [[[3, 1, 2, 4], [9, 8, 7, 6], [1, 1, 5, 0]], [[1, 2, 3, 0], [4, 5, 6, 9], [0, 0, 0, 0]], [[1, 2, 3, 4]] * 3]


@pytest.mark.parametrize(
    "go_on,wanted",
    [("winner", [[3, 0, 2], [2, 3, 0]]), ("loser", [[1, 3, 3], [3, 0, 0]]), ("first", [[0] * 3] * 2)],
)
def test_where_it_goes_on(go_on, wanted, entered, tmp_path):
    made(pools(tmp_path, SCORES, go_on=go_on))
    assert chosen(entered) == wanted


@pytest.mark.parametrize("go_on,wanted", [("winner", [[3, 1, 0], [2, 0, 0]]), ("loser", [[2, 2, 0], [0, 1, 0]])])
@pytest.mark.filterwarnings("error")
def test_it_never_goes_on_from_what_nobody_judged(go_on, wanted, entered, tmp_path):
    """Of scores below 0 the unjudged one is no best, of scores above 0 no worst."""
    first = [[-3, NAN, -4, -1], [5, 6, 4, NAN], [NAN] * 4]
    made(pools(tmp_path, [first, [[NAN, 1, NAN, NAN], [2, NAN, NAN, NAN], [NAN] * 4], SCORES[2]], go_on=go_on))
    found = chosen(entered)
    assert found[0] == wanted[0] and found[1] == [1, 0, 0]


def test_random_continuation_depends_on_nothing_else(entered, tmp_path):
    """Neither on the scores nor on whether the pair was kept; the trajectories are the same."""
    states = []
    for number, (scores, threshold) in enumerate([(SCORES, 0.0), (-np.array(SCORES, float), 0.0), (SCORES, 0.999999)]):
        shard = made(pools(tmp_path / str(number), scores, threshold=threshold))
        states.append([xt for _, xt, _ in entered])
        chosen(entered)
        entered.clear()
        assert shard.num_rows("id") == (8 if number < 2 else 0)
    for other in states[1:]:
        assert all(torch.equal(one, two) for one, two in zip(states[0], other, strict=True))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_random_continuation_is_uniform(k, tmp_path):
    maker = pools(tmp_path, candidates=k)
    num, ids = 3000, torch.arange(3000)
    scores = np.random.default_rng(0).normal(size=(num, k, 1)).astype(np.float32)
    found = {index: maker._going_on(scores, ids, index).numpy() for index in (1, 2)}
    best = scores[:, :, 0].argmax(axis=1)
    error = 4 * math.sqrt((1 / k) * (1 - 1 / k) / num)
    for index in (1, 2):
        counts = Counter(found[index].tolist())
        assert set(counts) == set(range(k)) and all(abs(count / num - 1 / k) < error for count in counts.values())
        assert abs((found[index] == best).mean() - 1 / k) < error  # of the verdict
    assert abs((found[1] == found[2]).mean() - 1 / k) < error  # of the other steps
    assert np.array_equal(found[1], maker._going_on(-scores, ids, 1))


# Step-DPO


FIRST_BAD = {"keep": "first-bad", "go_on": "first", "threshold": 0.3}


def test_the_first_bad_step_of_a_trajectory(entered, tmp_path):
    """Prompt 0 is good, then bad twice; prompt 1 is never beaten by enough; prompt 2 is bad at once."""
    scores = [
        [[5, 1, 2], [3, 3.5, 2], [1, 2, 4]],
        [[1, 3, 2], [0.0, 0.1, 0.2], [4, 1, 1]],
        [[0, 9, 1], [2, 2.1, 2.2], [3, 3, 3]],
    ]
    maker = pools(tmp_path, scores, candidates=3, sampling={"batch_size": 9}, **FIRST_BAD)
    shard = made(maker)
    assert shard.num_rows("id") == 2
    first, second = column(shard, "scores")[:, :, 0].tolist()
    assert (first, second) == ([4, 1], [3, 1])  # the trajectory's own score is the loser's
    assert timesteps(column(shard, "times")[:, 0]) == timesteps([maker.grid[1][0], maker.grid[2][0]])
    states = [candidates for _, _, candidates in entered]
    x_prev = torch.from_numpy(column(shard, "x_prev"))
    assert torch.equal(x_prev[0], states[0][2, [2, 0]]) and torch.equal(x_prev[1], states[1][0, [1, 0]])
    assert chosen(entered) == [[0, 0, 0]] * 2
    told = maker.summary([shard], 2)
    # of prompt 0 two pools, of prompt 1 three, of prompt 2 one; that the trajectory is the best is no tie
    assert (told["pools"], told["pairs"], told["ties"]) == (6, 2, 0)


def test_nobody_samples_on_when_every_prompt_has_its_pair(tmp_path):
    maker = pools(tmp_path, [[[1, 5], [2, 5], [0, 5]]], candidates=2, sampling={"batch_size": 6}, **FIRST_BAD)
    shard = made(maker)
    assert shard.num_rows("id") == 3 and len(maker.policy.asked) == 3 and shard.info["network_rows"] == 2 * 3 * (2 + 2)


def test_a_step_is_bad_below_a_score(tmp_path):
    scores = [[[4.0, 9], [1, 9], [2, 2]], [[3.0, 9], [0, 9], [NAN, 1]], [[1.0, 2], [-1, 9], [1.9, 8]]]
    options = {"candidates": 2, "sampling": {"batch_size": 6}, "bad_below": 3.0}
    shard = made(pools(tmp_path, scores, **FIRST_BAD, **options))
    assert column(shard, "scores")[:, :, 0].tolist() == [[9, 1], [2, 1], [8, pytest.approx(1.9)]]
    assert len(set(column(shard, "prompt").tolist())) == 3


# What the batches hold, on real networks


@pytest.fixture(scope="module")
def models(tiny_folders):
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            torch.manual_seed(0)
            model = build("model", {"name": family, "path": str(tiny_folders[family])}).load()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.trainable_parameters().values():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            loaded[family] = model
        return loaded[family]

    return get


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("latents", ["float16", "float32"])
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_old_log_densities_are_the_likelihoods(family, window, latents, models, cache, tmp_path):
    model = models(family)
    fields = {"window": window, "latents": latents, "candidates": 2, "cache_dir": str(cache)}
    source = sourced(tmp_path, **fields)
    reference = build("reference", {"name": "adapter_off"}).bind(model)
    maker = source.prepare(model, reference, settings(tmp_path)).maker
    calls: list[int] = []
    hook = model.network.register_forward_hook(lambda module, args, out: calls.append(len(out[0])))
    shard = made(maker)
    hook.remove()
    assert len(calls) == 4 and sum(calls) == shard.info["network_rows"] == 2 * 3 * (2 + 2 * 2)
    batch = everything(maker, shard)
    is_flow = family == "sd3"
    assert 6 <= len(batch) <= (9 if is_flow or window == 2 else 6) and len(set(batch.ids.tolist())) == len(batch)
    assert batch.xt.shape[1:3] == ((1, 1) if window == 1 else (2, 1)) and batch.x_prev.shape[1:3] == (2, 1)
    rounded = getattr(torch, latents)
    for states in (batch.xt, batch.x_prev):
        assert states.dtype == torch.float32 and torch.equal(states, states.to(rounded).float())
    with torch.no_grad():
        found = build("likelihood", {"name": "step"})(model, reference, batch)
    torch.testing.assert_close(found.logp, batch.logp_old, rtol=1e-5, atol=1e-5)
    assert (found.logp_ref - found.logp).abs().max() > 1e-3 and batch.logp_old.abs().max() > 0.1
    assert not torch.equal(batch.x_prev[:, 0], batch.x_prev[:, 1])


def test_a_windows_steps_follow_each_other(tmp_path):
    maker = pools(tmp_path, candidates=3, window=2, sampling={"num_steps": 5})
    shard = made(maker)
    batch = everything(maker, shard)
    xt, x_prev = batch.xt.squeeze(2).unflatten(0, (-1, 2)), batch.x_prev.squeeze(2).unflatten(0, (-1, 2))
    assert len(xt) == 2 * 3 and torch.equal(xt[:, 1], x_prev[:, 0])
    assert torch.equal(xt[:, 0, 0], xt[:, 0, 1]) and not torch.equal(xt[:, 1, 0], xt[:, 1, 1])
    assert torch.equal(batch.t[1::2], batch.t_prev[::2])
    scores = batch.scores["bright"].unflatten(0, (-1, 2))
    assert torch.equal(scores[:, 0], scores[:, 1])  # one verdict for both
    shared = pools(tmp_path, candidates=3, sampling={"num_steps": 5})
    assert everything(shared, made(shared)).xt.shape[1] == 1


def test_noise_is_the_candidates_own(tmp_path):
    """More candidates leave the first ones what they were; a round and a prompt have noise of their own."""
    two, three = (pools(tmp_path, candidates=k, go_on="first", sampling={"batch_size": 9}) for k in (2, 3))
    for maker in (two, three):
        made(maker)
    final = [maker.policy.decoded[-1].unflatten(0, (3, -1)) for maker in (two, three)]
    torch.testing.assert_close(final[0], final[1][:, :2], rtol=1e-5, atol=1e-5)
    states = [x.numpy().tobytes() for x in final[1].flatten(0, 1)]
    made(three, round=1)
    states += [x.numpy().tobytes() for x in three.policy.decoded[-1]]
    assert len(set(states)) == len(states)


def test_only_the_network_runs_in_the_runs_precision(tmp_path):
    """A decoder in half precision overflows; a scorer was never trained in one."""
    seen = []

    class Watched(Policy):
        def __call__(self, xt: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(xt, t, cond)

    setting = settings(tmp_path, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    maker = pools(tmp_path, policy=Watched(schedule()), setting=setting)
    shard = made(maker)  # decoder and scorer look for themselves
    assert len(seen) == 4 and all(seen) and shard.num_rows("id")


# Rounds


def in_processes(folder: Path, size: int, **fields: Any) -> list[Rounds]:
    """A round made by `size` processes, here threads with a barrier."""
    barrier = threading.Barrier(size, timeout=60)
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        try:
            setting = settings(folder, rank=rank, size=size, barrier=barrier.wait)
            rounds = Rounds(pools(folder, setting=setting, **fields), 2, setting)
            rounds.refresh(0)
            found[rank] = rounds
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in found.values():
        if isinstance(one, BaseException):
            raise one
    return [found[rank] for rank in range(size)]


def test_one_process_equals_two(tmp_path):
    fields = {"prompts_per_round": 5, "candidates": 2, "sampling": {"batch_size": 2}, "threshold": 0.2}
    (one,), two = in_processes(tmp_path / "1", 1, **fields), in_processes(tmp_path / "2", 2, **fields)
    parts = [sorted((tmp_path / str(n) / "rounds" / "round-00000").glob("part-*")) for n in (1, 2)]
    assert len(parts[0]) == len(parts[1]) == 5
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*parts, strict=True))
    for step in (0, 1):
        whole, shares = one.batch(step), [rounds.batch(step) for rounds in two]
        assert len(whole) == 4
        for name in ("ids", "visits", "xt", "x_prev", "t", "t_prev", "logp_old"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(share, name) for share in shares])), name


def test_parts_without_a_pair_are_written_and_read(tmp_path):
    prompts = ("nothing here", "a red thing", "nothing there")
    fields = {"prompts": prompts, "sampling": {"batch_size": 4}}
    (rounds,) = in_processes(tmp_path, 1, **fields)
    paths = sorted((tmp_path / "rounds" / "round-00000").glob("part-*"))
    sizes = [Shard(path).num_rows("id") for path in paths]
    assert sorted(sizes) == [0, 0, 3] and len(rounds.batch(0)) == 4
    assert {prompts[place] for path in paths for place in column(Shard(path), "prompt")} == {"a red thing"}
    for window in (1, 2):
        maker = pools(tmp_path / str(window), **fields | {"prompts": ("nothing",) * 3}, window=window)
        shard = made(maker)
        assert shard.info["ties_1"] == 1 and maker.units(shard).shape == (0, 1)
        assert shard.rows("xt", 0, 0).shape == (0, window, 3, 4, 4) and shard.rows("x_prev", 0, 0).shape[1] == 2
        assert shard.rows("scores", 0, 0).shape == (0, 2, 1) and shard.rows("times", 0, 0).shape == (0, 2)


def test_a_round_without_a_pair_ends_the_run_with_one_line(tmp_path):
    with pytest.raises(UserError, match="round 0 gave no pair in 3 attempts") as error:
        in_processes(tmp_path, 1, prompts=("nothing",) * 3)
    assert "\n" not in str(error.value)


def test_the_summary_counts_by_noise_level(tmp_path):
    scores = [[[3, 1], [2, 2], [5, 1]], [[1, 1], [2, 2], [0, 0]], [[1, 2], [2, 1.9], [3, 3]]]
    maker = pools(tmp_path, scores, candidates=2, sampling={"batch_size": 6}, threshold=0.3)
    shard = made(maker)
    told = maker.summary([shard], 3)
    times = [f"t{t:.2f}" for t, _ in maker.grid]
    assert {name: value for name, value in told.items() if name.startswith("kept/")} == {
        f"kept/{times[1]}": pytest.approx(2 / 3),
        f"kept/{times[2]}": 0,
        f"kept/{times[3]}": pytest.approx(1 / 3),
    }
    assert [told[f"ties/{time}"] for time in times[1:]] == pytest.approx([1 / 3, 1, 1 / 3])
    assert told["pools"] == 9 and told["pairs"] == 3 and told["units"] == 3
    assert told["kept"] == pytest.approx(3 / 9) and told["ties"] == pytest.approx(5 / 9)
    gaps = math.tanh(1) + math.tanh(2) + math.tanh(0.5) + math.tanh(0.05)
    assert told["probability_gap"] == pytest.approx(gaps / 9, rel=1e-5)
    assert told["network_rows_per_pair"] == told["network_rows"] / 3 == 2 * 3 * (2 + 2 * 2) / 3
    assert maker.summary([shard, shard], 6)["pairs"] == 6


def test_facts_are_of_the_prompts(tmp_path):
    maker = pools(tmp_path)
    facts = maker.facts()
    assert facts["num_records"] == 3 and facts["scorers"]["bright"]["unit"] == "of 255"
    assert facts["fingerprint"] != pools(tmp_path, prompts=(*PROMPTS, "one more")).facts()["fingerprint"]


# Settings


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"first_step": 4}, "source.first_step=4 and source.window=1 leave no step of 4"),
        ({"first_step": 2, "window": 3}, "source.first_step=2 and source.window=3 leave no step of 4"),
        ({"first_step": -1}, "source.first_step must be at least 0"),
        ({"last_step": 0}, "source.last_step must lie in first_step..num_steps-1"),
        ({"last_step": 4}, "source.last_step must lie in first_step..num_steps-1"),
        ({"window": 0}, "source.window must be at least 1"),
        ({"candidates": 1}, "source.candidates must be at least 2"),
        ({"preview_steps": 0}, "source.preview_steps must be at least 1"),
        ({"prompts_per_round": 0}, "source.prompts_per_round must be at least 1"),
        ({"steps_per_round": 0}, "source.steps_per_round must be at least 1"),
        ({"sampling": {"eta": 0.0}}, "leave eta above 0 and noisy alone"),
        ({"sampling": {"noisy": [0.0, 0.5]}}, "leave eta above 0 and noisy alone"),
        ({"bad_below": 1.0}, "set source.keep=first-bad"),
        ({"keep": "first-bad"}, "set source.go_on=first and source.window=1"),
        ({"keep": "first-bad", "go_on": "first", "window": 2}, "set source.go_on=first and source.window=1"),
        ({"threshold": 1.0}, r"source.threshold must lie in \[0, 1\)"),
        ({"threshold": -0.1}, r"source.threshold must lie in \[0, 1\)"),
        ({"threshold_noisiest": 1.5}, r"source.threshold_noisiest must lie in \[0, 1\)"),
        ({"temperature": 0.0}, "source.temperature must be positive"),
        ({"temperature": NAN}, "source.temperature must be positive"),
        ({"scorer_timeout": 0.0}, "source.scorer_timeout must be positive"),
        ({"go_on": "best"}, "source.go_on"),
        ({"keep": "all"}, "source.keep"),
        ({"latents": "bfloat16"}, "source.latents"),
        ({"prewiew": "half"}, "Did you mean 'preview'"),
    ],
)
def test_bad_settings_are_one_line(fields, match, tmp_path):
    with pytest.raises(UserError, match=match) as error:
        sourced(tmp_path, **fields)
    assert "\n" not in str(error.value)


def test_what_the_model_shows_to_be_wrong(tmp_path):
    with pytest.raises(UserError, match="source.first_step=3: no step from there on adds noise"):
        pools(tmp_path, policy=Policy(schedule()), first_step=3)
    with pytest.raises(UserError, match="eta=1.5"):
        pools(tmp_path, sampling={"eta": 1.5})
    with pytest.raises(UserError, match="source.preview=nowhere"):
        pools(tmp_path, preview="nowhere")
    policy: Any = Policy(schedule())
    policy.users = object()
    with pytest.raises(UserError, match="source.name=branching has no users"):
        sourced(tmp_path).prepare(policy, None, settings(tmp_path))


def test_checked_before_weights_are_read(tmp_path):
    sourced(tmp_path).check()
    with pytest.raises(UserError, match="source.scorers is empty"):
        sourced(tmp_path, scorers=[]).check()
    with pytest.raises(UserError, match="source.prompts: no such file"):
        replace(sourced(tmp_path), prompts=str(tmp_path / "none.txt")).check()
