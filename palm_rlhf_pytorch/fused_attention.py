"""Attention in float32 on a CPU, forward and backward in C++ (native/attention.cpp)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.products import only_computed

STEP, KEYS = 16, 64  # attention.cpp's: head sizes are multiples of the one, and keys come in blocks of the other
TASKS = 32  # of a backward pass, where they can be as many
SMALL = 2**19  # multiplications for the scores; below, a call outside of torch does not pay


class View(ctypes.Structure):
    """attention.cpp's struct of that name: where a tensor (b, h, n, d) lies."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "place"))]


class Call(ctypes.Structure):
    """attention.cpp's struct of that name."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("b", "heads", "kv_heads", "n", "j", "d", "causal", "parts")),
        *((name, View) for name in ("q", "k", "v", "mask", "out", "to_out", "to_q", "to_k", "to_v")),
        *((name, ctypes.c_void_p) for name in ("logs", "turned", "sums")),
    ]


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> bool:
    """Whether C++ can do this, and is the faster way."""
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    if not only_computed(*tensors) or any(t.device.type != "cpu" for t in tensors) or torch.is_autocast_enabled("cpu"):
        return False
    (b, heads, n, d), (kv_heads, j) = q.shape, k.shape[1:3]
    if b * heads * n * j * d < SMALL or d % STEP or heads % kv_heads or (causal and n > j):
        return False
    if k.shape != (b, kv_heads, j, d) or v.shape != k.shape or any(t.dtype != torch.float32 for t in (q, k, v)):
        return False
    if any(t.stride(-1) != 1 for t in tensors):
        return False
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32) or mask.requires_grad):
        return False
    if mask is not None and mask.shape not in [(rows, 1, places, j) for rows in (1, b) for places in (1, n)]:
        return False
    return library("attention") is not None


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q (b, h, n, d), k and v (b, kv_heads, j, d): (b, h, n, d), in memory (b, n, h, d).

    mask: added to the scores, (b or 1, 1, n or 1, j). Causal queries are the last n of j positions.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return FusedAttention.apply(q, k, v, mask, causal)
    return attend(q, k, v, mask, causal)[0]


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """The same, with all scores in memory."""
    (b, _, n, d), (kv_heads, j) = q.shape, k.shape[1:3]
    scores = torch.einsum("b k g i d, b k j d -> b k g i j", q.reshape(b, kv_heads, -1, n, d), k) * d**-0.5
    if mask is not None:
        scores = scores + mask[:, :, None]
    if causal:
        scores = scores.masked_fill(torch.ones(n, j, dtype=torch.bool).triu(j - n + 1), -torch.inf)
    return torch.einsum("b k g i j, b k j d -> b k g i d", scores.softmax(dim=-1), v).flatten(1, 2)


class FusedAttention(torch.autograd.Function):
    """`fused_attention` with gradients, for which no scores are kept: one number a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        out, logs = attend(q, k, v, mask, causal)
        ctx.save_for_backward(q, k, v, mask, out, logs)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, to_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, logs = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # second derivatives: the plain formula has them
            wanted = [t for t, need in zip((q, k, v), needed, strict=True) if need]
            found = iter(torch.autograd.grad(formula(q, k, v, mask, ctx.causal), wanted, to_out, create_graph=True))
            return *(next(found) if need else None for need in needed), None, None
        gradients = attend_backward(q, k, v, mask, ctx.causal, out, logs, to_out)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """What comes out (b, h, n, d), and the logarithms of the sums that weights were divided by (b, h, n)."""
    call, out, logs, turned = call_of(q, k, v, mask, causal), heads_inside(q), q.new_empty(q.shape[:3]), room(k, 1)
    call.out, call.logs, call.turned = view(out), logs.data_ptr(), turned.data_ptr()
    library("attention").forward(ctypes.byref(call))
    return out, logs


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, out: Tensor, logs: Tensor, to_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    if to_out.stride(-1) != 1:  # a sum's gradient is one number for all
        to_out = to_out.contiguous()
    call, gradients = call_of(q, k, v, mask, causal), tuple(map(heads_inside, (q, k, v)))
    call.out, call.to_out, call.to_q, call.to_k, call.to_v = map(view, (out, to_out, *gradients))
    turned, sums = room(k, 2), room(k, 2 * call.parts)
    call.logs, call.turned, call.sums = (t.data_ptr() for t in (logs, turned, sums))
    library("attention").backward(ctypes.byref(call))
    return gradients


def call_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Call:
    """What is known of a call; in so many parts at most that their sums take four times the memory of q."""
    (b, heads, n, d), (kv_heads, j) = q.shape, k.shape[1:3]
    parts = max(1, min(TASKS // (b * kv_heads), 2 * heads // kv_heads))
    known = View() if mask is None else view(mask)
    return Call(b, heads, kv_heads, n, j, d, causal, parts, view(q), view(k), view(v), known)


def view(t: Tensor) -> View:
    return View(t.data_ptr(), *(0 if size == 1 else s for size, s in zip(t.shape[:3], t.stride()[:3], strict=True)))


def heads_inside(t: Tensor) -> Tensor:
    """Room for t's like, (b, h, n, d), that lies in memory as (b, n, h, d): so it is read next."""
    b, h, n, d = t.shape
    return t.new_empty(b, n, h, d).transpose(1, 2)


def room(k: Tensor, times: int) -> Tensor:
    """Memory for so many tensors of k's size, whose keys come in whole blocks."""
    b, kv_heads, j, d = k.shape
    return k.new_empty(times * b * kv_heads * (j + -j % KEYS) * d)
