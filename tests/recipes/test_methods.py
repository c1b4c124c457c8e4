"""Every shipped method takes a real step on a tiny twin; methods that do not fit the data are refused at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from makers import pickapic, picture, tokens

from diffalign.config import config_names, resolve
from diffalign.data import RecordWriter
from diffalign.recipes._baseline import RunningBaseline
from diffalign.recipes._fit import check_data, check_needs
from diffalign.recipes.check import twin_step
from diffalign.recipes.train import set_up, train_step
from diffalign.types import EndpointBatch, Record, UserError

REFERENCE_FREE = {"simpo", "cpo", "orpo", "asft", "mapo", "mapo-paper", "triple"}
OF_THREE = {"near-miss", "triple"}  # candidates per record
METHODS = config_names("methods")
SAMPLING = [name for name in METHODS if resolve(["sdxl", name]).names["source"] != "offline"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    pickapic(root / "pairs.parquet")
    return root


@pytest.fixture(scope="module")
def trainer(folder):
    made = set_up(resolve(tokens("sdxl", folder, "run", train__warmup_steps=0)))
    for name, value in made.parameters.items():  # away from the reference, where some gradients vanish
        torch.manual_seed(len(name))
        value.data.add_(0.02 * torch.randn_like(value))
    made.optimizer.param_groups[0]["lr"] = 0.0
    return made


def config_of(method: str, folder: Path):
    return resolve([*tokens("sdxl", folder, "run", train__lr=0.0, train__warmup_steps=0), method])


def with_a_third(batch: EndpointBatch) -> EndpointBatch:
    """The first image again under the second's prompt: what near-miss and triple look at."""

    def longer(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values[:, :1]], dim=1)

    cond = {key: torch.cat([value, value.flip(0)[:, :1]], dim=1) for key, value in batch.cond.items()}
    utility, mask = longer(batch.utility), longer(batch.mask)
    return replace(batch, x0=longer(batch.x0), cond=cond, utility=utility, mask=mask, scores={})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SAMPLING])
def test_one_step_of(method, trainer, folder, monkeypatch):
    config = config_of(method, folder)
    if method in REFERENCE_FREE:
        assert "reference" not in config.objective.needs and config.names["reference"] == "none"

        def refuse():
            raise AssertionError("a reference-free method called the reference")

        monkeypatch.setattr(trainer.model, "adapter_off", refuse)
    baseline = RunningBaseline(config.objective)
    of_method = replace(trainer, config=config, reference=config.reference.bind(trainer.model), baseline=baseline)
    batch = trainer.batches.batch(0)
    scalars = train_step(of_method, with_a_third(batch) if method in OF_THREE else batch, 0)
    assert scalars["grad_norm"] > 0 and torch.isfinite(torch.tensor(scalars["loss"]))


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
@pytest.mark.parametrize("method", SAMPLING)
def test_one_round_and_step_of(method, model):
    """What samples while it trains: a round on the twin, judged, and a step from the base, where no margin is yet."""
    config = resolve([model, method, "train.device=cpu", "train.warmup_steps=0"])
    check_needs(config)
    if method == "reward-po":
        config = replace(config, source=replace(config.source, scorers=("sprites_gold",)))
    scalars = twin_step(config)
    assert scalars["grad_norm"] > 0 and torch.isfinite(torch.tensor(scalars["loss"]))
    assert scalars.get("margin", 0.0) == pytest.approx(0.0, abs=1e-4)  # float16 latents are rounded as they are drawn


def records(path: Path, utility: tuple[float, ...], **extra) -> Path:
    with RecordWriter(path) as writer:
        for index in range(4):
            images = tuple(picture(10 * index + k, 60.0 * (k + 1)) for k in range(len(utility)))
            writer.write(Record(index, f"prompt {index}", images, utility, **extra))
    return path


@pytest.mark.parametrize(
    "utility,method,message",
    [
        ((3.0, 2.0, 1.0), "diffusion-dpo", "compares pairs and the data has records of 3 images"),
        ((1.0,), "rankdpo", "ranks images and every record has one"),
        ((0.5, 0.5), "simpo", "none of the first 4 records has one"),
    ],
)
def test_a_method_that_does_not_fit_is_refused(utility, method, message, tmp_path):
    path = records(tmp_path / "data", utility)
    with pytest.raises(UserError, match=message):
        check_data(resolve(["sdxl", method, f"source.data.path={path}", "source.data.ties=keep"]))


def test_lists_single_images_and_scorer_margins_fit(tmp_path):
    three = records(tmp_path / "lists", (3.0, 2.0, 1.0))
    one = records(tmp_path / "single", (1.0,))
    scored = records(tmp_path / "scored", (1.0, 0.0), scores={"judge": (0.3, 0.1)})
    check_data(resolve(["sdxl", "rankdpo", f"source.data.path={three}"]))
    check_data(resolve(["sdxl", "kto", f"source.data.path={one}"]))
    with pytest.raises(UserError, match="draws single images and the data has records of 3"):
        check_data(resolve(["sdxl", "kto", f"source.data.path={three}", "source.desirable_share=0.8"]))
    modpo = ["sdxl", "diffusion-dpo", f"source.data.path={scored}"]
    check_data(resolve([*modpo, "objective.score_weights={judge: 0.5}"]))
    with pytest.raises(UserError, match="names 'jury', but a record has scores of judge"):
        check_data(resolve([*modpo, "objective.score_weights={jury: 0.5}"]))


@pytest.mark.parametrize(
    "words,match",
    [
        (["sparse-po", "likelihood.maps=false"], "likelihood.maps=true"),
        (["sparse-po", "objective.mask=data"], "source.masks"),
    ],
)
def test_masks_are_asked_for_before_any_weight_is_loaded(words, match):
    with pytest.raises(UserError, match=match):
        check_needs(resolve(["sdxl", *words]))
    check_needs(resolve(["sdxl", "sparse-po", "objective.mask=data", "source.masks=somewhere"]))
