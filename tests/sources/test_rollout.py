"""Rollouts: what is recorded is what was sampled, what is drawn is what was judged, on tiny models of every family."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from diffalign.data import Shard, read_prompts, write_shard
from diffalign.models import sd15
from diffalign.registry import build
from diffalign.sampling import grid, predict
from diffalign.schedule import RectifiedFlow
from diffalign.sources import _rollouts
from diffalign.sources._rollouts import GROUP, Rollouts
from diffalign.sources._rounds import Place
from diffalign.sources._twin import StandIns
from diffalign.types import EndpointBatch, ScorerInfo, Setting, StepBatch, UserError

PROMPTS = ("a red thing", "a blue thing", "two things")
FAMILIES = ("sdxl", "sd3", "sd21")  # epsilon, flow, v
NAN = float("nan")


@dataclass(frozen=True)
class Bright:
    """The mean of a picture, times `sign`."""

    sign: float = 1.0
    info: ClassVar[ScorerInfo] = ScorerInfo("bright", "1", ("image",), "of 255", (0.0, 255.0))

    def score(self, images: list[Any], prompts: list[str]) -> list[float]:
        return [self.sign * float(np.asarray(image, dtype=np.float64).mean()) for image in images]


BRIGHT = {"name": "test_rollout:Bright", "as": "bright"}


@pytest.fixture(scope="module")
def models(tiny_folders, tmp_path_factory):
    """family -> a model whose adapter has an effect, loaded once."""
    folders = {**tiny_folders, "sd21": tmp_path_factory.mktemp("sd21") / "tiny"}
    sd15.build_tiny(folders["sd21"], prediction_type="v_prediction")
    loaded: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in loaded:
            name = "sd15" if family == "sd21" else family
            torch.manual_seed(0)
            model = build("model", {"name": name, "path": str(folders[family])}).load()
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


def settings(folder: Path, **more: Any) -> Setting:
    return Setting(seed=3, steps=8, batch_size=4, folder=folder, **more)


def sourced(folder: Path, cache: Path | str = "cache", prompts: tuple[str, ...] = PROMPTS, **fields: Any) -> Any:
    """A small rollout source; `sampling` is merged over a small default."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    sampling = {"num_steps": 3, "cfg_scale": 3.0, "batch_size": 4} | fields.pop("sampling", {})
    values = {
        "prompts": str(folder / "prompts.txt"),
        "scorers": [BRIGHT],
        "latents": "float32",
        "cache_dir": str(cache),
    }
    values |= {"prompts_per_round": 3, "steps_per_round": 2, "sampling": sampling}
    return build("source", {"name": "rollout", **values, **fields})


def adapter_off(model: Any) -> Any:
    return build("reference", {"name": "adapter_off"}).bind(model)


def maker_of(model: Any, folder: Path, cache: Path, reference: Any = None, **fields: Any) -> Rollouts:
    return sourced(folder, cache, **fields).prepare(model, reference or adapter_off(model), settings(folder)).maker


def made(maker: Rollouts, part: int = 0, round: int = 0, attempt: int = 0) -> Shard:
    path = Path(maker.setting.folder) / f"part-{part}-{round}-{attempt}.safetensors"
    tensors, counts = maker.make(Place(round, attempt, part))
    write_shard(path, tensors, counts)
    return Shard(path)


def everything(maker: Rollouts, shard: Shard) -> Any:
    """A batch of all units of a part."""
    units = maker.units(shard)
    return maker.collate([(shard, unit) for unit in units], torch.zeros(len(units), dtype=torch.int64))


def states(maker: Rollouts, shard: Shard) -> torch.Tensor:
    """[prompts, candidates, recorded states, ...]."""
    x = torch.from_numpy(np.array(shard.rows("x", 0, shard.num_rows("x"))))
    return x.reshape(shard.num_rows("id"), maker.source.images_per_prompt, -1, *x.shape[1:])


# What is recorded, on real networks


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_follow_each_other(family, models, tmp_path, cache):
    maker = maker_of(models(family), tmp_path, cache, record="steps", compare="groups")
    shard = made(maker)
    batch, num = everything(maker, shard), shard.num_rows("times")
    assert isinstance(batch, StepBatch) and len(batch) == shard.num_rows("id") * num
    x_prev, xt = (
        x.reshape(shard.num_rows("id"), num, *x.shape[1:]).squeeze(3) for x in (batch.x_prev, batch.xt)
    )  # [P R K ...]
    assert torch.equal(x_prev[:, :-1], xt[:, 1:])
    steps = grid(models(family).schedule, maker.recorder.sampler, 3, maker.recorder.eta)[:num]
    assert torch.equal(torch.stack([batch.t, batch.t_prev], 2).reshape(-1, num, 2)[0], torch.tensor(steps))
    assert len(set(batch.ids.tolist())) == len(batch)
    # a flow's last step adds noise as well, DDIM's does not: its picture lies one step further
    is_flow = isinstance(models(family).schedule, RectifiedFlow)
    assert states(maker, shard).shape[2] == (num + 1 if is_flow or num == 3 else num + 2)


