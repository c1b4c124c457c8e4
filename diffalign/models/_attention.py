"""The attention kernel of a denoiser as a config key.

The attention processors of U-Nets and of SD3 call torch's `scaled_dot_product_attention` themselves, so that diffusers'
`set_attention_backend` silently changes nothing on them. Each processor is therefore wrapped: its call runs inside a
context that selects torch's kernel, or that reroutes the call to xformers or flex attention. Inside the processor, not
around the whole network, because gradient checkpointing recomputes the forward pass outside of any outer context.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from diffalign.types import UserError

logger = logging.getLogger(__name__)

Context = Callable[[], AbstractContextManager[Any]]
NATIVE = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,  # FlashAttention-2 as shipped with torch, arXiv 2307.08691
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Largest difference to the math kernel in float32 that counts as rounding, for standard normal inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class _Reroute(TorchFunctionMode):
    """Sends scaled_dot_product_attention calls to another function of (query, key, value, mask), each [N H L D]."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        assert not kwargs.get("is_causal") and not kwargs.get("dropout_p"), kwargs
        names = ("query", "key", "value", "attn_mask")
        call = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
        return self.attend(call["query"], call["key"], call["value"], call.get("attn_mask"))


def _xformers() -> Context:
    from xformers.ops import memory_efficient_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return memory_efficient_attention(q, k, v, attn_bias=mask).transpose(1, 2)

    return lambda: _Reroute(attend)


@functools.cache
def _flex_function(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _flex() -> Context:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            raise UserError("model.attention=flex takes no attention mask; use sdpa")
        return _flex_function(query.device.type)(query, key, value)

    return lambda: _Reroute(attend)


def _context(choice: str) -> Context:
    if choice in NATIVE:
        return functools.partial(sdpa_kernel, [NATIVE[choice]])
    return {"xformers": _xformers, "flex": _flex}[choice]()


class _InKernel:
    """A diffusers attention processor whose call runs inside a context."""

    def __init__(self, processor: Any, context: Context) -> None:
        self.processor, self.context = processor, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context():
            return self.processor(*args, **kwargs)


def _attend(q: Tensor, context: Context | None) -> Tensor:
    """Output and gradient of self-attention on `q`, so that a kernel without a backward pass is found out."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever mode the model is loaded in
        q = q.detach().clone().requires_grad_()
        with nullcontext() if context is None else context():
            out = F.scaled_dot_product_attention(q, q, q)
        (grad,) = torch.autograd.grad(out.float().square().sum(), q)
        return torch.cat([out.detach(), grad])


def probe(choice: str, device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> str | None:
    """Why `choice` cannot be used here, or None: it must run forward and backward and agree with the math kernel."""
    try:
        context = _context(choice)
        for head_dim in sorted(head_dims):
            q = torch.randn(2, 2, 64, head_dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            got, want = _attend(q, context).float(), _attend(q.float(), _context("math"))
            error = ((got - want).abs().max() / want.abs().max()).item()
            if not error <= TOLERANCE[dtype]:
                return f"head size {head_dim}: differs from the math kernel by {error:.1e} of its largest value"
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        text = str(error).strip().splitlines()
        return text[0] if text else type(error).__name__
    return None


def _seconds(choice: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    context = None if choice == "sdpa" else _context(choice)
    q = torch.randn(2, 10, 4096, head_dim, device=device, dtype=dtype)
    for num_calls in (3, 10):  # the first round warms up
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(num_calls):
            _attend(q, context)
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _choose(device: torch.device, dtype: torch.dtype, head_dims: set[int]) -> str:
    """On the CPU torch's own choice; on CUDA the fastest of its kernels that agrees with math."""
    if device.type != "cuda":
        return "sdpa"
    usable = ["sdpa"]
    for choice in ("flash", "cudnn"):
        reason = probe(choice, device, dtype, head_dims)
        if reason is None:
            usable.append(choice)
        else:
            logger.info("attention: not %s (%s)", choice, reason)
    return min(usable, key=lambda choice: _seconds(choice, device, dtype, max(head_dims)))


def set_attention(network: nn.Module, choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """Sets the kernel on every attention layer of `network`; the name of what was set.

    `dtype` is what attention computes in. Calling it again replaces the earlier choice.

    Raises:
        UserError: the kernel is missing, or does not run or is wrong on this device, dtype or head size.
    """
    from diffusers.models.attention_processor import Attention

    layers = [module for module in network.modules() if isinstance(module, Attention)]
    head_dims = {layer.to_q.out_features // layer.heads for layer in layers}
    is_auto = choice == "auto"
    if is_auto:
        choice = _choose(device, dtype, head_dims)
    elif choice != "sdpa":
        reason = probe(choice, device, dtype, head_dims)
        if reason is not None:
            where = f"{device.type} in {str(dtype).removeprefix('torch.')}"
            raise UserError(f"model.attention={choice} cannot be used on {where} ({reason}); use auto")
    logger.info("attention: %s on %s", choice, device)
    context = None if choice == "sdpa" else _context(choice)
    if is_auto and choice != "sdpa":
        # Fastest first, the rest behind it: validation in another dtype must not fail where training does not.
        order = [NATIVE[choice], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        context = functools.partial(sdpa_kernel, order, set_priority=True)
    for layer in layers:
        plain: Any = layer.processor.processor if isinstance(layer.processor, _InKernel) else layer.processor
        processor: Any = plain if context is None else _InKernel(plain, context)
        layer.set_processor(processor)
    return choice
