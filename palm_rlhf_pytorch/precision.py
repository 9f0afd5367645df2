"""What stays in float32 beside weights in half precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


class Unrounded(nn.Module):
    """A module whose own tensors (not those of modules in it) `half()`, `bfloat16()` and the like move to another
    device, but do not round: numbers that are small beside 1, or that an optimiser moves by little, would be lost.
    Wider dtypes are followed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        def unrounded(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in HALVES and t.dtype not in HALVES else moved

        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(unrounded, recurse=False)


class UnroundedLinear(Unrounded, nn.Linear):
    """A linear map in its own precision, whatever comes in: what a value or a reward is read off with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)
