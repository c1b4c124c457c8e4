"""Other values of the trainable tensors, swapped into the policy's own network for a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffalign.types import Policy


class SwappedWeights:
    """A copy of the trainable tensors alone (of LoRA: a few MB) that the policy's network can run with.

    Made before a launcher wraps the denoiser: names and modules are those of the bare network.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._places: list[tuple[str, nn.Module, str, nn.Parameter]] = []
        copies: dict[int, nn.Parameter] = {}  # a tied tensor has several names
        for name, value in policy.denoiser.named_parameters(remove_duplicate=False):
            if value.requires_grad:
                owner, _, leaf = name.rpartition(".")
                copied = copies.setdefault(id(value), nn.Parameter(value.detach().clone(), requires_grad=False))
                self._places.append((name, policy.denoiser.get_submodule(owner), leaf, copied))

    @torch.no_grad()
    def predict(self, xt: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction [N C H W] with the copies, no gradient."""
        with self._swapped_in():
            return self._policy(xt, t, cond)

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        """The copies in place of the parameters. The objects change, not their values: autocast keeps one low-precision
        cast per parameter object and would give the policy the copies' weights, without a gradient."""
        trained = [module._parameters[leaf] for _, module, leaf, _ in self._places]
        try:
            for _, module, leaf, copied in self._places:
                module._parameters[leaf] = copied
            yield
        finally:
            for (_, module, leaf, _), parameter in zip(self._places, trained, strict=True):
                module._parameters[leaf] = parameter

    def current(self) -> dict[str, Tensor]:
        """The policy's own values as they are now, on the CPU."""
        values = {}
        for name, module, leaf, _ in self._places:
            parameter = module._parameters[leaf]
            assert parameter is not None
            values[name] = parameter.detach().to("cpu", copy=True)
        return values

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Other values for the copies."""
        for name, _, _, copied in self._places:
            copied.copy_(values[name])
