"""The pool of past policies: which one is the reference when, what stays on disk, what a resume finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffalign.references.checkpoint_pool import CheckpointPool
from diffalign.registry import build
from diffalign.types import Setting, UserError


class Tiny:
    """A policy of one number: its prediction is the number, everywhere."""

    def __init__(self) -> None:
        self.denoiser = nn.ParameterDict({"value": nn.Parameter(torch.zeros(1)), "frozen": nn.Parameter(torch.ones(2))})
        self.denoiser["frozen"].requires_grad_(False)

    def __call__(self, xt: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return xt * 0 + self.denoiser["value"]

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.denoiser["value"].fill_(value)


def setting(folder: Path, seed: int = 0, **more: Any) -> Setting:
    return Setting(seed=seed, steps=100, batch_size=2, folder=folder, **more)


def pool(policy: Tiny, folder: Path, seed: int = 0, **fields: Any) -> CheckpointPool:
    reference = build("reference", {"name": "checkpoint_pool", "every": 2, "size": 3} | fields)
    return reference.bind(policy, setting(folder, seed))


def value_of(reference: CheckpointPool) -> float:
    return float(reference.predict(torch.zeros(1, 1, 1, 1), torch.zeros(1), {}, torch.zeros(1)))


def walk(reference: CheckpointPool, policy: Tiny, steps: range) -> list[float]:
    """The reference's value at each step of a policy that is n after n steps."""
    values = []
    for step in steps:
        policy.become(step)
        values.append(value_of(reference))
        policy.become(step + 1)
        reference.after_step(step)
    return values


def run(folder: Path, num: int = 8, **fields: Any) -> list[float]:
    policy = Tiny()
    reference = pool(policy, folder, **fields)
    reference.after_step(-1)
    return walk(reference, policy, range(num))


def members(folder: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in (folder / "pool").glob("stage-*.safetensors"))


def test_last_is_the_policy_as_the_stage_began(tmp_path):
    assert run(tmp_path, strategy="last") == [0, 0, 2, 2, 4, 4, 6, 6]


def test_first_never_changes(tmp_path):
    assert run(tmp_path, strategy="first", size=1) == [0] * 8


def test_random_is_a_member_of_the_newest(tmp_path):
    for seed in range(5):
        values = run(tmp_path / str(seed), num=16, strategy="random", seed=seed)
        assert values[::2] == values[1::2]  # frozen within a stage
        for stage, value in enumerate(values[::2]):
            assert value in [2 * member for member in range(max(0, stage - 2), stage + 1)]


def test_draws_are_uniform_over_the_pool(tmp_path):
    """Over 900 seeds, chi-square of 3 members below its 99.9th percentile; and seeds, not stages, decide."""
    counts: dict[int, Counter[int]] = {}
    reference = CheckpointPool(every=2, size=3)
    for stage in (2, 3, 9):
        drawn = Counter()
        for seed in range(900):
            reference._setting = setting(tmp_path, seed)
            drawn[reference.member(stage)] += 1
        counts[stage] = drawn
        assert sorted(drawn) == [stage - 2, stage - 1, stage]
        assert sum((count - 300) ** 2 / 300 for count in drawn.values()) < 13.8
    reference._setting = setting(tmp_path, 0)
    assert reference.member(0) == 0
    assert len({reference.member(stage) - stage for stage in range(2, 30)}) == 3
    alone = CheckpointPool(every=2, size=1)
    alone._setting = setting(tmp_path)
    assert [alone.member(stage) for stage in range(5)] == list(range(5))


@pytest.mark.parametrize("strategy", ["random", "first", "last"])
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7])
def test_a_resume_goes_on_with_the_same_member(strategy, cut, tmp_path):
    whole = run(tmp_path / "whole", strategy=strategy)
    assert run(tmp_path / "cut", num=cut, strategy=strategy) == whole[:cut]
    policy = Tiny()
    reference = pool(policy, tmp_path / "cut", strategy=strategy)  # bound before the checkpoint is loaded
    policy.become(cut)
    reference.after_step(cut - 1)
    assert walk(reference, policy, range(cut, 8)) == whole[cut:]
    assert members(tmp_path / "cut") == members(tmp_path / "whole")


@pytest.mark.parametrize("strategy,size", [("random", 3), ("random", 1), ("last", 3), ("first", 1)])
def test_a_resume_from_any_checkpoint_that_is_there(strategy, size, tmp_path):
    """The run is killed after its pool went on and before the next checkpoint was written."""
    whole = run(tmp_path / "whole", num=24, strategy=strategy, size=size)
    for at, until in ((5, 6), (5, 14), (7, 8), (3, 24), (4, 24)):
        folder = tmp_path / f"{at}-{until}"
        (folder / "checkpoints" / f"step-{at:08d}").mkdir(parents=True)
        run(folder, num=until, strategy=strategy, size=size)
        policy = Tiny()
        reference = pool(policy, folder, strategy=strategy, size=size)
        policy.become(at)
        reference.after_step(at - 1)
        assert walk(reference, policy, range(at, 24)) == whole[at:]