@pytest.mark.parametrize("latents", ["float32", "float16"])
@pytest.mark.parametrize("record", ["steps", "trajectories"])
@pytest.mark.parametrize("family", FAMILIES)
def test_old_log_densities_are_the_likelihoods(family, record, latents, models, tmp_path, cache):
    """On the batch as it is drawn later: recomputing what was sampled changes nothing but the last digit."""
    model = models(family)
    maker = maker_of(model, tmp_path, cache, record=record, latents=latents)
    shard = made(maker)
    batch = everything(maker, shard)
    with torch.no_grad():
        found = build("likelihood", {"name": "step"})(model, adapter_off(model), batch)
    assert batch.logp_old.abs().max() > 0.1
    torch.testing.assert_close(found.logp, batch.logp_old, rtol=1e-5, atol=1e-5)
    assert (found.logp_ref - found.logp).abs().max() > 1e-3
    x = states(maker, shard)
    assert x.dtype == getattr(torch, latents)
    assert torch.equal(batch.xt, batch.xt.to(x.dtype).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_samples_with_guidance(family, models, tmp_path, cache):
    """Under autocast sampling and likelihood round differently only where their batches do."""
    model = models(family)
    source = sourced(tmp_path, cache, record="steps")
    low = torch.autocast("cpu", dtype=torch.bfloat16)
    maker = source.prepare(model, adapter_off(model), settings(tmp_path, autocast=lambda: low)).maker
    batch = everything(maker, made(maker))
    with torch.no_grad(), low:
        found = build("likelihood", {"name": "step"})(model, adapter_off(model), batch)
    assert found.logp.dtype == torch.float32
    torch.testing.assert_close(found.logp, batch.logp_old, rtol=0, atol=1e-2)


def test_guidance_of_one_asks_the_network_once(models, tmp_path, cache):
    model = models("sdxl")
    fields = {"record": "steps", "sampling": {"cfg_scale": 1.0}}
    maker = maker_of(model, tmp_path, cache, **fields)
    shard = made(maker)
    batch = everything(maker, shard)
    assert batch.uncond is None and shard.info["network_rows"] == 4 * 3
    with torch.no_grad():
        found = build("likelihood", {"name": "step"})(model, adapter_off(model), batch)
    torch.testing.assert_close(found.logp, batch.logp_old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_branches_share_what_they_are_told_to(family, models, tmp_path, cache):
    shared = {}
    for branch_at in (None, 0, 2):
        maker = maker_of(
            models(family), tmp_path / str(branch_at), cache, record="steps", branch_at=branch_at,
            sampling={"num_steps": 4},
        )  # fmt: skip
        shard = made(maker)
        x = states(maker, shard)
        same = [torch.equal(x[:, 0, i], x[:, 1, i]) for i in range(x.shape[2])]
        shared[branch_at] = sum(same)
        assert same == sorted(same, reverse=True)
        assert not torch.equal(x[0, 0, 0], x[1, 0, 0])  # prompts share nothing
        # steps in which the candidates do not differ teach nothing
        assert set(maker.units(shard)[:, 3]) == set(range(branch_at or 0, shard.num_rows("times")))
    assert shared == {None: 0, 0: 1, 2: 3}  # states: the first noise, and what the shared steps gave


@pytest.mark.parametrize("family", FAMILIES)
def test_only_noisy_steps_are_recorded(family, models, tmp_path, cache):
    model = models(family)
    sampling = {"num_steps": 4, "noisy": [0.25, 0.75], "cfg_scale": 1.0}
    maker = maker_of(model, tmp_path, cache, record="steps", sampling=sampling)
    shard = made(maker)
    steps = grid(model.schedule, maker.recorder.sampler, 4, maker.recorder.eta)
    assert np.array_equal(shard.rows("times", 0, 2), steps[1:3]) and shard.num_rows("times") == 2
    x = states(maker, shard)
    assert x.shape[2] == 4  # two steps, and the picture
    # from the last recorded state the ODE leads to the picture
    xt, places = x[:, :, 2].flatten(0, 1), torch.from_numpy(np.array(shard.rows("prompt", 0, 2)))
    cond = {name: value.repeat_interleave(2, dim=0) for name, value in maker.cond.cond(places).items()}
    t, s = (torch.full((4,), end) for end in steps[3])
    with torch.no_grad():
        pred = predict(model, xt, t, cond, None, 1.0)
    end, std = model.schedule.reverse_step(pred, xt, t, s, 0.0)
    assert not std.any()
    torch.testing.assert_close(x[:, :, 3].flatten(0, 1), end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_finished_images_go_to_the_elbo(family, models, tmp_path, cache):
    model = models(family)
    maker = maker_of(model, tmp_path, cache, images_per_prompt=4, compare="groups", utility="score")
    shard = made(maker)
    batch = everything(maker, shard)
    assert isinstance(batch, EndpointBatch) and batch.x0.shape[:2] == (1, 4)
    assert torch.equal(batch.x0, states(maker, shard)[:, :, -1])
    assert torch.equal(batch.scores["bright"], batch.utility) and batch.mask.all()
    with torch.no_grad():
        found = build("likelihood", {"name": "elbo"})(model, adapter_off(model), batch)
    assert found.logp.shape == (1, 4) and found.logp.isfinite().all() and (found.logp != found.logp_ref).all()


def test_scores_are_of_the_kept_latents(models, tmp_path, cache):
    model = models("sdxl")
    maker = maker_of(model, tmp_path, cache, latents="float16", keep_images=False)
    shard = made(maker)
    pixels = model.decode(states(maker, shard)[:, :, -1].flatten(0, 1).float())
    brightness = (pixels * 255).round().flatten(1).mean(dim=1)
    assert shard.rows("scores", 0, 4)[:, 0] == pytest.approx(brightness.numpy(), abs=1e-3)
    assert not list(tmp_path.rglob("*.png"))
    winner, loser = maker.units(shard)[0, 1:3]
    assert shard.rows("scores", 0, 2)[winner] > shard.rows("scores", 0, 2)[loser]


@pytest.mark.parametrize("record", ["images", "steps"])
def test_the_reference_is_sampled_from(record, models, tmp_path, cache):
    model = models("sdxl")

    def sampled(folder: str, **fields: Any) -> tuple[Rollouts, Shard]:
        maker = maker_of(model, tmp_path / folder, cache, record=record, **fields)
        return maker, made(maker)

    maker, shard = sampled("reference", sample_from="reference")
    with model.adapter_off():
        _, base = sampled("base")
    _, policy = sampled("policy")
    assert np.array_equal(shard.rows("x", 0, 4), base.rows("x", 0, 4))
    assert not np.array_equal(shard.rows("x", 0, 4), policy.rows("x", 0, 4))
    if record == "steps":  # the old weights are the reference's
        with torch.no_grad():
            batch = everything(maker, shard)
            found = build("likelihood", {"name": "step"})(model, adapter_off(model), batch)
        torch.testing.assert_close(found.logp_ref, batch.logp_old, rtol=1e-5, atol=1e-5)
    none = build("reference", {"name": "none"}).bind(model)
    with pytest.raises(UserError, match="source.sample_from=reference needs a reference"):
        maker_of(model, tmp_path, cache, none, sample_from="reference")


def test_both_are_sampled_from(models, tmp_path, cache):
    """The last image of a prompt is the reference's, the others are the policy's: each as if sampled alone."""
    x = {}
    for name in ("both", "policy", "reference"):
        maker = maker_of(models("sd3"), tmp_path / name, cache, sample_from=name, branch_at=0, sampling={"eta": 0.7})
        x[name] = states(maker, made(maker))
    torch.testing.assert_close(x["both"][:, 0], x["policy"][:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x["both"][:, 1], x["reference"][:, 1], rtol=1e-4, atol=1e-4)
    assert (x["policy"] - x["reference"]).abs().amax(dim=(2, 3, 4, 5)).min() > 1e-2


@pytest.mark.parametrize("record", ["steps", "trajectories"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_means_are_those_of_the_draws(record, family, models, tmp_path, cache):
    """Their densities are the recorded ones, and the normalised ratio of the weights that drew is 1."""
    model = models(family)
    maker = maker_of(model, tmp_path, cache, record=record, record_means=True, latents="float32")
    batch = everything(maker, made(maker))
    assert batch.mean_old.shape == batch.x_prev.shape
    likelihood = build("likelihood", {"name": "step", "ratio": "normalized"})
    with torch.no_grad():
        found = likelihood(model, adapter_off(model), batch)
    torch.testing.assert_close(found.logp, torch.zeros_like(found.logp), rtol=0, atol=1e-5)
    assert (found.logp_ref.abs() > 1e-4).any()


@pytest.mark.parametrize("record", ["steps", "trajectories"])
def test_recorded_references_are_the_references(record, models, tmp_path, cache):
    model = models("sdxl")
    maker = maker_of(model, tmp_path, cache, record=record, record_reference=True)
    shard = made(maker)
    batch = everything(maker, shard)
    measure, plain = build("likelihood", {"name": "step"}), dataclasses.replace(batch, pred_ref=None)
    with torch.no_grad():
        found, wanted = (measure(model, adapter_off(model), each) for each in (batch, plain))
    torch.testing.assert_close(found.logp_ref, wanted.logp_ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.kl, wanted.kl, rtol=1e-4, atol=1e-5)
    assert (found.kl > 0).all()
    assert shard.info["network_rows"] == 4 * 2 * (3 + shard.num_rows("times"))


def test_parts_do_not_depend_on_each_other(models, tmp_path, cache):
    """Whoever makes a part, and after whatever else, makes the same bytes."""
    first, second = (
        maker_of(models("sd3"), tmp_path / name, cache, record="steps", prompts_per_round=5) for name in ("1", "2")
    )
    assert first.num_parts == 3
    for part in (0, 1, 2):
        made(first, part)
    for part in (2, 0):
        made(second, part)
        name = f"part-{part}-0-0.safetensors"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_list_shorter_than_a_round_repeats_with_other_noise(models, tmp_path, cache):
    maker = maker_of(models("sdxl"), tmp_path, cache, prompts=PROMPTS[:2], prompts_per_round=5)
    shards = [made(maker, part) for part in range(3)]
    shards += [made(maker, 0, round=1), made(maker, 0, attempt=1)]
    prompts = [prompt for shard in shards[:3] for prompt in shard.rows("prompt", 0, shard.num_rows("prompt")).tolist()]
    assert len(prompts) == 5 and sorted(prompts[:2]) == sorted(prompts[2:4]) == [0, 1]
    ids = [number for shard in shards for number in shard.rows("id", 0, shard.num_rows("id")).tolist()]
    assert len(set(ids)) == len(ids)
    pictures = [state.numpy().tobytes() for shard in shards for state in states(maker, shard).flatten(0, 1)]
    assert len(set(pictures)) == len(pictures)


def test_every_prompt_has_its_turn(tmp_path):
    from diffalign.sources._sampled import prompts_of_part

    cond: Any = SimpleNamespace(prompts=[f"thing {n}" for n in range(7)])
    seen = []
    for round in range(3):
        for part in range(3):
            places, _ = prompts_of_part(Place(round, 0, part), cond, 3, 7, settings(tmp_path))
            again, _ = prompts_of_part(Place(round, 1, part), cond, 3, 7, settings(tmp_path))
            assert torch.equal(places, again)  # an attempt has the same prompts
            seen.append(places.tolist())
    assert [len(places) for places in seen] == [3, 3, 1] * 3
    epochs = [sum(seen[3 * round : 3 * round + 3], []) for round in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


def test_a_round_is_a_data_set_of_its_own(models, tmp_path, cache):
    scorers = [BRIGHT, BRIGHT | {"as": "dark", "sign": -0.25}]
    cheap = {"num_steps": 2, "cfg_scale": 1.0, "batch_size": 6}
    source = sourced(tmp_path, cache, scorers=scorers, images_per_prompt=3, prompts_per_round=3, sampling=cheap)
    rounds = source.prepare(models("sdxl"), adapter_off(models("sdxl")), settings(tmp_path))
    told = [rounds.refresh(0), rounds.refresh(2)]
    assert told[0]["rollout/images"] == 9 and told[0]["rollout/kept_prompts"] == 1
    assert told[0]["rollout/unjudged"] == 0 and told[0]["rollout/network_rows"] == 9 * 2
    assert told[0]["rollout/dark"] == pytest.approx(-0.25 * told[0]["rollout/bright"], rel=1e-5)
    for path, num in ((tmp_path / "rounds" / "round-00000" / "records", 3), (tmp_path / "rounds", 6)):
        reader = build("data", {"name": "auto", "path": str(path)})
        assert len(reader) == num
    record = reader[0]
    assert record.prompt in PROMPTS and len(record.images) == 3 and set(record.scores) == {"bright", "dark"}
    assert record.utility == pytest.approx(np.array(record.scores["bright"]) + np.array(record.scores["dark"]))
    pictures = list((tmp_path / "rounds" / "round-00000" / "images").glob("*.png"))
    assert len(pictures) == 9 and record.images[0] in {path.read_bytes() for path in pictures}
    facts = rounds.facts()
    assert facts["num_records"] == 3 and facts["scorers"]["dark"]["unit"] == "of 255"
    assert set(facts["sample_prompts"]) == set(PROMPTS)


# What is drawn, on parts made by hand


class Cond:
    """Conditioning that says which prompt it is of."""

    prompts = PROMPTS

    def cond(self, places: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"place": places.float()[:, None]}

    def uncond(self, num: int) -> dict[str, torch.Tensor]:
        return {"place": torch.full((num, 1), -1.0)}


def by_hand(folder: Path, **fields: Any) -> Rollouts:
    policy: Any = SimpleNamespace(schedule=RectifiedFlow())
    return Rollouts(sourced(folder, **fields), policy, None, Cond(), settings(folder))  # type: ignore[arg-type]


def part(maker: Rollouts, scores: Any, num_steps: int = 4, x: torch.Tensor | None = None) -> Shard:
    """A part with given scores [prompts, candidates(, scorers)] and random states."""
    values = torch.tensor(scores, dtype=torch.float32)
    values = values if values.dim() == 3 else values[..., None]
    num, k, _ = values.shape
    generator = torch.Generator().manual_seed(0)
    if x is None:
        x = torch.randn(num * k * (num_steps + 1), 2, 3, 3, generator=generator)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    tensors = {
        "x": x,
        "logp_old": torch.randn(num * k, num_steps, generator=generator),
        "times": torch.stack([times[:-1], times[1:]], dim=1),
        "scores": values.flatten(0, 1),
        "prompt": torch.arange(num) % 3,
        "id": 100 + torch.arange(num),
    }
    path = Path(maker.setting.folder) / "by-hand.safetensors"
    write_shard(path, tensors, {"images": num * k})
    return Shard(path)


def test_pairs_are_won_and_steps_are_records(tmp_path):
    maker = by_hand(tmp_path, record="steps", images_per_prompt=3)
    shard = part(maker, [[1, 3, 2], [2, 2, 2], [5, NAN, 4]])
    assert maker.units(shard).tolist() == [[0, 1, 0, step] for step in range(4)] + [
        [2, 0, 2, step] for step in range(4)
    ]
    batch = everything(maker, shard)
    x = states(maker, shard)
    assert torch.equal(batch.xt[1, :, 0], x[0, [1, 0], 1]) and torch.equal(batch.x_prev[1, :, 0], x[0, [1, 0], 2])
    assert torch.equal(batch.x_prev[7, :, 0], x[2, [0, 2], 4])
    assert batch.utility.tolist() == [[1, 0]] * 8 and batch.mask.all()
    assert batch.scores["bright"].tolist() == [[3, 1]] * 4 + [[5, 4]] * 4
    assert batch.cond["place"].flatten().tolist() == [0] * 4 + [2] * 4 and batch.uncond is not None
    old = np.array(shard.rows("logp_old", 0, 9))
    assert batch.logp_old[1].tolist() == pytest.approx(old[[1, 0], 1])


@pytest.mark.parametrize(
    "scores,margin,kept", [([[1, 2], [1, 1]], 0.0, [0]), ([[1, 2], [1, 3]], 1.0, [1]), ([[NAN, 1], [NAN, NAN]], 0, [])]
)
@pytest.mark.parametrize("compare", ["pairs", "groups"])
@pytest.mark.filterwarnings("error")
def test_what_teaches_nothing_is_left_out(compare, scores, margin, kept, tmp_path):
    maker = by_hand(tmp_path, compare=compare, min_margin=margin)
    shard = part(maker, scores)
    assert maker.units(shard)[:, 0].tolist() == kept
    told = maker.summary([shard], len(kept)) if kept else {"kept_prompts": 0.0}
    assert told["kept_prompts"] == len(kept) / 2


@pytest.mark.parametrize("utility", ["won", "score", "win-rate"])
@pytest.mark.parametrize("record", ["images", "steps", "trajectories"])
@pytest.mark.filterwarnings("error")
def test_groups_mask_what_nobody_judged(record, utility, tmp_path):
    maker = by_hand(tmp_path, compare="groups", images_per_prompt=4, record=record, utility=utility)
    shard = part(maker, [[-3, NAN, -1, -2]])
    batch = everything(maker, shard)
    assert maker.units(shard)[:, :3].tolist() == [[0, GROUP, GROUP]] * (4 if record == "steps" else 1)
    assert (batch.mask == torch.tensor([True, False, True, True])).all()
    wanted = [0, 0, 1, 0.5] if utility == "win-rate" else [-3, 0, -1, -2]
    assert batch.utility[0].tolist() == pytest.approx(wanted)
    assert batch.scores["bright"].isfinite().all()  # a NaN would survive a mask's multiplication


def test_a_trajectory_is_the_sum_of_its_steps(tmp_path):
    maker = by_hand(tmp_path, record="trajectories")
    shard = part(maker, [[1, 2]])
    assert maker.units(shard).tolist() == [[0, 1, 0, -1]]
    batch = everything(maker, shard)
    assert batch.xt.shape == (1, 2, 4, 2, 3, 3) and (batch.weight == 1).all()
    old = np.array(shard.rows("logp_old", 0, 2))
    assert batch.logp_old[0].tolist() == pytest.approx(old[[1, 0]].sum(axis=1), rel=1e-5)


def test_some_steps_of_a_trajectory_are_an_unbiased_sum(tmp_path):
    maker = by_hand(tmp_path, record="trajectories", steps_used=3)
    num = 600
    shard = part(maker, [[1, 2]] * num, num_steps=5)
    batch = everything(maker, shard)
    assert batch.t.shape == (num, 3) and torch.allclose(batch.weight, torch.tensor(5 / 3))
    assert (batch.t[:, :-1] > batch.t[:, 1:]).all()  # in order, none twice
    counts = Counter(round(float(t), 4) for t in batch.t.flatten())
    expected, spread = num * 3 / 5, math.sqrt(num * 3 / 5 * 2 / 5)
    assert len(counts) == 5 and all(abs(count - expected) < 4 * spread for count in counts.values())
    whole = np.array(shard.rows("logp_old", 0, 2 * num)).reshape(num, 2, 5)[:, ::-1].sum(axis=2)
    error = batch.logp_old.numpy() - whole
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(error.size) and error.std() > 0.1
    assert torch.equal(everything(maker, shard).t, batch.t)  # addressed


def test_some_steps_as_records(tmp_path):
    maker = by_hand(tmp_path, record="steps", steps_used=2, images_per_prompt=3, pairs="all")
    shard = part(maker, [[1, 2, 3]] * 40, num_steps=5)
    units = maker.units(shard)
    assert len(units) == 40 * 3 * 2 and np.array_equal(units, maker.units(shard))
    chosen = [tuple(steps) for steps in units[:, 3].reshape(-1, 2).tolist()]
    assert all(low < high for low, high in chosen) and len(set(chosen)) == 10  # every subset of five occurs
    assert (everything(maker, shard).weight == 1).all()
    more = by_hand(tmp_path, record="steps", steps_used=9)
    assert more.units(part(more, [[1, 2]], num_steps=5))[:, 3].tolist() == list(range(5))


def test_steps_used_come_after_the_shared_ones(tmp_path):
    maker = by_hand(tmp_path, record="steps", steps_used=1, branch_at=2, sampling={"num_steps": 5})
    steps = maker.units(part(maker, [[1, 2]] * 40, num_steps=5))[:, 3]
    assert set(steps.tolist()) == {2, 3, 4}


def test_cosine_weights_of_steps():
    """TreePO's omega = 1 + cos; over its sum it makes a mean of the steps."""
    first, second = torch.tensor([[1.0, 0, 1], [0, 1, 1]]), torch.tensor([[2.0, 2, 2], [2, 2, 2]])
    x_prev = torch.stack([first, second], dim=1)[..., None, None]  # [K S C h w]
    found = _rollouts._cosine_weights(x_prev, best=0)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [1.5 / 3.5, 2 / 3.5]]))
    alone = _rollouts._cosine_weights(x_prev[:, :1], best=0)
    assert (alone == 1).all()


def test_cosine_follows_the_best_that_was_judged(tmp_path):
    """Scores below 0 and a candidate without one: it must not stand as the best."""
    x = torch.randn(3 * 3, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    options = {"record": "trajectories", "compare": "groups", "images_per_prompt": 3, "step_weight": "cosine"}
    maker = by_hand(tmp_path, **options)
    batch = everything(maker, part(maker, [[NAN, -2, -1]], num_steps=2, x=x))
    wanted = _rollouts._cosine_weights(x.reshape(3, 3, 2, 3, 3)[:, 1:], best=2)
    torch.testing.assert_close(batch.weight[0], wanted)
    torch.testing.assert_close(batch.weight.sum(dim=2), torch.ones(1, 3))
    torch.testing.assert_close(batch.weight[0, 2], torch.tensor([0.5, 0.5]))
    old = np.array(part(maker, [[NAN, -2, -1]], num_steps=2, x=x).rows("logp_old", 0, 3))
    torch.testing.assert_close(batch.logp_old[0], (wanted * torch.from_numpy(old)).sum(dim=1))


@dataclass(frozen=True)
class Compares:
    """A general preference of brighter pictures, up to a turn."""

    info: ClassVar[ScorerInfo] = ScorerInfo("compares", "1", ("image", "prompt"), "none", (0.0, 1.0))
    dim: ClassVar[int] = 2

    def represent(self, images: list[Any], prompts: list[str]) -> torch.Tensor:
        turns = torch.tensor([float(np.asarray(image, dtype=np.float64).mean()) for image in images])
        return torch.stack([turns.cos(), turns.sin()], dim=1)

    @staticmethod
    def win_table(v: torch.Tensor) -> np.ndarray:
        return torch.sigmoid(v[:, None, 0] * v[None, :, 1] - v[:, None, 1] * v[None, :, 0]).numpy()


def test_a_general_preference_judges_rounds(models, cache, tmp_path):
    """Its win rates are the utilities; the recorded columns are the pictures' embeddings."""
    judged = {"scorers": [{"name": "test_rollout:Compares", "as": "it"}], "prefer": "pairwise", "images_per_prompt": 3}
    maker = maker_of(models("sdxl"), tmp_path, cache, compare="groups", utility="win-rate", **judged)
    shard = made(maker)
    batch = everything(maker, shard)
    scores = torch.from_numpy(np.array(shard.rows("scores", 0, shard.num_rows("scores")))).reshape(-1, 3, 2)
    for row, v in zip(batch.utility, scores, strict=True):
        assert row.tolist() == pytest.approx(((Compares.win_table(v).sum(axis=1) - 0.5) / 2).tolist(), abs=1e-6)
        assert len(set(row.tolist())) == 3 and float(row.sum()) == pytest.approx(1.5)
    assert set(batch.scores) == {"it_0", "it_1"} and "it_0" not in maker.summary([shard], 1)
    pairs = maker_of(models("sdxl"), tmp_path, cache, pairs="all", **judged)
    assert len(pairs.units(shard)) == 3
    twin = maker.source.twin(StandIns(str(cache), {}, str(tmp_path / "prompts.txt"), "test_rollout:Bright"))
    assert twin.judge.prefer == "sum" and twin.judge.names == ["test_rollout:Bright"]


@pytest.mark.filterwarnings("error")
def test_win_rates():
    values = np.array([1.0, 2.0, 2.0])
    assert _rollouts._win_rates(values, None) == pytest.approx([0, 0.75, 0.75])
    half = 1 / (1 + math.exp(-0.5))
    assert _rollouts._win_rates(values, 2.0) == pytest.approx([1 - half, (half + 0.5) / 2, (half + 0.5) / 2])
    assert _rollouts._win_rates(np.array([0.0, 1e6]), 1e-3) == pytest.approx([0, 1])
    with_nan = _rollouts._win_rates(np.array([1.0, NAN, 2.0]), None)
    assert with_nan[[0, 2]] == pytest.approx([0, 1]) and np.isnan(with_nan[1])
    assert np.isnan(_rollouts._win_rates(np.array([NAN, NAN]), 1.0)).all()


def test_win_rates_of_a_pair_count_the_prompts_other_images(tmp_path):
    maker = by_hand(tmp_path, utility="win-rate", images_per_prompt=4)
    batch = everything(maker, part(maker, [[1, 4, 3, 4]]))
    assert batch.utility[0].tolist() == pytest.approx([2.5 / 3, 0])


def test_rejection_leaves_the_tilted_distribution(tmp_path):
    """Draws of a finite set, kept with probability exp((R - best)/T), are distributed as base x exp(R/T)."""
    base, reward, temperature = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.5, 1.0, 1.5]), 0.8
    maker = by_hand(tmp_path, reject=temperature, images_per_prompt=64)
    rng, kept = np.random.default_rng(0), np.zeros(4)
    for prompt in range(400):
        drawn = rng.choice(4, size=64, p=base)  # 64: the best one is nearly always among them
        scores = maker._accepted(prompt, reward[drawn, None].astype(np.float32))[:, 0]
        kept += np.bincount(drawn[np.isfinite(scores)], minlength=4)
        assert np.isfinite(scores[drawn == drawn.max()]).all()  # the best of a prompt always stays
    tilted = base * np.exp(reward / temperature)
    tilted /= tilted.sum()
    spread = np.sqrt(tilted * (1 - tilted) / kept.sum())
    assert (np.abs(kept / kept.sum() - tilted) < 4 * spread).all()


def test_rejected_candidates_make_no_pair_and_no_group_member(tmp_path):
    scores = [[0.0, 8.0, 9.0, NAN]] * 12
    for compare in ("pairs", "groups"):
        maker = by_hand(tmp_path, compare=compare, reject=1.0, images_per_prompt=4, pairs="all")
        shard = part(maker, scores)
        units = maker.units(shard)
        assert np.array_equal(units, maker.units(shard))
        batch = everything(maker, shard)
        if compare == "pairs":
            assert {(winner, loser) for winner, loser in units[:, 1:3].tolist()} == {(2, 1)} and batch.mask.all()
            assert 0 < len(units) < 12  # kept with probability exp(-1)
        else:
            assert (batch.mask == torch.tensor([False, True, True, False])).all() and 0 < len(units) < 12
    maker = by_hand(tmp_path, reject=1.0)
    assert maker.units(part(maker, [[NAN, NAN]])).shape == (0, 4)


# Settings


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"images_per_prompt": 1}, "source.images_per_prompt must be at least 2"),
        ({"prompts_per_round": 0}, "source.prompts_per_round must be at least 1"),
        ({"steps_per_round": 0}, "source.steps_per_round must be at least 1"),
        ({"reject": 0}, "source.reject must be positive"),
        ({"temperature": -1}, "source.temperature must be positive"),
        ({"scorer_timeout": 0}, "source.scorer_timeout must be positive"),
        ({"min_margin": -1}, "source.min_margin must be at least 0"),
        ({"steps_used": 2}, "source.steps_used is of recorded steps"),
        ({"step_weight": "cosine"}, "source.step_weight is of recorded steps"),
        ({"record": "steps", "steps_used": 0}, "source.steps_used must be at least 1"),
        ({"record": "steps", "branch_at": 3}, r"source.branch_at must lie in 0..num_steps-1 \(got 3\)"),
        ({"branch_at": 0}, "source.branch_at makes all images of a prompt the same"),
        ({"record": "steps", "sampling": {"eta": 0}}, "source.sampling.eta=0 draws nothing"),
        ({"sampling": {"noisy": [0.5, 0.5]}}, "source.sampling.noisy must be two numbers"),
        ({"sampling": {"batch_size": 0}}, "source.sampling.batch_size must be at least 1"),
        ({"sampling": {"num_step": 3}}, "Did you mean 'num_steps'"),
        ({"record": "latents"}, "source.record"),
    ],
)
def test_bad_settings_are_one_line(fields, match, tmp_path):
    with pytest.raises(UserError, match=match) as error:
        sourced(tmp_path, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": {"noisy": [0.7, 1.0]}},  # DDIM's last step of three adds none
        {"sampling": {"noisy": [0.0, 0.3]}, "branch_at": 1},  # nothing is left to differ by
        {"sampling": {"noisy": [0.0, 0.3], "eta": 0.5}, "branch_at": 1, "record": "images"},
    ],
)
def test_steps_that_draw_nothing_are_refused_before_anything_is_sampled(fields, tmp_path):
    policy: Any = SimpleNamespace(schedule=schedule())
    with pytest.raises(UserError, match="source.sampling draws nothing"):
        Rollouts(sourced(tmp_path, **{"record": "steps"} | fields), policy, None, Cond(), settings(tmp_path))  # type: ignore


