"""The sprites world: scenes drawn from captions, an exact judge, and two tiny text-to-image models trained on them.

`scene` is the caption grammar, `render` draws, `judge` is the gold preference, `proxy` a biased stand-in for it,
`users` are simulated users with tastes, and `weights/` holds the embedded pipelines that `train` makes.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
MODELS = ("sdxl", "sd3")


def model_path(family: str) -> Path:
    """The folder of an embedded diffusers pipeline; `family` is "sdxl" or "sd3". Raises ValueError on other names."""
    if family not in MODELS:
        raise ValueError(f"no embedded sprites model {family!r}: choose one of {', '.join(MODELS)}")
    return WEIGHTS / family
