"""Rivals: whose image stands against a recorded one, who says which is better, and which process makes it."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign import api, randomness
from diffalign.data import RecordWriter, Shard
from diffalign.metrics import read_metrics
from diffalign.models import sdxl
from diffalign.registry import build
from diffalign.sampling import sample
from diffalign.schedule import schedule_from_config
from diffalign.types import Record, ScorerInfo, Setting, UserError

NUM = 12
NAN = float("nan")


def grey(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(buffer, format="png")
    return buffer.getvalue()


def winners_level(prompt: str) -> int:
    """Of grey: every prompt's winner is known by it."""
    return 20 + 15 * int(prompt.rpartition(" ")[2])


class Policy:
    """A network of one trained number; its latents are the picture in small."""

    users = None
    vae_factor, latent_channels, resolution = 4, 3, (16, 16)
    device = torch.device("cpu")

    def __init__(self, value: float = 0.5) -> None:
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        self.schedule = schedule_from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **betas})
        self.denoiser = nn.ParameterDict({"value": nn.Parameter(torch.tensor([value]))})
        self.is_off = False
        self.rows = 0

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.denoiser["value"].fill_(value)

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False

    def __call__(self, xt: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.rows += len(xt)
        value = 0.5 if self.is_off else self.denoiser["value"]
        return value * xt + 0.02 * cond["prompt_embeds"][:, :, None, None]

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean = pixels.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
        return mean, 0.002 * torch.ones_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        return (nn.functional.interpolate(latents, scale_factor=4.0) / 2 + 0.5).clamp(0, 1)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.tensor([[float(prompt.rpartition(" ")[2])] for prompt in prompts])}

    def empty_prompt(self) -> dict[str, Tensor]:
        return {"prompt_embeds": torch.full((1, 1), -1.0)}

    def size_cond(self, original: Tensor, crop: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {}

    def fingerprint(self, part: str) -> str:
        return part


@dataclass(frozen=True)
class Bright:
    """The mean of a picture times `sign`, NaN for one prompt where told so; remembers what it was asked."""

    sign: float = 1.0
    skips: str = ""
    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image", "prompt"), "of 255", (0.0, 255.0))
    asked: ClassVar[list[tuple[str, float]]] = []

    def score(self, images: list[Any], prompts: list[str]) -> list[float]:
        means = [float(np.asarray(image, dtype=np.float64).mean()) for image in images]
        Bright.asked.extend(zip(prompts, means, strict=True))
        return [NAN if prompt == self.skips else self.sign * mean for prompt, mean in zip(prompts, means, strict=True)]


BRIGHT = {"name": "test_rivals:Bright", "as": "bright"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs: winners first and second in turn; singles: winners alone; lists: of two to four pictures."""
    root = tmp_path_factory.mktemp("rivals")
    for kind in ("pairs", "singles", "lists"):
        with RecordWriter(root / kind) as writer:
            for number in range(NUM):
                prompt = f"prompt {number}"
                images: tuple[bytes, ...] = (grey(winners_level(prompt)), grey(250 - number))
                utility: tuple[float, ...] = (1.0, 0.0)
                if kind == "lists":
                    images += tuple(grey(240 - number - 20 * more) for more in range(number % 3))
                    utility += (-1.0, -2.0)[: number % 3]
                if kind == "singles":
                    images, utility = images[:1], (1.0,)
                turn = slice(None, None, -1 if number % 2 else 1)
                writer.write(Record(0, prompt, images[turn], utility[turn]))
    return root


def settings(folder: Path, **more: Any) -> Setting:
    values: dict[str, Any] = {"seed": 3, "steps": 5, "batch_size": 6, "folder": folder}
    return Setting(**values | more)


def sourced(folder: Path, kind: str = "pairs", **fields: Any) -> Any:
    values = {"data": {"path": str(folder / kind)}, "cache": False, "cache_dtype": "float32", "holdout": 0.0}
    values |= {"steps_per_round": 2, "latents": "float32"}
    sampling = {"num_steps": 3, "cfg_scale": 2.0, "batch_size": 4} | fields.pop("sampling", {})
    return build("source", {"name": "rivals", **values, "sampling": sampling, **fields})


def off(policy: Any) -> Any:
    return build("reference", {"name": "adapter_off"}).bind(policy)


def prepared(
    folder: Path, out: Path, policy: Any = None, reference: Any = None, setting: Any = None, **fields: Any
) -> Any:
    policy = policy or Policy()
    return sourced(folder, **fields).prepare(policy, reference or off(policy), setting or settings(out))


def drawn(folder: Path, out: Path, step: int = 0, **more: Any) -> Any:
    batches = prepared(folder, out, **more)
    batches.refresh(step)
    return batches.batch(step)


def prompts_of(batch: Any) -> list[str]:
    return [f"prompt {round(number)}" for number in batch.cond["prompt_embeds"][:, 0, 0].tolist()]


def levels(x0: Tensor) -> list[int]:
    """Grey levels of latents."""
    return ((x0.flatten(1).mean(dim=1) / 2 + 0.5) * 255).round().int().tolist()


# Whose image


def test_the_rival_is_the_references(folder, tmp_path):
    moved = Policy(0.8)
    batch = drawn(folder, tmp_path / "reference", policy=moved)
    base = drawn(folder, tmp_path / "base", policy=Policy(0.5), rival_from="policy")
    own = drawn(folder, tmp_path / "own", policy=moved, rival_from="policy")
    assert batch.x0.shape == (6, 2, 3, 4, 4)
    assert torch.equal(batch.x0, base.x0) and torch.equal(batch.x0[:, 0], own.x0[:, 0])
    assert (batch.x0[:, 1] != own.x0[:, 1]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("cfg_scale,eta", [(1.0, None), (3.0, None), (2.0, 1.0)])
def test_it_is_what_the_sampler_gives_for_its_prompt(cfg_scale, eta, folder, tmp_path):
    policy, sampling = Policy(0.7), {"cfg_scale": cfg_scale, "eta": eta}
    batches = prepared(folder, tmp_path, policy=policy, rival_from="policy", sampling=sampling)
    told = batches.refresh(0)
    assert told["rollout/images"] == 12 and told["rollout/network_rows"] == policy.rows
    assert policy.rows == 12 * 3 * (1 if cfg_scale == 1 else 2)
    batch = batches.batch(1)

    def noise(stream: str) -> Tensor:
        return randomness.normal(3, f"rival {stream}", batch.ids, batch.visits, (3, 4, 4))

    cond = {"prompt_embeds": batch.cond["prompt_embeds"][:, 0]}
    wanted = sample(
        policy,
        cond,
        {"prompt_embeds": torch.full((6, 1), -1.0)},
        noise("start"),
        sampler="ddim",
        num_steps=3,
        cfg_scale=cfg_scale,
        eta=eta or 0.0,
        step_noise=lambda index: noise(f"step {index}"),
    )
    torch.testing.assert_close(batch.x0[:, 1], wanted, rtol=1e-5, atol=1e-5)


def test_a_record_that_comes_again_has_another_rival(folder, tmp_path):
    setting = settings(tmp_path, batch_size=NUM)
    batches = prepared(folder, tmp_path, setting=setting)
    batches.refresh(0)
    first, second = batches.batch(0), batches.batch(1)
    assert set(first.visits.tolist()) == {0} and set(second.visits.tolist()) == {1}
    one, other = first.ids.argsort(), second.ids.argsort()
    assert torch.equal(first.ids[one], second.ids[other])
    assert (first.x0[one, 1] != second.x0[other, 1]).flatten(1).any(dim=1).all()


def test_a_reference_is_needed(folder, tmp_path):
    none = build("reference", {"name": "none"}).bind(None)
    with pytest.raises(UserError, match="source.rival_from=reference needs one") as error:
        prepared(folder, tmp_path, reference=none)
    assert "\n" not in str(error.value)
    prepared(folder, tmp_path, reference=none, rival_from="policy")


def test_the_rival_of_a_stage_is_its_references(folder, tmp_path):
    """With as many steps a round as a stage: the pool's member that judges a stage is the one that drew its rivals."""
    setting = settings(tmp_path, steps=12, batch_size=2)
    policy = Policy(0.1)
    pool = build("reference", {"name": "checkpoint_pool", "every": 2, "size": 7}).bind(policy, setting)
    batches = prepared(folder, tmp_path, policy=policy, reference=pool, setting=setting)
    pool.after_step(-1)
    value = {stage: 0.1 * (stage + 1) for stage in range(6)}  # of the policy as a stage began
    members = []
    for step in range(12):
        if not batches.is_ready(step):
            batches.refresh(step)
        batch, stage = batches.batch(step), step // 2
        members.append(pool.member(stage))
        if step % 2 == 0:
            out = tmp_path / str(step)
            alone = settings(out, steps=12, batch_size=2)
            member = Policy(value[members[-1]])
            of_member = drawn(folder, out, step, policy=member, setting=alone, rival_from="policy")
            torch.testing.assert_close(batch.x0, of_member.x0)
        x, t = torch.ones(1, 3, 4, 4), torch.ones(1)
        found = pool.predict(x, t, {"prompt_embeds": torch.zeros(1, 1)}, torch.zeros(1))
        assert found.mean().item() == pytest.approx(value[members[-1]])
        policy.become(0.1 * (step // 2 + 2) if step % 2 else 9.0)
        pool.after_step(step)
    assert len(set(members)) > 2 and any(member < stage // 2 for stage, member in enumerate(members))


# Which images, and who is better


@pytest.mark.parametrize("kind", ["pairs", "singles", "lists"])
def test_winners_are_picked_by_utility(kind, folder, tmp_path):
    batch = drawn(folder, tmp_path, kind=kind)
    assert batch.x0.shape[:2] == (6, 2) and len(set(prompts_of(batch))) == 6
    assert levels(batch.x0[:, 0]) == pytest.approx([winners_level(prompt) for prompt in prompts_of(batch)], abs=1)
    assert batch.utility.tolist() == [[1, 0]] * 6 and batch.mask.all() and batch.scores == {}
    assert torch.equal(batch.cond["prompt_embeds"][:, 0], batch.cond["prompt_embeds"][:, 1])
    lower = drawn(folder, tmp_path, kind=kind, rival_utility=-3.0)
    assert (lower.utility[:, 0] > lower.utility[:, 1]).all() and torch.equal(lower.x0, batch.x0)


@pytest.mark.parametrize("kind", ["pairs", "lists"])
def test_all_recorded_images_and_the_rival_last(kind, folder, tmp_path):
    batch = drawn(folder, tmp_path, kind=kind, recorded="all", rival_utility=-5.0)
    alone = drawn(folder, tmp_path / "alone", kind=kind)
    k = 2 if kind == "pairs" else 4
    assert batch.x0.shape[:2] == batch.mask.shape == batch.utility.shape == (6, k + 1)
    assert torch.equal(batch.x0[:, -1], alone.x0[:, -1])
    assert batch.mask[:, -1].all() and (batch.utility[:, -1] == -5).all()
    best = batch.utility.masked_fill(~batch.mask, -9).argmax(dim=1)
    assert set(best.tolist()) > {0, 1} or kind == "pairs"
    rows = torch.arange(6)
    assert levels(batch.x0[rows, best]) == levels(alone.x0[:, 0]) and (batch.utility[rows, best] == 1).all()
    for row, prompt in enumerate(prompts_of(batch)):
        number = int(prompt.rpartition(" ")[2])
        assert batch.mask[row, :-1].sum() == (2 if kind == "pairs" else 2 + number % 3)
        assert (batch.cond["prompt_embeds"][row] == number).all()


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(Bright, "asked", [])
    return Bright.asked


@pytest.mark.parametrize("recorded", ["winner", "all"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_judge_says_who_is_better(sign, recorded, folder, asked, tmp_path):
    policy = Policy(0.9)
    batches = prepared(folder, tmp_path, policy=policy, recorded=recorded, scorers=[BRIGHT | {"sign": sign}])
    told = batches.refresh(0)
    found, k = [], 1 if recorded == "winner" else 2
    for step in (0, 1):
        batch = batches.batch(step)
        scores = batch.scores["bright"]
        assert scores.shape == batch.utility.shape == (6, k + 1) and torch.equal(scores, batch.utility)
        decoded = policy.decode(batch.x0.flatten(0, 1)).mul(255).round().flatten(1).mean(dim=1)
        torch.testing.assert_close(scores.flatten(), sign * decoded, rtol=1e-5, atol=1e-3)
        assert batch.mask.all()
        found.append(scores)
    # the texts are the records' own: a recorded picture's grey is its prompt's
    winners = [(prompt, mean) for prompt, mean in asked if abs(mean - winners_level(prompt)) < 1.5]
    assert len(asked) == 12 * (k + 1) and {prompt for prompt, _ in winners} == {f"prompt {n}" for n in range(NUM)}
    whole = torch.cat(found)
    assert told["rollout/bright"] == pytest.approx(whole[:, -1].mean().item(), rel=1e-5)
    assert told["rollout/bright_recorded"] == pytest.approx(whole[:, :-1].mean().item(), rel=1e-5)
    wins = (whole[:, -1] > whole[:, :-1].amax(dim=1)).float().mean().item()
    assert told["rollout/rival_wins"] == pytest.approx(wins) and told["rollout/unjudged"] == 0


@pytest.mark.filterwarnings("error")
def test_what_nobody_judged_is_masked_and_counted(folder, asked, tmp_path):
    scorers = [BRIGHT, BRIGHT | {"as": "some", "skips": "prompt 3"}]
    setting = settings(tmp_path, batch_size=NUM, steps=1)
    batches = prepared(folder, tmp_path, scorers=scorers, weights=[1.0, 0.5], setting=setting)
    told = batches.refresh(0)
    batch = batches.batch(0)
    skipped = torch.tensor([prompt == "prompt 3" for prompt in prompts_of(batch)])
    assert torch.equal(batch.mask, ~skipped[:, None].expand(NUM, 2)) and skipped.sum() == 1
    assert batch.utility.isfinite().all() and all(values.isfinite().all() for values in batch.scores.values())
    assert torch.allclose(batch.utility[~skipped], 1.5 * batch.scores["bright"][~skipped])
    assert told["rollout/unjudged"] == 2 and told["rollout/some"] != told["rollout/bright"]
    judged = batch.scores["bright"][~skipped]
    assert told["rollout/rival_wins"] == pytest.approx((judged[:, 1] > judged[:, 0]).float().mean().item())


@pytest.mark.filterwarnings("error")
def test_nobody_judged_anything(folder, asked, tmp_path):
    scorers = [BRIGHT | {"skips": f"prompt {n}", "as": f"s{n}"} for n in range(NUM)]
    batches = prepared(folder, tmp_path, scorers=scorers)
    told = batches.refresh(0)
    assert told["rollout/unjudged"] == 24 and "rollout/rival_wins" not in told and "rollout/s0" in told
    assert not batches.batch(0).mask.any()


# Which process, which round


def in_processes(folder: Path, out: Path, size: int, step: int = 0, setting: Any = None, **fields: Any) -> list[Any]:
    """The batches of `size` processes, here threads with a barrier, whose round of `step` is there."""
    barrier = threading.Barrier(size, timeout=60)
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        try:
            mine = settings(out, **(setting or {}), rank=rank, size=size, barrier=barrier.wait)
            found[rank] = prepared(folder, out, setting=mine, **fields)
            found[rank].refresh(step)
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


def parts(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("rounds/*/part-*"))}


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("kind,recorded,judged", [("pairs", "winner", False), ("lists", "all", True)])
def test_one_process_equals_two(kind, recorded, judged, rows, folder, tmp_path):
    """Six rows a step: three each, whatever the rows of a part; lists of other lengths in a step or share too."""
    fields: dict[str, Any] = {"kind": kind, "recorded": recorded, "sampling": {"batch_size": rows}}
    fields["scorers"] = [BRIGHT] if judged else []
    (one,), two = (in_processes(folder, tmp_path / str(size), size, **fields) for size in (1, 2))
    assert parts(tmp_path / "1") == parts(tmp_path / "2") and len(parts(tmp_path / "1")) == one.num_parts
    assert one.num_parts == 2 * {1: 6, 4: 2, 16: 1}[rows]
    for step in (0, 1):
        whole, shares = one.batch(step), [batches.batch(step) for batches in two]
        assert [len(share) for share in shares] == [3, 3]
        assert torch.equal(whole.ids, torch.cat([share.ids for share in shares]))
        assert torch.equal(whole.x0[:, -1], torch.cat([share.x0[:, -1] for share in shares]))
        for rank, share in enumerate(shares):
            mine, k = slice(3 * rank, 3 * rank + 3), share.x0.shape[1] - 1
            columns = [*range(k), -1]
            assert not whole.mask[mine, k:-1].any()  # what a share lacks, nobody has
            for name in ("x0", "utility", "mask"):
                assert torch.equal(getattr(whole, name)[mine][:, columns], getattr(share, name)), name
            for name, values in share.scores.items():
                assert torch.equal(whole.scores[name][mine][:, columns], values)
        assert bool(whole.scores) == judged


@pytest.mark.parametrize("scorers", [[], [BRIGHT]])
def test_the_last_round_of_a_run_whose_steps_do_not_divide(scorers, folder, tmp_path):
    batches = prepared(folder, tmp_path, scorers=scorers)  # of five steps, two a round
    whole = prepared(folder, tmp_path / "more", scorers=scorers, setting=settings(tmp_path / "more", steps=6))
    assert [batches.is_ready(step) for step in range(5)] == [False] * 5
    for step in range(5):
        if not batches.is_ready(step):
            told = batches.refresh(step)
    assert [batches.is_ready(step) for step in range(5)] == [False] * 4 + [True]
    assert told["rollout/images"] == 6
    whole.refresh(4)
    assert torch.equal(batches.batch(4).x0, whole.batch(4).x0)
    sizes = [Shard(path).num_rows("x") for path in sorted(tmp_path.glob("rounds/round-00002/part-*"))]
    assert sizes == [4, 2, 0, 0]
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == ["round-00001", "round-00002"]


def test_a_resume_takes_what_is_there_and_says_what_is_gone(folder, tmp_path):
    policy = Policy(0.5)
    first = prepared(folder, tmp_path, policy=policy, rival_from="policy")
    first.refresh(0)
    wanted = first.batch(1).x0
    moved = prepared(folder, tmp_path, policy=Policy(0.9), rival_from="policy")
    moved.refresh(1)  # in the middle: of the weights that the round began with
    assert torch.equal(moved.batch(1).x0, wanted)
    part = tmp_path / "rounds" / "round-00000" / "part-00002.safetensors"
    part.unlink()
    with pytest.raises(UserError, match="part-00002.safetensors is gone and training is in the middle") as error:
        prepared(folder, tmp_path, rival_from="policy").refresh(1)
    assert "\n" not in str(error.value)
    again = prepared(folder, tmp_path, policy=policy, rival_from="policy")
    again.refresh(0)  # at its beginning what is missing is made anew, and it alone
    assert torch.equal(again.batch(1).x0, wanted) and policy.rows == (12 + 4) * 3 * 2


@pytest.mark.parametrize("latents", ["float16", "float32"])
def test_what_is_stored_is_what_is_judged(latents, folder, asked, tmp_path):
    policy = Policy(0.9)
    batch = drawn(folder, tmp_path, policy=policy, latents=latents, scorers=[BRIGHT])
    rival = batch.x0[:, 1]
    assert rival.dtype == torch.float32 and torch.equal(rival, rival.to(getattr(torch, latents)).float())
    assert Shard(next(tmp_path.glob("rounds/*/part-*"))).rows("x", 0, 1).dtype == latents
    seen = policy.decode(rival).mul(255).round().flatten(1).mean(dim=1)
    torch.testing.assert_close(batch.scores["bright"][:, 1], seen, rtol=1e-5, atol=1e-3)


def test_held_out_records_have_no_rival(folder, tmp_path):
    """But its place, so that terms that look at it find one; a winner alone is no pair."""
    batches = prepared(folder, tmp_path, recorded="all", holdout=0.5)
    held_out = list(batches.holdout(100, 4))
    assert held_out and all(batch.x0.shape[1] == 3 for batch in held_out)
    for batch in held_out:
        assert batch.mask.tolist() == [[True, True, False]] * len(batch)
        assert batch.utility[:, :2].sum(dim=1).tolist() == [1] * len(batch)
        assert all(value.shape[:2] == (len(batch), 3) for value in batch.cond.values())
    assert list(prepared(folder, tmp_path, holdout=0.5).holdout(100, 4)) == []
    facts = batches.facts()
    assert facts["num_holdout"] > 0 and facts["sample_prompts"]


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"steps_per_round": 0}, "source.steps_per_round must be at least 1"),
        ({"buckets": "aspect"}, "source.name=rivals samples at one size"),
        ({"users": {}}, "source.name=rivals samples at one size"),
        ({"masks": "masks"}, "source.name=rivals samples at one size"),
        ({"sampling": {"noisy": [0.0, 0.5]}}, "source.sampling.noisy is of recorded steps"),
        ({"scorer_timeout": -1.0}, "source.scorer_timeout must be positive"),
        ({"rival_from": "base"}, "source.rival_from"),
        ({"recorded": "loser"}, "source.recorded"),
        ({"prefer": "best"}, "source.prefer"),
        ({"prompt_dropout": 1.0}, "source.prompt_dropout"),
        ({"rival_frm": "policy"}, "Did you mean 'rival_from'"),
    ],
)
def test_bad_settings_are_one_line(fields, match, folder):
    with pytest.raises(UserError, match=match) as error:
        sourced(folder, **fields)
    assert "\n" not in str(error.value)


def test_checked_before_weights_are_read(folder):
    sourced(folder, scorers=[BRIGHT]).check()
    with pytest.raises(UserError, match="source.scorers names 'bright' twice"):
        sourced(folder, scorers=[BRIGHT, BRIGHT]).check()
    with pytest.raises(UserError, match="source.data.path is missing"):
        sourced(folder, data={}).check()


def test_the_encoders_stay_where_a_judge_decodes(folder):
    assert sourced(folder, cache=True).encoders == "done" and sourced(folder, cache=False).encoders == "needed"
    assert sourced(folder, cache=True, scorers=[BRIGHT]).encoders == "decoder"


# Whole runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdxl.build_tiny(tmp_path_factory.mktemp("model") / "tiny")


class Interrupted(KeyboardInterrupt):
    pass


METHODS: dict[str, dict[str, Any]] = {
    "seppo": {
        "source": {"recorded": "winner"},
        "reference": {"name": "checkpoint_pool", "every": 2, "size": 3},
        "objective": {"name": "seppo", "beta": 100},
    },
    "hypo": {
        "source": {"recorded": "all", "rival_from": "policy", "holdout": 0.3},
        "objective": {
            "name": "sum",
            "terms": [
                {"name": "pair", "beta": 100, "candidates": [0, 1]},
                {"name": "kl", "weight": 1, "candidates": [2]},
            ],
        },
    },
    "reward-po": {
        "source": {"rival_from": "policy", "scorers": [BRIGHT]},
        "objective": {
            "name": "sum",
            "terms": [{"name": "pair", "beta": 1, "labels": "soft"}, {"name": "sft", "candidates": [0]}],
        },
    },
}


def go(folder: Path, tiny: Path, out: Path, method: str, interrupt_after: int | None = None, **more: Any) -> Any:
    sections: dict[str, Any] = {
        "model": {"name": "sdxl", "path": str(tiny), "dtype": "float32"},
        "source": {
            "name": "rivals",
            "data": {"path": str(folder / "pairs")},
            "cache_dir": str(tiny.parent / "cache"),
            "steps_per_round": 2,
            "holdout": 0.0,
            "sampling": {"num_steps": 2, "cfg_scale": 2.0, "batch_size": 2},
        },
        "likelihood": {"name": "elbo"},
        "reference": {"name": "adapter_off"},
        "train": {
            "out": str(out),
            "steps": 5,
            "batch_size": 2,
            "lr": 1e-3,
            "device": "cpu",
            "checkpoint_every": 100,
            "validate_every": 5,
            "sample_prompts": ["two things"],
        },
        "sampling": {"num_steps": 1, "cfg_scale": 1.0},
        "log": {"trackers": []},
    }
    for extra in (METHODS[method], more):
        for name, values in extra.items():
            sections[name] = {**sections.get(name, {}), **values}

    def interrupt(step: int, metrics: object) -> None:
        if step + 1 == interrupt_after:
            raise Interrupted

    return api.train(callbacks=[interrupt], quiet=True, **sections)


@pytest.mark.slow
def test_seppo_from_end_to_end(folder, tiny, tmp_path):
    """A stage begins at its reference where that is the newest member; an interrupted run equals an uninterrupted."""
    go(folder, tiny, tmp_path / "whole", "seppo")
    for after in (2, 3):
        with pytest.raises(Interrupted):
            go(folder, tiny, tmp_path / f"cut-{after}", "seppo", interrupt_after=after)
        go(folder, tiny, tmp_path / f"cut-{after}", "seppo")
    runs = [tmp_path / name for name in ("whole", "cut-2", "cut-3")]
    losses = [[row["loss"] for row in read_metrics(run)] for run in runs]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 5
    assert parts(runs[0]) == parts(runs[1]) == parts(runs[2])
    rows = read_metrics(runs[0])
    assert rows[0]["margin"] == 0 and {"flip_rate", "rollout/images", "rollout/network_rows"} <= rows[0].keys()
    assert [row.get("rollout/images") for row in rows] == [4, None, 4, None, 2]
    assert not any(name.startswith("holdout/") for name in rows[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hypo", "reward-po"])
def test_other_methods_with_rivals_run(method, folder, tiny, tmp_path):
    go(folder, tiny, tmp_path / "run", method, train={"steps": 3, "validate_every": 3})
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 3 and all(np.isfinite(row["loss"]) for row in rows)
    assert ("holdout/margin" in rows[-1]) == (method == "hypo")
    if method == "reward-po":
        assert {"rollout/bright", "rollout/bright_recorded", "rollout/rival_wins"} <= rows[0].keys()


@pytest.mark.slow
def test_winners_alone_are_enough_for_seppo(folder, tiny, tmp_path):
    source = {"data": {"path": str(folder / "singles")}, "recorded": "winner"}
    go(folder, tiny, tmp_path / "run", "seppo", source=source, train={"steps": 1, "validate_every": 0})
    assert len(read_metrics(tmp_path / "run")) == 1
