"""A CLIP vision tower that is told how noisy its picture is: adaLN modulation by the timestep (arXiv 2406.04314, 3.2).

The blocks are those of DiT (arXiv 2212.09748); the modulation of the pooled output and the initial values are those of
the released SPO code. At its initial values the tower equals the CLIP tower it was made of, for every timestep.

Beyond the released model, scores are scaled by `confidence`, a function of the timestep that starts at 1. Of a noisy
preview nobody can be as sure as of a finished picture, and with one scale for all timesteps training unlearns what the
base knows before the modulation has learned to be less sure (METHODS.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

FREQUENCIES = 128  # a cosine and a sine of each
PERIOD = 1e4


def timestep_embedding(timestep: Float[Tensor, " N"]) -> Float[Tensor, "N 256"]:
    """cos(t f_i), then sin(t f_i), f_i = 10^(-4 i / 128), of the network's time as it is (0..999), as released.

    Computed in float64, returned as float32: in float32 an angle of 999 is off by 1e-4.
    """
    i = torch.arange(FREQUENCIES, dtype=torch.float64, device=timestep.device)
    angles = timestep.double()[:, None] * torch.exp(-math.log(PERIOD) * i / FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


class Modulation(nn.Module):
    """Timestep -> shift, scale and gate of every block's attention and MLP, shift and scale of the pooled output, and
    the scale of the score.

    Args:
        width: of the vision tower.
        num_layers: its blocks.
    """

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for _ in range(num_layers))
        self.final = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.log_confidence = nn.Linear(2 * FREQUENCIES, 1)
        self._initialise(width)

    @torch.no_grad()
    def _initialise(self, width: int) -> None:
        """The identity: no shift, no scale, gates 1, whatever the timestep."""
        for name, parameter in self.named_parameters():
            if name.startswith("embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
            if name.startswith("blocks") and name.endswith("bias"):
                for gate in (2, 5):  # of shift, scale, gate of attention; shift, scale, gate of the MLP
                    parameter[gate * width : (gate + 1) * width] = 1.0

    def embed(self, timestep: Float[Tensor, " N"]) -> Float[Tensor, "N W"]:
        """What all blocks share."""
        return self.embedder(timestep_embedding(timestep).to(next(self.parameters()).dtype))

    def confidence(self, timestep: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        """What a score is multiplied by, float32; it orders pictures of one timestep as they were."""
        embedded = timestep_embedding(timestep).to(self.log_confidence.weight.dtype)
        return self.log_confidence(embedded).float().squeeze(1).exp()


def pooled(
    vision: Any, modulation: Modulation, pixels: Float[Tensor, "N 3 H W"], timestep: Float[Tensor, " N"]
) -> Float[Tensor, "N W"]:
    """The pooled output of a transformers CLIPVisionModel whose layers are modulated; `pixels` are normalised."""
    shared = modulation.embed(timestep.to(pixels.device))
    hidden = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer, block in zip(vision.encoder.layers, modulation.blocks, strict=True):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block(shared)[:, None].chunk(6, dim=-1)
        inner = layer.layer_norm1(hidden) * (1 + scale_1) + shift_1
        hidden = hidden + gate_1 * layer.self_attn(hidden_states=inner, attention_mask=None)[0]
        inner = layer.layer_norm2(hidden) * (1 + scale_2) + shift_2
        hidden = hidden + gate_2 * layer.mlp(inner)
    shift, scale = modulation.final(shared).chunk(2, dim=-1)
    return vision.post_layernorm(hidden[:, 0]) * (1 + scale) + shift