def schedule() -> Any:
    from diffalign.schedule import schedule_from_config

    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return schedule_from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, **betas})


def test_sampling_that_does_not_fit_the_model_is_refused(tmp_path):
    policy: Any = SimpleNamespace(schedule=schedule())
    for sampling, match in (({"eta": 1.5}, "eta=1.5"), ({"num_steps": 2000}, "num_steps=2000")):
        with pytest.raises(UserError, match=match):
            Rollouts(sourced(tmp_path, record="steps", sampling=sampling), policy, None, Cond(), settings(tmp_path))  # type: ignore


def test_what_it_gives_and_makes(tmp_path):
    for fields, gives, makes in (
        ({}, {"scores", "pair"}, "images"),
        ({"compare": "groups", "record": "steps", "images_per_prompt": 3}, {"scores", "list"}, "steps"),
        ({"compare": "groups"}, {"scores", "pair", "list"}, "images"),
        ({"record": "trajectories"}, {"scores", "pair"}, "steps"),
    ):
        source = sourced(tmp_path, **fields)
        assert source.gives == gives and source.makes == makes and source.encoders == "decoder"


def test_prompts_and_scorers_are_checked_at_once(tmp_path):
    with pytest.raises(UserError, match="source.prompts: no such file"):
        dataclasses.replace(sourced(tmp_path), prompts=str(tmp_path / "none.txt")).check()
    with pytest.raises(UserError, match="source.prompts is missing"):
        dataclasses.replace(sourced(tmp_path), prompts=None).check()
    with pytest.raises(UserError, match="unknown scorer"):
        dataclasses.replace(sourced(tmp_path), scorers=("sprites_glod",)).check()
    assert read_prompts("sprites:train:3", "source.prompts") and sourced(tmp_path).check() is None


def test_users_are_refused(models, tmp_path, cache):
    model: Any = SimpleNamespace(users=object())
    with pytest.raises(UserError, match="leave model.users empty"):
        sourced(tmp_path, cache).prepare(model, None, settings(tmp_path))
