"""Products with weights, in float32 on a CPU by whichever of torch's two libraries for them is faster there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

SMALL = 2**20  # multiplications; below, what oneDNN takes a call (15 us) is more than it saves
ROWS = 128  # it gets multiples of so many: for every other number it gets ready anew (4 ms), and keeps that (0.5 MiB)
FILL = 1 / 12  # of the rows at most are added to make such a multiple
CPUINFO = Path("/proc/cpuinfo")
KINDS = (Tensor, nn.Parameter)  # what is spread over processes, say, is torch's business


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN, not MKL, is to multiply: on x86 processors that are not Intel's but have AVX-512, which MKL then
    does not use.

    What the processor is decides, not a measurement: a run that is resumed must round as before. On an AMD EPYC
    (Genoa), two cores, 2,048 rows: 200 to 220 against 155 to 195 GFLOP/s. On an Intel Xeon MKL was ahead, by 12 % at 64
    rows; on an AMD EPYC without AVX-512 (Milan) by 12 % at 1,280 rows of 1,024 numbers.
    """
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    vendors = [line for line in lines if line.startswith("vendor_id")]
    wide = any(line.startswith("flags") and "avx512f" in line.split() for line in lines)
    return bool(vendors) and "GenuineIntel" not in vendors[0] and wide


def only_computed(*tensors: Tensor) -> bool:
    """Whether these are numbers to compute with and nothing else: not traced or compiled, without tangents, and not
    what torch.func or a dispatch mode puts in the place of numbers. Those follow torch's own operations alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._functorch.is_legacy_batchedtensor
    return all(type(t) in KINDS and not any(is_so(t) for is_so in wrapped) for t in tensors)


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiplied` is the faster way to x (..., i) times weight (o, i), and gives the same."""
    if not only_computed(x, weight):
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if x.numel() * weight.shape[0] < SMALL:
        return False
    if x.numel() // x.shape[-1] % ROWS:
        return False
    if not (weight.is_contiguous() or weight.t().is_contiguous()):  # for others it has no fast code: 1,000 times slower
        return False
    return onednn_is_faster() and not torch.is_autocast_enabled("cpu")


def filled_up(x: Tensor) -> Tensor:
    """x (m, i), with rows of zeros below where that lets oneDNN multiply it, and they are few."""
    if not only_computed(x) or x.device.type != "cpu" or x.dtype != torch.float32:
        return x
    more = -len(x) % ROWS
    if not 0 < more <= FILL * len(x) or not onednn_is_faster():
        return x
    return F.pad(x, (0, 0, 0, more))


def multiplied(x: Tensor, weight: Tensor, added: Tensor | None = None) -> Tensor:
    """x (..., i) weight^T (i, o), and `added` (..., o) to it, by oneDNN, without a graph. The weight may be a
    transposed view, or packed.
    """
    if added is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, None, "add")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i), weight (o, i) -> x weight^T (..., o), as `F.linear`, which it is unless oneDNN is faster."""
    if not by_onednn(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Product.apply(x, weight)
    return multiplied(x, weight)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if self.bias is None else super().forward(x)


class Product(torch.autograd.Function):
    """`linear` by oneDNN, with its gradients, of any order. That of the weight is MKL's: oneDNN would first lay out
    both factors anew.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiplied(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        to_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return to_x, to_weight
