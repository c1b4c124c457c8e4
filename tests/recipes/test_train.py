"""Training runs on tiny twins: start, resume, accumulation, caching, export, refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from makers import pickapic, tokens

from diffalign.config import resolve
from diffalign.metrics import read_metrics
from diffalign.recipes.train import set_up, train, train_step
from diffalign.types import UserError

FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("train")
    pickapic(root / "pairs.parquet")
    return root


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def go(model: str, folder: Path, out: str, **overrides: object) -> list[float]:
    train(resolve(tokens(model, folder, out, **overrides)), quiet=True)
    return losses(folder / out)


@pytest.fixture(scope="module")
def sdxl_run(folder: Path) -> Path:
    go("sdxl", folder, "sdxl-run")
    return folder / "sdxl-run"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_starts_at_ln_2_with_margin_zero(family, precision, folder):
    run = f"start-{family}-{precision}"
    go(family, folder, run, train__precision=precision, train__steps=2)
    first, second = read_metrics(folder / run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == 0 and first["winner_error_gap"] == 0 and first["loser_error_gap"] == 0
    assert first["grad_norm"] > 0
    assert second["margin"] != 0  # and then something is trained
    assert second["holdout/num_prompts"] > 0


def test_gradients_below_adams_epsilon_are_told(folder, capsys):
    """A run whose beta is so small that the optimizer hears nothing of it; a lower epsilon hears it again."""
    settings = {"train__steps": 10, "train__validate_every": 0, "objective__beta": 1e-4}
    config = tokens("sdxl", folder, "deaf", **settings)
    train(resolve(config), quiet=True)  # a warning is said even then
    told = capsys.readouterr().err
    assert "Adam's epsilon 1e-08 takes" in told and "or lower train.adam_eps" in told
    assert read_metrics(folder / "deaf")[9]["adam_damping"] > 0.1
    train(resolve(tokens("sdxl", folder, "hears", train__adam_eps=1e-20, **settings)))
    assert "epsilon" not in capsys.readouterr().err
    assert read_metrics(folder / "hears")[9]["adam_damping"] < 0.01
    with pytest.raises(UserError, match="train.adam_eps must be positive"):
        resolve(tokens("sdxl", folder, "none", train__adam_eps=0.0))


@pytest.mark.parametrize("attention", ["math", "sdpa"])
def test_starts_at_ln_2_with_every_attention_of_this_machine(attention, folder):
    go("sdxl", folder, f"attention-{attention}", model__attention=attention, train__steps=1)
    (row,) = read_metrics(folder / f"attention-{attention}")
    assert row["margin"] == 0


def test_full_weights_start_at_ln_2_and_export_a_pipeline(folder):
    from diffusers import StableDiffusionXLPipeline

    overrides = {"model__trainable": "full", "reference__name": "frozen", "train__lr": 1e-4, "train__ema": 0.5}
    go("sdxl", folder, "full", **overrides)
    assert read_metrics(folder / "full")[0]["margin"] == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "full" / "export")
    base = resolve(tokens("sdxl", folder)).model.load().network
    changed = [not torch.equal(a, b) for a, b in zip(pipeline.unet.parameters(), base.parameters(), strict=False)]
    assert any(changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_one_draw_lower_its_loss(family, folder):
    """The whole chain's sign: cache, likelihood, reference, objective, backward, optimizer."""
    words = tokens(family, folder, f"learn-{family}", objective__beta=500, train__warmup_steps=0)
    trainer = set_up(resolve(words))
    batch = trainer.batches.batch(0)
    rows = [train_step(trainer, batch, step=0) for _ in range(8)]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rows[-1]["loss"] < 0.65 and rows[-1]["implicit_accuracy"] == 1 and rows[-1]["margin"] > 0
    assert rows[-1]["winner_error_gap"] < rows[-1]["loser_error_gap"]


def test_metrics_say_what_users_look_for(sdxl_run):
    row = read_metrics(sdxl_run)[-1]
    wanted = {
        "loss",
        "margin",
        "implicit_accuracy",
        "winner_error_gap",
        "loser_error_gap",
        "grad_norm",
        "lr",
        "tie_rate",
    }
    assert wanted <= set(row)
    assert any(key.startswith("margin/t") for key in row)


def test_run_folder_tells_the_run(sdxl_run):
    facts = json.loads((sdxl_run / "run.json").read_text())
    assert facts["data"]["fingerprint"] and facts["versions"]["torch"] and facts["precision"] == "fp32"
    assert resolve([str(sdxl_run / "config.yaml")]).train.steps == 4
    check = json.loads((sdxl_run / "export_check.json").read_text())
    assert check["problems"] == [] and check["image_max_difference"] > 0 and check["norm"] > 0
    assert check["num_targets_covered"] == check["num_targets"] and check["num_tensors"] == 2 * check["num_targets"]
    assert list((sdxl_run / "samples").glob("step-*.png"))


