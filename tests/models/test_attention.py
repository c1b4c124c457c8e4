"""Every attention kernel that runs here gives the same predictions and gradients."""

from __future__ import annotations

import pytest
import torch

from diffalign.models import _attention
from diffalign.models._model import Model
from diffalign.types import UserError

from .conftest import Twins, inputs, make_nonzero

CPU = torch.device("cpu")


def gradients(model: Model) -> list[torch.Tensor]:
    make_nonzero(model)
    pred = model(*inputs(model))
    pred.square().mean().backward()
    return [pred.detach(), *(p.grad for p in model.trainable_parameters().values() if p.grad is not None)]


@pytest.mark.parametrize("choice", ["auto", "math", "flash"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_kernels_agree(twins: Twins, family: str, choice: str, is_checkpointed: bool) -> None:
    want = gradients(twins.load(family, attention="sdpa"))
    got = gradients(twins.load(family, attention=choice, gradient_checkpointing=is_checkpointed))
    assert len(want) == len(got) > 10
    for a, b in zip(want, got, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("choice", ["math", "flash"])
@torch.no_grad()
def test_the_choice_reaches_torch(twins: Twins, family: str, choice: str) -> None:
    """diffusers' own switch does not reach these networks, so count what torch's kernels were told."""
    model = twins.load(family, attention=choice)
    call = inputs(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(*call)
    names = {event.key for event in profile.key_averages()}
    assert ("aten::_scaled_dot_product_attention_math" in names) == (choice == "math")
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) == (choice == "flash")


@pytest.mark.parametrize("choice", ["cudnn", "xformers", "flex"])
def test_what_does_not_run_here_is_one_line(twins: Twins, choice: str) -> None:
    with pytest.raises(UserError, match=rf"model.attention={choice} cannot be used on cpu in float32") as error:
        twins.load("sdxl", attention=choice)
    assert "\n" not in str(error.value)


def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_context", lambda choice: lambda: _attention._Reroute(lambda q, k, v, mask: v))
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(_attention, "_attend", lambda q, context: q if context is None else real(q, q, q))
    assert _attention.probe("math", CPU, torch.float32, {8}) is None
    calls = iter([torch.ones(2, 2, 64, 8), torch.zeros(2, 2, 64, 8) + 0.9])
    monkeypatch.setattr(_attention, "_attend", lambda q, context: next(calls))
    assert "differs" in _attention.probe("math", CPU, torch.float32, {8})


def test_reroute_sees_every_call() -> None:
    q, mask = torch.randn(1, 2, 3, 4), torch.zeros(3, 3)
    seen = []
    mode = _attention._Reroute(lambda query, key, value, attn_mask: seen.append(attn_mask) or query)
    with mode:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask, dropout_p=0.0)
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert out is q and seen[0] is mask and seen[1] is None


def test_choosing_again_replaces_the_choice(twins: Twins) -> None:
    model = twins.load("sdxl", attention="math")
    names = {name: type(p).__name__ for name, p in model.network.attn_processors.items()}
    assert set(names.values()) == {"_InKernel"}
    for choice in ("math", "sdpa"):
        _attention.set_attention(model.network, choice, CPU, torch.float32)
        layers = model.network.attn_processors.values()
        inner = [p.processor if choice == "math" else p for p in layers]
        assert {type(p).__name__ for p in inner} == {"AttnProcessor2_0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["auto", "flash", "cudnn", "flex"])
def test_kernels_agree_on_cuda(twins: Twins, family: str, choice: str) -> None:
    results = []
    for kernel in ("math", choice):
        model = twins.load(family, attention=kernel, dtype="bfloat16").to("cuda")
        xt, t, cond = inputs(model)
        cond = {name: value.cuda() for name, value in cond.items()}
        results.append(model(xt.cuda(), t.cuda(), cond).float())
    assert torch.allclose(*results, atol=5e-2)
