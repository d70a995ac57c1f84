"""Norm, rotary positions and SwiGLU with few passes over memory, and little kept for the backward pass.

Used by `decoder.py`. On a CPU a step's elementwise work is bound by memory: each function reads and writes its tensors
as seldom as torch's own kernels allow, and keeps its inputs instead of everything in between. On a GPU the norm is
torch's fused kernel and SwiGLU that of Liger Kernel (Hsu et al. 2024), where it is installed; no GPU has run them yet.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square layer normalisation over the last dimension (Zhang & Sennrich 2019).

    Args:
        x: float [..., channels]. weight: float [channels].
    """
    if x.is_cpu and x.dtype == weight.dtype == torch.float32:
        normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), the second half of a head's channels being the imaginary part.

    Args:
        x: float [tokens, heads, head_dim]. cos, sin: float32 [tokens, 1, head_dim / 2].
    """
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up (Shazeer 2020), of two tensors of one shape."""
    kernel = _liger() if gate.is_cuda else None
    product: Tensor = (_SwiGlu if kernel is None else kernel.LigerSiLUMulFunction).apply(gate, up)
    return product


@cache
def _liger() -> Any | None:
    return import_module("liger_kernel.ops") if find_spec("liger_kernel") else None


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        products = slope * normed
        weight_grad = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = (products @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return torch.mul(slope, weight, out=products).addcmul_(normed, mean).mul_(scale), weight_grad, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(slope, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    (real, imaginary), (out_real, out_imaginary) = x.float().chunk(2, -1), out.chunk(2, -1)
    torch.mul(real, cos, out=out_real).addcmul_(imaginary, sin, value=-direction)
    torch.mul(imaginary, cos, out=out_imaginary).addcmul_(real, sin, value=direction)
    return out.to(x.dtype)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(slope * up, gate), F.silu(gate).mul_(slope)