def test_rotation_keeps_the_newest_checkpoints(sdxl_run):
    assert [path.name for path in sorted((sdxl_run / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]


def test_exported_lora_loads_in_plain_diffusers(sdxl_run, folder):
    from diffusers import StableDiffusionXLPipeline

    model = resolve(tokens("sdxl", folder)).model
    base = model.family.build_tiny(folder / "plain")
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        out = pipeline("a thing", num_inference_steps=2, generator=generator, output_type="pt")
        return out.images

    before = image()
    pipeline.load_lora_weights(sdxl_run / "export")
    assert not torch.equal(image(), before)


# Kernels round differently for other batch shapes, by about 1e-7 of an error near 1, and beta / 2 multiplies that:
# at beta 20 equality to 1e-6 is a statement about the code, at 5000 about float32.
GENTLE = {"objective__beta": 20, "train__lr": 1e-3}


def assert_same_and_moving(found: list[float], expected: list[float]) -> None:
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 1e-4  # a run that stands still would prove nothing


@pytest.fixture(scope="module")
def gentle_losses(folder: Path) -> list[float]:
    return go("sdxl", folder, "acc-1x8", train__batch_size=8, **GENTLE)


def test_accumulation_equals_one_large_batch(folder, gentle_losses):
    parts = go("sdxl", folder, "acc-8x1", train__batch_size=8, train__micro_batch_size=1, **GENTLE)
    assert_same_and_moving(parts, gentle_losses)


def test_cached_and_freshly_encoded_give_the_same_loss(folder, gentle_losses):
    fresh = go("sdxl", folder, "fresh", source__cache="false", train__batch_size=8, **GENTLE)
    assert_same_and_moving(fresh, gentle_losses)


def test_resume_goes_on_bit_for_bit(folder, sdxl_run):
    """A run cut off after its second checkpoint: the rest of its losses equal the uninterrupted run's."""
    shutil.copytree(sdxl_run, folder / "cut")
    cut = folder / "cut"
    for name in ("step-00000004",):
        shutil.rmtree(cut / "checkpoints" / name)
    shutil.rmtree(cut / "export")
    (cut / "export_check.json").unlink()
    go("sdxl", folder, "cut")
    assert losses(cut) == losses(sdxl_run)
    assert (cut / "export_check.json").is_file()


def test_a_finished_run_does_nothing_more(folder, sdxl_run):
    before = (sdxl_run / "metrics.jsonl").read_bytes()
    go("sdxl", folder, "sdxl-run")
    assert (sdxl_run / "metrics.jsonl").read_bytes() == before


def test_another_config_never_overwrites(folder, sdxl_run):
    before = {path: path.read_bytes() for path in sdxl_run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"different config \(train.lr"):
        go("sdxl", folder, "sdxl-run", train__lr=2e-3)
    assert {path: path.read_bytes() for path in sdxl_run.rglob("*") if path.is_file()} == before


def test_a_foreign_folder_is_left_alone(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        go("sdxl", folder, "mine")
    assert [path.name for path in (folder / "mine").iterdir()] == ["thesis.txt"]


def test_changed_data_is_noticed(folder, tmp_path):
    pickapic(tmp_path / "pairs.parquet")
    go("sdxl", tmp_path, "run", train__steps=1)
    pickapic(tmp_path / "pairs.parquet", num=26)
    with pytest.raises(UserError, match="the data changed"):
        go("sdxl", tmp_path, "run", train__steps=1)


def test_a_broken_checkpoint_is_named(folder, sdxl_run):
    shutil.copytree(sdxl_run, folder / "broken")
    (folder / "broken" / "checkpoints" / "step-00000004" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="step-00000004 is incomplete or broken"):
        go("sdxl", folder, "broken")


def test_ties_are_dropped_or_half_a_win(tmp_path):
    pickapic(tmp_path / "pairs.parquet", labels=(1.0, 0.5, 0.0, 0.5))
    go("sdxl", tmp_path, "dropped", train__steps=1)
    assert json.loads((tmp_path / "dropped" / "run.json").read_text())["data"]["report"]["dropped"]["tie"] == 12
    go("sdxl", tmp_path, "kept", train__steps=3, source__data__ties="keep")
    assert sum(row["tie_rate"] for row in read_metrics(tmp_path / "kept")) > 0


@pytest.mark.parametrize(
    "overrides,match",
    [
        ({"train__batch_size": 4, "train__micro_batch_size": 3}, "micro_batch_size=3 does not divide"),
        ({"model__trainable": "full"}, "reference.name=frozen"),
        ({"reference__name": "none"}, "reference.name=adapter_off"),
        ({"train__precision": "fp16"}, "fp16 needs a GPU"),
        ({"source__data__path": "/nowhere/pairs.parquet"}, "/nowhere/pairs.parquet"),
        ({"source__data__tis": "keep"}, "Did you mean 'ties'"),
        ({"train__optimizer": "adam"}, "train.optimizer"),
        ({"train__stepps": 3}, "Did you mean 'steps'"),
        ({"model__path": "/nowhere"}, "no such folder"),
        ({"log__trackers": "[wandb]"}, r"diffalign\[track\]"),
    ],
)
def test_wrong_input_is_one_clear_line_and_writes_no_run(overrides, match, folder):
    with pytest.raises(UserError, match=match) as caught:
        go("sdxl", folder, "refused", **overrides)
    assert "\n" not in str(caught.value)
    assert not (folder / "refused" / "checkpoints").exists()
    shutil.rmtree(folder / "refused", ignore_errors=True)


def test_learning_rate_schedules():
    from diffalign.config import Train
    from diffalign.recipes._optim import learning_rate

    linear = Train(lr=1.0, steps=10, warmup_steps=2, lr_schedule="linear")
    assert [learning_rate(linear, step) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = Train(lr=1.0, steps=10, warmup_steps=0, lr_schedule="cosine")
    assert learning_rate(cosine, 5) == pytest.approx(0.5)
    assert learning_rate(Train(lr=1.0, steps=10), 9) == 1.0


def test_ema_is_the_running_average_and_swaps_back():
    from diffalign.recipes._optim import Ema

    weight = torch.zeros(3)
    ema = Ema(0.5, {"w": weight})
    for value in (1.0, 2.0):
        weight.fill_(value)
        ema.update()
    with ema.swapped_in():
        assert weight.tolist() == [1.25] * 3  # 0.5 (0.5 0 + 0.5 1) + 0.5 2
    assert weight.tolist() == [2.0] * 3
