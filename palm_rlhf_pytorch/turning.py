"""Queries and keys, all heads of a layer, turned by their places: on a CPU in one pass of C++ (native/rotary.cpp)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.products import only_computed

SMALL = 2**14  # numbers; below, a call outside of torch does not pay


class Call(ctypes.Structure):
    """rotary.cpp's struct of that name."""

    SIZES = ("b", "n", "heads", "d", "x_b", "x_n", "x_head", "turn_b", "turn_n", "turn_head")
    _fields_ = [(name, ctypes.c_int64) for name in SIZES]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, n, h, d); cos and sin (n, h, d) or (b, n, h, d), where h may be 1, sin negated in its first half -> pairs
    (x, y) of the halves become (x cos - y sin, y cos + x sin). (b, n, h, d)
    """
    if not fits(x, cos, sin):
        return by_formula(x, cos, sin)
    if torch.is_grad_enabled() and x.requires_grad:
        return Turned.apply(x, cos, sin)
    return by_native("forward", x, cos, sin)


def by_formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`turned` in torch's operations. The halves change places by a roll: one copy instead of two."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def fits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether C++ can do this, and is the faster way."""
    given = (x, cos, sin)
    if x.ndim != 4 or x.numel() < SMALL or not only_computed(*given):
        return False
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or t.stride(-1) != 1 for t in given):
        return False
    (b, n, h, d), (*rows, places, heads, features) = x.shape, cos.shape
    if rows not in ([], [1], [b]) or (places, features) != (n, d) or heads not in (1, h):
        return False
    alike = cos.shape == sin.shape and steps(cos) == steps(sin)
    return alike and not (cos.requires_grad or sin.requires_grad) and library("rotary") is not None


def steps(t: Tensor) -> list[int]:
    """A tensor's strides, 0 where there is nowhere to step to."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


class Turned(torch.autograd.Function):
    """`turned` with its gradient, which is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return by_native("forward", x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # second derivatives are torch's work, and what cannot be read in order: a sum's gradient is one number for all
        if torch.is_grad_enabled() or not fits(gradient, cos, sin):
            return gradient * cos + (gradient * sin).roll(sin.shape[-1] // 2, dims=-1), None, None
        return by_native("backward", gradient, cos, sin), None, None


def by_native(way: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A call of C++."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    of_turns = [0, *steps(cos)][-4:-1]  # of rows, places and heads
    pointers = (t.data_ptr() for t in (x, cos, sin, out))
    getattr(library("rotary"), way)(ctypes.byref(Call(*x.shape, *x.stride()[:3], *of_turns, *pointers)))
    return out
