"""SwiGLU (Shazeer, 2002.05202, eq. 6), and the projection into it in the form that trains fastest on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.products import faster, filled_up, linear, only_computed, to_weight

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


def project_swiglu(
    x: Tensor, into: Tensor, out: Tensor, besides: Tensor | None = None, width: int = 0
) -> tuple[Tensor, ...]:
    """One projection for attention and feedforward, and the feedforward's way out.

    x (..., d), into (o + 2 f, d), out (d, f) -> x W^T's first o as they are (..., o), and its others through SwiGLU
    and `out` (..., d). With `besides` (..., d) the last `width` of those o are made of it instead of x: a third result.
    """
    given = [t for t in (x, into, out, besides) if t is not None]
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not only_computed(*given):
        return by_formula(x, into, out, besides, width)
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        found = ProjectSwiGLU.apply(rows, into, out, besides, width)
    else:
        found = computed(filled_up(rows), into, out, besides, width)
    return *(as_rows_of(x, t) for t in found[:2]), *found[2:]


def by_formula(x: Tensor, into: Tensor, out: Tensor, besides: Tensor | None, width: int) -> tuple[Tensor, ...]:
    """`project_swiglu` in torch's operations."""
    first, last = split(F.linear(x, into), out)
    last = F.linear(swiglu(last), out)
    if besides is None:
        return first, last
    own = first.shape[-1] - width
    return first[..., :own], last, F.linear(besides, into.narrow(0, own, width))


def computed(rows: Tensor, into: Tensor, out: Tensor, besides: Tensor | None, width: int) -> tuple[Tensor, ...]:
    """`project_swiglu` of rows (m, d), without a graph."""
    if besides is None:
        first, last = split(linear(rows, into), out)
        return first, linear(swiglu(last), out)
    own, shared, *_ = parts(into, out, width)
    last = linear(swiglu(linear(rows, into[len(own) + width :])), out)
    return linear(rows, own), last, linear(besides, shared)


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
    def forward(
        ctx: Any, x: Tensor, into: Tensor, out: Tensor, besides: Tensor | None, width: int
    ) -> tuple[Tensor, ...]:
        rows, (own, shared, *both) = filled_up(x), parts(into, out, width)
        first, value, gate = (linear(rows, w) for w in (own, *both))
        ctx.save_for_backward(x, into, out, besides, value, gate)
        ctx.width = width
        last = linear(gated(value, gate), out)
        if len(rows) > len(x):
            first, last = first[: len(x)].clone(), last[: len(x)].clone()
        return (first, last) if besides is None else (first, last, linear(besides, shared))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, into, out, besides, value, gate = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # second derivatives: the plain formula has them
            outputs = by_formula(x, into, out, besides, ctx.width)
            wanted = [t for t, so in zip((x, into, out, besides), needed, strict=True) if so]
            found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
            return *(next(found) if so else None for so in needed), None
        to_first, to_last, *to_shared = gradients
        more = len(value) - len(x)
        if more:
            to_first, to_last = (F.pad(t, (0, 0, 0, more)) for t in (to_first, to_last))
        inner, to_value, to_gate = swiglu_backward(linear(to_last, out.t()), value, gate, needed[2])
        own, shared, *both = parts(into, out, ctx.width)
        to_x = to_into = to_out = to_besides = None
        if needed[0]:
            to_x = sum_of_products((to_first, to_value, to_gate), (own, *both))[: len(x)]
        if needed[1]:
            to_into = torch.empty_like(into)
            of_own, of_shared, *of_both = parts(to_into, out, ctx.width)
            for g, place in zip((to_first, to_value, to_gate), (of_own, *of_both), strict=True):
                to_weight(g[: len(x)], x, place)
            for g in to_shared:
                to_weight(g.flatten(0, -2), besides.flatten(0, -2), of_shared)
        if needed[2]:
            to_out = to_weight(to_last[: len(x)], inner[: len(x)])
        if needed[3]:
            to_besides = linear(*to_shared, shared.t())
        return to_x, to_into, to_out, to_besides, None


def sum_of_products(factors: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of f w over factors (m, o) and weights (o, d): (m, d)."""
    total = linear(factors[0], weights[0].t())
    for f, w in zip(factors[1:], weights[1:], strict=True):
        way = faster(f, w.t())
        total = total.addmm_(f, w) if way is None else way(f, w.t(), total)
    return total


def parts(into: Tensor, out: Tensor, width: int) -> tuple[Tensor, ...]:
    """The rows of `into` that make the first, its last `width` apart, the value and the gate."""
    f = out.shape[1]
    return into.split((len(into) - 2 * f - width, width, f, f))


def swiglu_backward(
    to_inner: Tensor, value: Tensor, gate: Tensor, again: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """silu(gate) * value, `again` if it is needed, and its gradients by value and by gate; all (m, f), the last in
    to_inner's memory.
    """
    inner, to_value = torch.empty_like(value) if again else None, torch.empty_like(value)
    if to_inner.is_contiguous() and in_one_pass(to_inner, value, gate):
        n, place = ctypes.c_int64(value.numel()), ctypes.c_void_p(inner.data_ptr() if again else None)
        library("swiglu").backward(*pointers(to_inner, value, gate), n, place, *pointers(to_value))
        return inner, to_value, to_inner
    rows = max(1, BLOCK // value.shape[-1])
    for i in range(0, len(value), rows):
        g, v, z, by_value = (t[i : i + rows] for t in (to_inner, value, gate, to_value))
        silu = F.silu(z)
        if again:
            torch.mul(silu, v, out=inner[i : i + rows])
        torch.mul(silu, g, out=by_value)
        torch.ops.aten.silu_backward.grad_input(g.mul_(v), z, grad_input=g)
    return inner, to_value, to_inner
