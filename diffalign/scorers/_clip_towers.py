"""The network of CLIP-type scorers: two towers whose features are compared, and the tokens that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.scorers._step_clip import Modulation, pooled


class Towers(nn.Module):
    """A CLIPModel, and what modulates its vision tower where it is step-aware."""

    def __init__(self, clip: Any, modulation: Modulation | None = None) -> None:
        super().__init__()
        self.clip, self.modulation = clip, modulation

    def images(self, pixels: Float[Tensor, "N 3 S S"], timestep: Float[Tensor, " N"] | None) -> Float[Tensor, "N D"]:
        """Features, float32, of normalised pixels, of unit length; with a timestep, of its confidence's length."""
        pixels = pixels.to(self.clip.dtype)
        if self.modulation is None or timestep is None:
            features = self.clip.vision_model(pixel_values=pixels).pooler_output
            return F.normalize(self.clip.visual_projection(features).float(), dim=-1)
        features = pooled(self.clip.vision_model, self.modulation, pixels, timestep)
        unit = F.normalize(self.clip.visual_projection(features).float(), dim=-1)
        return unit * self.modulation.confidence(timestep.to(pixels.device))[:, None]

    def texts(self, tokens: Tensor) -> Float[Tensor, "N D"]:
        """Features of unit length, float32. No mask: the text tower is causal and pools at the end of the text."""
        features = self.clip.text_model(input_ids=tokens).pooler_output
        return F.normalize(self.clip.text_projection(features).float(), dim=-1)

    def compare(self, image: Float[Tensor, "N D"], text: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        """exp(logit_scale) * cosine (* confidence), a logit."""
        return self.clip.logit_scale.float().exp() * (image * text).sum(dim=-1)

    def forward(self, pixels: Tensor, tokens: Tensor, rows: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Scores [N] of normalised pixels; picture i belongs to text `rows[i]` of `tokens`."""
        return self.compare(self.images(pixels, timestep), self.texts(tokens)[rows])


def tokenize(tokenizer: Any, prompts: Sequence[str], clip: Any) -> Tensor:
    """Token ids [N, L], cut and padded to the text tower's length, so that no prompt's depend on another's."""
    length = min(clip.config.text_config.max_position_embeddings, tokenizer.model_max_length)
    made = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return made.input_ids
