"""The command line in processes of its own: exit codes, SIGKILL and resume, two processes, the verbs in a chain."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from makers import pickapic, run_cli, tokens

from diffalign.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    pickapic(root / "pairs.parquet")
    return root


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> Path:
    result = run_cli("train", *tokens("sdxl", folder, "whole", train__steps=12))
    assert result.returncode == 0, result.stderr
    assert "self-check: export covers" in result.stdout
    return folder / "whole"


@pytest.mark.slow
def test_sigkill_at_any_moment_then_the_same_command(folder, whole_run):
    """Killed three times, at whatever it is doing, the run ends with the uninterrupted run's losses, bit for bit."""
    words = tokens("sdxl", folder, "killed", train__steps=12)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    metrics = folder / "killed" / "metrics.jsonl"
    kills = 0
    for target in (2, 5, 9):
        process = subprocess.Popen(
            [sys.executable, "-m", "diffalign", "train", *words], env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not metrics.is_file() or metrics.read_bytes().count(b"\n") < target):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    result = run_cli("train", *words)
    assert result.returncode == 0, result.stderr
    assert losses(folder / "killed") == losses(whole_run)


@pytest.mark.slow
def test_two_processes_equal_one(folder, tiny_folders):
    # a folder, because transformers writes a twin's weights on the first process only
    gentle = {
        "model__path": tiny_folders["sdxl"],
        "objective__beta": 20,
        "train__lr": 1e-3,
        "train__steps": 4,
    }  # see test_train.GENTLE
    for name, processes in (("one", 1), ("two", 2)):
        result = run_cli("train", *tokens("sdxl", folder, name, **gentle), processes=processes)
        assert result.returncode == 0, result.stderr
    one = losses(folder / "one")
    assert losses(folder / "two") == pytest.approx(one, abs=1e-6)
    assert max(one) - min(one) > 1e-4


def test_user_errors_exit_with_2_in_one_line(folder):
    for words, expected in (
        (["train", "sdxk"], "Did you mean 'sdxl'"),
        (["train", *tokens("sdxl", folder, "x", objective__bta=3)], "objective.bta"),
        (["score", "score.images=/nowhere"], "/nowhere"),
    ):
        result = run_cli(*words)
        assert result.returncode == 2
        assert expected in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    assert "Traceback" in run_cli("train", "sdxk", "--debug").stderr


@pytest.mark.parametrize(
    "words", [["list", "methods"], ["list", "models"], ["list", "scorers"], ["list", "data"], ["doctor"]]
)
def test_information_verbs(words):
    result = run_cli(*words)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 2


def test_help_is_quick_and_loads_no_torch():
    code = "import sys, diffalign.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.slow
def test_generate_score_label_train_evaluate_export(tmp_path):
    """The loop by hand, on the embedded model; each verb again does nothing and changes nothing."""
    images, pairs, run = tmp_path / "images", tmp_path / "pairs", tmp_path / "run"
    quick = ["sampling.num_steps=3", "sampling.batch_size=16"]
    verbs = [
        ["generate", "sprites-sdxl", "generate.prompts=sprites:train:12", f"generate.out={images}", *quick],
        ["score", f"score.images={images}", "score.scorers=[sprites-gold, sprites-proxy]"],
        ["label", f"label.scores={images}/scores.jsonl", "label.scorer=sprites-proxy", f"label.out={pairs}"],
        [
            "train",
            "sprites-sdxl",
            "diffusion-dpo",
            f"source.data.path={pairs}",
            f"source.cache_dir={tmp_path / 'cache'}",
            f"train.out={run}",
            "train.steps=2",
            "train.batch_size=4",
            "train.lr=1e-3",
            *quick,
        ],
        [
            "evaluate",
            "sprites-sdxl",
            f"evaluate.adapters=[{run}/export]",
            "evaluate.prompts=sprites:heldout:6",
            f"evaluate.run={run}",
            f"evaluate.out={tmp_path / 'evaluation'}",
            *quick,
        ],
        ["export", f"export.run={run}", "export.format=kohya", f"export.out={tmp_path / 'webui'}"],
    ]
    for words in verbs:
        result = run_cli(*words)
        assert result.returncode == 0, (words, result.stderr)
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["comparison"]["num_prompts"] == 6
    assert (tmp_path / "evaluation" / "report.html").stat().st_size > 10_000
    assert list((tmp_path / "webui").glob("*.safetensors"))
    before = {path: path.read_bytes() for path in [*images.rglob("*.png"), *pairs.rglob("*.parquet")]}
    for words in verbs[:4]:
        assert run_cli(*words).returncode == 0
    assert {path: path.read_bytes() for path in [*images.rglob("*.png"), *pairs.rglob("*.parquet")]} == before


@pytest.mark.slow
def test_scoring_resumes_after_a_torn_line(tmp_path):
    images = tmp_path / "images"
    words = [
        "generate",
        "sprites-sdxl",
        "generate.prompts=sprites:train:4",
        f"generate.out={images}",
        "generate.images_per_prompt=1",
        "sampling.num_steps=2",
    ]
    assert run_cli(*words).returncode == 0
    assert run_cli("score", f"score.images={images}").returncode == 0
    scores = images / "scores.jsonl"
    whole = scores.read_bytes()
    scores.write_bytes(whole[: len(whole) // 2])
    assert run_cli("score", f"score.images={images}").returncode == 0
    assert scores.read_bytes() == whole
    shutil.rmtree(images / "00000")
    result = run_cli("score", f"score.images={images}", f"score.out={tmp_path / 'other.jsonl'}")
    assert result.returncode == 2 and "is no readable image" in result.stderr


@pytest.mark.slow
def test_check_says_what_a_run_will_take(folder):
    result = run_cli("check", *tokens("sdxl", folder, "checked"))
    assert result.returncode == 0, result.stderr
    for word in ("one step on the tiny twin: loss 0.693147", "memory on the", "time here", "24 records"):
        assert word in result.stdout
    assert not (folder / "checked").exists()