def test_only_the_newest_stay(tmp_path):
    run(tmp_path / "random", num=20)
    assert members(tmp_path / "random") == [8, 9, 10]
    run(tmp_path / "last", num=20, strategy="last")
    assert members(tmp_path / "last") == [10]
    run(tmp_path / "first", num=20, strategy="first")
    assert members(tmp_path / "first") == [0]
    for step in (16, 18):  # with checkpoints, also what the older of them needs
        (tmp_path / "kept" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    run(tmp_path / "kept", num=20)
    assert members(tmp_path / "kept") == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("damage", ["gone", "truncated"])
def test_a_member_that_is_gone_is_named(damage, tmp_path):
    run(tmp_path, num=5, strategy="last")
    file = tmp_path / "pool" / "stage-00002.safetensors"
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-1])
    policy = Tiny()
    reference = pool(policy, tmp_path, strategy="last")
    with pytest.raises(UserError, match="stage-00002.safetensors is gone or broken") as error:
        reference.after_step(4)
    assert "\n" not in str(error.value)


def test_one_process_writes_and_all_wait(tmp_path):
    waited: list[int] = []
    policies = [Tiny(), Tiny()]
    references = []
    for rank, policy in enumerate(policies):
        policy.become(7)
        more = {"rank": rank, "size": 2, "barrier": lambda rank=rank: waited.append(rank)}
        references.append(CheckpointPool(every=2, strategy="first").bind(policy, setting(tmp_path, **more)))
        references[rank].after_step(-1)
    assert waited == [0, 1] and members(tmp_path) == [0]
    assert [value_of(reference) for reference in references] == [7, 7]
    policies[1].become(3)  # a process that is not the main one writes nothing
    references[1].after_step(1)
    assert members(tmp_path) == [0]


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"every": 0}, "reference.every must be at least 1"),
        ({"size": 0}, "reference.size"),
        ({"strategy": "x"}, "last"),
    ],
)
def test_bad_settings(fields, match, tmp_path):
    with pytest.raises(UserError, match=match):
        build("reference", {"name": "checkpoint_pool"} | fields)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("likelihood", ["elbo", "step"])
def test_the_ratio_is_exactly_one_as_a_stage_begins(likelihood, trainable, tiny_folders, tmp_path):
    """On a real network, in every stage of strategy last; then it moves, while the reference does not."""
    from diffalign.types import EndpointBatch, StepBatch

    torch.manual_seed(0)
    spec = {"name": "sdxl", "path": str(tiny_folders["sdxl"]), "trainable": trainable}
    model = build("model", spec).load()
    reference = CheckpointPool(every=2, strategy="last").bind(model, setting(tmp_path))
    generator = torch.Generator().manual_seed(1)
    shape = model.latent_shape(*model.resolution)
    size = torch.tensor(model.resolution).expand(1, 2)
    cond = model.encode_prompts(["a thing"]) | model.size_cond(size, 0 * size, size)
    shared: dict[str, Any] = {
        "ids": torch.arange(1),
        "visits": torch.zeros(1, dtype=torch.int64),
        "utility": torch.tensor([[1.0, 0.0]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    if likelihood == "elbo":
        each = {name: value[:, None].expand(1, 2, *value.shape[1:]) for name, value in cond.items()}
        batch: Any = EndpointBatch(**shared, x0=torch.randn(1, 2, *shape, generator=generator), cond=each)
    else:
        x = torch.randn(2, 1, 2, 1, *shape, generator=generator)
        t = torch.tensor([[0.6]])
        more = {"t": t, "t_prev": t - 0.2, "eta": 1.0, "weight": torch.ones(1, 2, 1)}
        batch = StepBatch(**shared, xt=x[0], x_prev=x[1], cond=cond, uncond=None, cfg_scale=1.0, **more)
    measure = build("likelihood", {"name": likelihood})
    reference.after_step(-1)
    for stage in range(3):
        with torch.no_grad():
            begun = measure(model, reference, batch)
            assert (begun.logratio == 0).all()
            for step in (2 * stage, 2 * stage + 1):
                for parameter in model.trainable_parameters().values():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
                if step % 2 == 0:
                    reference.after_step(step)
                    later = measure(model, reference, batch)
                    assert torch.equal(later.logp_ref, begun.logp_ref) and (later.logratio != 0).all()
                else:
                    reference.after_step(step)
    assert members(tmp_path) == [3]


def test_members_hold_the_trained_tensors_alone(tiny_folders, tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = build("model", {"name": "sd3", "path": str(tiny_folders["sd3"])}).load()
    CheckpointPool().bind(model, setting(tmp_path)).after_step(-1)
    kept = load_file(tmp_path / "pool" / "stage-00000.safetensors")
    trained = model.trainable_parameters()
    assert kept.keys() == trained.keys()
    assert all(torch.equal(kept[name], trained[name]) for name in kept)
