"""SwiGLU (Shazeer, 2002.05202, eq. 6), and the form of it that trains fastest on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**18  # numbers worked on at once: they stay in a core's cache


class SwiGLU(nn.Module):
    """silu(second half) * first half: (..., 2 f) -> (..., f)."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


def split_swiglu(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x (..., sum(sizes)) in parts of these sizes, the last one through SwiGLU (sizes[-1] / 2 wide)."""
    if x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled():
        return SplitSwiGLU.apply(x, sizes)
    *parts, last = x.split(sizes, dim=-1)
    return *parts, SwiGLU.forward(None, last)


class SplitSwiGLU(torch.autograd.Function):
    """`split_swiglu`, whose backward pass writes every part's gradient into one tensor: there memory is what counts,
    and torch's own would copy them together twice. Nothing but x is kept. (torch.compile does this on a GPU.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.sizes = sizes
        *parts, last = x.split(sizes, dim=-1)
        x, gate = last.chunk(2, dim=-1)
        return *parts, F.silu(gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: the plain formula has them
            with torch.enable_grad():
                *parts, last = x.split(ctx.sizes, dim=-1)
                outputs = (*parts, SwiGLU.forward(None, last))
            return torch.autograd.grad(outputs, x, gradients, create_graph=True)[0], None
        out = torch.empty_like(x)
        *places, _ = out.split(ctx.sizes, dim=-1)
        for place, gradient in zip(places, gradients, strict=False):
            place.copy_(gradient)
        rows, width = max(1, BLOCK // ctx.sizes[-1]), ctx.sizes[-1]
        blocks = (t.flatten(0, -2).split(rows) for t in (x, out, gradients[-1]))
        for given, made, gradient in zip(*blocks, strict=True):
            value, gate = given[:, -width:].chunk(2, dim=-1)
            to_value, to_gate = made[:, -width:].chunk(2, dim=-1)
            torch.mul(gradient, F.silu(gate), out=to_value)
            torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=to_gate)
        return out, None
