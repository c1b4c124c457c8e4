"""SPO's step-aware preference model: a CLIP scorer that is told the timestep of a preview; needs `path`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.scorers._clip import ClipScorer, Resize


@dataclass(frozen=True)
class StepAware(ClipScorer):
    """The model of arXiv 2406.04314, section 3.2, as `diffalign train-scorer` exports it; fields: see `ClipScorer`.

    `score_tensor(pixels, prompts, timestep)` judges the clean pictures that a denoiser previews at its network time
    0..999 (`schedule.network_time`); `score` judges finished pictures, which are timestep 0 (as in the released code).
    """

    is_step_aware: ClassVar[bool] = True

    resize: Resize = "spo"

    def _time(self, num: int, timestep: Tensor | None) -> Float[Tensor, " N"]:
        time = torch.zeros(()) if timestep is None else torch.as_tensor(timestep, dtype=torch.float32)
        return time.to(self._device).expand(num)
