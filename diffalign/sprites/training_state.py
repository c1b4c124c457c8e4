"""Resumable training state: weights, their moving average, the optimizer and the step, swapped in as one folder."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EMA = 0.999


def swap_in(temporary: Path, final: Path) -> None:
    """Puts a finished folder in another's place; cut off half-way, `finish_swap` brings the old one back."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(final: Path) -> None:
    """Restores the folder that a `swap_in` had set aside when it was cut off."""
    old = final.with_name(final.name + ".old")
    if old.exists() and not final.exists():
        os.replace(old, final)


class State:
    """What training needs to go on: weights, their average, optimizer, step and seconds; saved atomically."""

    def __init__(self, folder: Path, modules: dict[str, nn.Module], lr: float, betas: tuple[float, float]) -> None:
        self.folder, self.modules, self.step, self.seconds = folder, modules, 0, 0.0
        self.parameters = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, betas=betas, weight_decay=0.01, fused=True)
        finish_swap(folder)
        if (folder / "state.json").is_file():
            self._load()

    def _load(self) -> None:
        weights, average = (
            load_file(self.folder / "weights.safetensors"),
            load_file(self.folder / "average.safetensors"),
        )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
                self.average[name].copy_(average[name])
        self.optimizer.load_state_dict(torch.load(self.folder / "optimizer.pt", weights_only=True))
        stamp = json.loads((self.folder / "state.json").read_text())
        self.step, self.seconds = stamp["step"], stamp["seconds"]

    def save(self) -> None:
        """Writes the state beside the old one, then takes its place."""
        temporary = self.folder.with_name(self.folder.name + ".writing")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({n: p.detach().contiguous() for n, p in self.parameters.items()}, temporary / "weights.safetensors")
        save_file({n: p.contiguous() for n, p in self.average.items()}, temporary / "average.safetensors")
        torch.save(self.optimizer.state_dict(), temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))
        swap_in(temporary, self.folder)

    @torch.no_grad()
    def update(self, loss: Tensor, lr: float) -> None:
        """One optimizer step and the average's."""
        self.step += 1
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(EMA, (self.step + 1) / (self.step + 10))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    def averaged(self) -> dict[str, dict[str, Tensor]]:
        """module -> its averaged state dict."""
        found: dict[str, dict[str, Tensor]] = {name: dict(m.state_dict()) for name, m in self.modules.items()}
        for name, value in self.average.items():
            module, _, key = name.partition(".")
            found[module][key] = value
        return found


def rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to a fiftieth of the peak."""
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))
