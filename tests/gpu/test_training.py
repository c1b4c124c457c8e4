"""What only a GPU can show: every precision and fused attention kernel starts at ln 2 with margin 0, and learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from makers import pickapic, tokens

from diffalign.config import resolve
from diffalign.metrics import read_metrics
from diffalign.recipes.train import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize(
    "precision,dtype", [("fp32", "float32"), ("bf16", "bfloat16"), ("bf16", "float32"), ("fp16", "float16")]
)
@pytest.mark.parametrize("attention", ["auto", "math", "sdpa"])
def test_starts_at_ln_2(family: str, precision: str, dtype: str, attention: str, tmp_path: Path):
    pickapic(tmp_path / "pairs.parquet")
    overrides = {
        "train__device": "cuda",
        "train__precision": precision,
        "model__dtype": dtype,
        "model__attention": attention,
        "train__steps": 3,
    }
    train(resolve(tokens(family, tmp_path, **overrides)), quiet=True)
    first, *_ = read_metrics(tmp_path / "run")
    assert first["margin"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
