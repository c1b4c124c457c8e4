"""The demo's loop, small: every stage on the embedded models, the report at its end, and nothing done twice."""

from __future__ import annotations

import json

import pytest

from diffalign import api

SMALL = {
    "generate": {"prompts": "sprites:train:8:two", "images_per_prompt": 3},
    "sampling": {"num_steps": 4, "batch_size": 8},
    "train": {
        "steps": 2,
        "batch_size": 4,
        "warmup_steps": 0,
        "validate_every": 2,
        "checkpoint_every": 1,
        "sample_every": 0,
    },
    "evaluate": {"prompts": "sprites:heldout:4:two", "seeds": 1},
    "log": {"trackers": []},
}


@pytest.mark.parametrize("model", ["sprites-sdxl", "sprites-sd3"])
def test_the_whole_loop(model, tmp_path):
    result = api.demo(model=model, out=str(tmp_path / "demo"), quiet=True, **SMALL)
    assert result.report.is_file()
    results = json.loads((result.report.parent / "results.json").read_text())
    assert results["headline"]
    (row,) = [r for r in result.comparison.rows if (r.model, r.scorer, r.category) == ("aligned", "sprites_gold", None)]
    assert row.win is not None and row.win.low <= row.win.rate <= row.win.high
    losses = (tmp_path / "demo" / "train" / "metrics.jsonl").read_text()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*.png")}
    again = api.demo(model=model, out=str(tmp_path / "demo"), quiet=True, **SMALL)
    assert again.comparison == result.comparison
    assert (tmp_path / "demo" / "train" / "metrics.jsonl").read_text() == losses
    assert all(path.stat().st_mtime_ns == made[path] for path in made if "images" in path.parts)
