"""SwiGLU (Shazeer, 2002.05202, eq. 6), and the projection into it in the form that trains fastest on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 2**17  # numbers worked on at once: they stay in a core's cache


class SwiGLU(nn.Module):
    """silu(second half) * first half: (..., 2 f) -> (..., f)."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


def swiglu(x: Tensor) -> Tensor:
    x, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def project_swiglu(x: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """x (..., d), weight (o + 2 width, d) -> x W^T: the first o as they are, the others through SwiGLU (..., width)."""
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if training and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return ProjectSwiGLU.apply(x, weight, width)
    projected = F.linear(x, weight)
    first, last = projected.split((weight.shape[0] - 2 * width, 2 * width), dim=-1)
    return first, swiglu(last)


class ProjectSwiGLU(torch.autograd.Function):
    """`project_swiglu` for training on a CPU, where memory is what counts.

    Each part is a matrix of its own: torch's backward pass would copy the parts' gradients together twice, and what is
    above 32 MiB is handed back to the system and cleared anew every time. On a GPU one product is faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
        first, value, gate = (F.linear(x, w) for w in weight.split((len(weight) - 2 * width, width, width)))
        ctx.save_for_backward(x, weight, value, gate)
        ctx.width = width
        return first, F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, to_first: Tensor, to_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, value, gate = ctx.saved_tensors
        width = ctx.width
        if torch.is_grad_enabled():  # second derivatives: the plain formula has them
            projected = F.linear(x, weight)
            outputs = projected[..., : -2 * width], swiglu(projected[..., -2 * width :])
            wanted = [t for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(outputs, wanted, (to_first, to_out), create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None
        gradients = (to_first, *swiglu_backward(to_out, value, gate))
        gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
        weights = weight.split((len(weight) - 2 * width, width, width))
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = gradients[0] @ weights[0]
            for g, w in zip(gradients[1:], weights[1:], strict=True):
                to_x.addmm_(g, w)
            to_x = to_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            to_weight, rows = torch.empty_like(weight), x.reshape(-1, x.shape[-1])
            for g, place in zip(gradients, to_weight.split([len(w) for w in weights]), strict=True):
                torch.mm(g.t(), rows, out=place)
        return to_x, to_weight, None


def swiglu_backward(to_out: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu(gate) * value by value and by gate, all (..., f)."""
    to_value, to_gate = torch.empty_like(value), torch.empty_like(gate)
    rows = max(1, BLOCK // value.shape[-1])
    blocks = (t.reshape(-1, t.shape[-1]).split(rows) for t in (to_out, value, gate, to_value, to_gate))
    for g, v, z, out_value, out_gate in zip(*blocks, strict=True):
        torch.mul(g, F.silu(z), out=out_value)
        torch.ops.aten.silu_backward.grad_input(g * v, z, grad_input=out_gate)
    return to_value, to_gate
