"""SwiGLU (Shazeer, 2002.05202, eq. 6), and the projection into it in the form that trains fastest on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.products import by_onednn, filled_up, linear, multiplied, only_computed

BLOCK = 2**17  # numbers worked on at once: they stay in a core's cache
SMALL = 2**12  # numbers; below, a call outside of torch does not pay


class SwiGLU(nn.Module):
    """silu(second half) * first half: (..., 2 f) -> (..., f)."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


def swiglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * value if torch.is_grad_enabled() and x.requires_grad else gated(value, gate)


def gated(value: Tensor, gate: Tensor) -> Tensor:
    """silu(gate) * value, without a graph."""
    if not in_one_pass(value, gate):
        return F.silu(gate) * value
    out, n = torch.empty_like(value, memory_format=torch.contiguous_format), value.shape[-1]
    width = value.stride(-2) if value.ndim > 1 else n
    sizes = (ctypes.c_int64(size) for size in (value.numel() // n, n, width))
    library("swiglu").forward(*pointers(value, gate), *sizes, *pointers(out))
    return out


def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


def in_one_pass(*tensors: Tensor) -> bool:
    """Whether tensors of one shape lie as native/swiglu.cpp reads them: float32, rows at one distance, on a CPU where
    it could be compiled.
    """
    if not only_computed(*tensors):
        return False
    one, strides = tensors[0], {t.stride() for t in tensors}
    if one.device.type != "cpu" or one.numel() < SMALL or any(t.dtype != torch.float32 for t in tensors):
        return False
    if len(strides) > 1 or one.stride(-1) != 1:
        return False
    steps = zip(one.stride()[:-2], one.stride()[1:-1], one.shape[1:-1], strict=True)
    return all(outer == inner * size for outer, inner, size in steps) and library("swiglu") is not None


def project_swiglu(x: Tensor, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """One projection for attention and feedforward, and the feedforward's way out.

    x (..., d), into (o + 2 f, d), out (d, f) -> x W^T's first o as they are (..., o), and its others through SwiGLU
    and `out` (..., d).
    """
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, into, out))
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not only_computed(x, into, out):
        first, last = split(F.linear(x, into), out)
        return first, F.linear(swiglu(last), out)
    rows = x.reshape(-1, x.shape[-1])
    if trained:
        first, last = ProjectSwiGLU.apply(rows, into, out)
    else:
        first, last = split(linear(filled_up(rows), into), out)
        last = linear(swiglu(last), out)
    return as_rows_of(x, first), as_rows_of(x, last)


def as_rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Those of rows (at least m, f) that stand for x (..., d), m vectors: (..., f)."""
    return rows[: x.numel() // x.shape[-1]].view(*x.shape[:-1], rows.shape[-1])


def split(projected: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(..., o + 2 f) -> (..., o), (..., 2 f)."""
    both = 2 * out.shape[1]
    return projected.split((projected.shape[-1] - both, both), dim=-1)


class ProjectSwiGLU(torch.autograd.Function):
    """`project_swiglu` of rows x (m, d) for training on a CPU, where memory is what counts.

    Each part is a matrix of its own: torch's backward pass would copy the parts' gradients together twice, and what is
    above 32 MiB is handed back to the system and cleared anew every time. What goes into `out` is not kept, its
    factors are, in as many rows as they were computed in. On a GPU one product is faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        rows = filled_up(x)
        first, value, gate = (linear(rows, w) for w in parts(into, out))
        ctx.save_for_backward(x, into, out, value, gate)
        last = linear(gated(value, gate), out)
        return (first, last) if len(rows) == len(x) else (first[: len(x)].clone(), last[: len(x)].clone())

    @staticmethod
    def backward(ctx: Any, to_first: Tensor, to_last: Tensor) -> tuple[Tensor | None, ...]:
        x, into, out, value, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives: the plain formula has them
            first, last = split(F.linear(x, into), out)
            outputs = first, F.linear(swiglu(last), out)
            wanted = [t for t, needed in zip((x, into, out), ctx.needs_input_grad, strict=True) if needed]
            found = iter(torch.autograd.grad(outputs, wanted, (to_first, to_last), create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
        more = len(value) - len(x)
        if more:
            to_first, to_last = (F.pad(t, (0, 0, 0, more)) for t in (to_first, to_last))
        inner, to_value, to_gate = swiglu_backward(linear(to_last, out.t()), value, gate)
        gradients = to_first, to_value, to_gate
        to_x = to_into = to_out = None
        if ctx.needs_input_grad[0]:
            to_x = sum_of_products(gradients, parts(into, out))[: len(x)]
        if ctx.needs_input_grad[1]:
            to_into = torch.empty_like(into)
            for g, place in zip(gradients, parts(to_into, out), strict=True):
                torch.mm(g[: len(x)].t(), x, out=place)
        if ctx.needs_input_grad[2]:
            to_out = to_last[: len(x)].t() @ inner[: len(x)]
        return to_x, to_into, to_out


def sum_of_products(factors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of f w over factors (m, o) and weights (o, d): (m, d)."""
    total = linear(factors[0], weights[0].t())
    for f, w in zip(factors[1:], weights[1:], strict=True):
        total = multiplied(f, w.t(), total) if by_onednn(f, w.t()) else total.addmm_(f, w)
    return total


def parts(into: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of `into` that make the first, the value and the gate."""
    width = out.shape[1]
    return into.split((len(into) - 2 * width, width, width))


def swiglu_backward(to_inner: Tensor, value: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) * value again, and its gradients by value and by gate; all (m, f), the last in to_inner's memory."""
    inner, to_value = torch.empty_like(value), torch.empty_like(value)
    if to_inner.is_contiguous() and in_one_pass(to_inner, value, gate):
        given, made = pointers(to_inner, value, gate), pointers(inner, to_value)
        library("swiglu").backward(*given, ctypes.c_int64(value.numel()), *made)
        return inner, to_value, to_inner
    rows = max(1, BLOCK // value.shape[-1])
    for g, v, z, inside, by_value in zip(
        *(t.split(rows) for t in (to_inner, value, gate, inner, to_value)), strict=True
    ):
        silu = F.silu(z)
        torch.mul(silu, v, out=inside)
        torch.mul(silu, g, out=by_value)
        torch.ops.aten.silu_backward.grad_input(g.mul_(v), z, grad_input=g)
    return inner, to_value, to_inner
