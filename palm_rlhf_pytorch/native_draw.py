"""Tokens drawn on a CPU in one call of C++ (native/draw.h)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.products import only_computed


class Call(ctypes.Structure):
    """draw.h's struct of that name."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "vocab", "row")] + [("logits", ctypes.c_void_p)]
    _fields_ += [("temperature", ctypes.c_double), ("count", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_double) for name in ("mass", "mass_temperature")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("uniform", "tokens", "log_probs")]


@dataclass(frozen=True)
class Kept:
    """The `count` largest logits, and of these the fewest with more than `mass` of what they have at mass_temperature;
    drawn from at `temperature`, where 0 takes the likeliest, with its log-prob at 1.
    """

    temperature: float
    count: int
    mass: float = 1.0
    mass_temperature: float = 1.0


def fits(logits: Tensor) -> bool:
    """Whether logits (b, v) lie as C++ reads them, nobody wants gradients, and it could be compiled."""
    if not only_computed(logits) or logits.ndim != 2 or (torch.is_grad_enabled() and logits.requires_grad):
        return False
    plain = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.stride(1) == 1
    return plain and logits.shape[1] > 0 and library("draw") is not None


def drawn(logits: Tensor, uniform: Tensor | None, kept: Kept) -> tuple[Tensor, Tensor]:
    """Logits (b, v) that fit -> tokens (b,), and their log-probs (b,) in the distribution that they were drawn from.

    Numbers `uniform` (b,), float64, from 0 to below 1 say which; temperature 0 needs none. Of equal logits the first
    are kept. Logits that are no numbers make a log-prob that is none.
    """
    tokens, log_probs = logits.new_empty(len(logits), dtype=torch.long), logits.new_empty(len(logits))
    library("draw").draw(ctypes.byref(call(logits, uniform, kept, tokens, log_probs)))
    return tokens, log_probs


def call(logits: Tensor, uniform: Tensor | None, kept: Kept, tokens: Tensor, log_probs: Tensor) -> Call:
    """What C++ is told of them, whose memory the struct keeps from being freed."""
    uniform = None if uniform is None else uniform.contiguous()
    made = Call(*logits.shape, logits.stride(0), logits.data_ptr(), kept.temperature, kept.count, kept.mass)
    made.mass_temperature, made.uniform = kept.mass_temperature, None if uniform is None else uniform.data_ptr()
    made.tokens, made.log_probs = tokens.data_ptr(), log_probs.data_ptr()
    made.holds = logits, uniform, tokens, log_probs
    return made
