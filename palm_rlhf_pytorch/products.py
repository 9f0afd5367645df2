"""Products with weights, in float32 on a CPU by what is fastest there: one of torch's two libraries, or our own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_product import product
from palm_rlhf_pytorch.processor import is_not_intel_with

SMALL = 2**20  # multiplications; below, what oneDNN takes a call (15 us) is more than it saves
ROWS = 128  # it gets multiples of so many: for every other number it gets ready anew (4 ms), and keeps that (0.5 MiB)
FILL = 1 / 12  # of the rows at most are added to make such a multiple
FEWEST_ROWS, NARROWEST, LARGE = 128, 64, 2**22  # of our own: rows; outputs and inputs; multiplications
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
    return is_not_intel_with("avx512f")


@cache
def ours_is_faster() -> bool:
    """Whether native/product.cpp, not MKL, is to multiply: on x86 processors that are not Intel's and have AVX2, but no
    AVX-512. On an AMD EPYC (Milan), two cores: benchmarks/products.py.
    """
    return is_not_intel_with("fma", "avx2") and not is_not_intel_with("avx512f")


def only_computed(*tensors: Tensor) -> bool:
    """Whether these are numbers to compute with and nothing else: strided, not traced or compiled, without tangents,
    neither torch.func nor a dispatch mode at work. Those follow torch's own operations alone.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    if _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    return all(type(t) in KINDS and t.layout is torch.strided and not t.is_neg() and not batched(t) for t in tensors)


def float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., i) and a weight (o, i) can go to other code than torch's. Where they do not fit torch says so."""
    if not only_computed(x, weight) or weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    floats = x.dtype == weight.dtype == torch.float32
    return floats and x.device.type == weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiplied` is the faster way to x (..., i) times weight (o, i), and gives the same."""
    if not float32_on_cpu(x, weight) or x.numel() * weight.shape[0] < SMALL or x.numel() // x.shape[-1] % ROWS:
        return False
    if not (weight.is_contiguous() or weight.t().is_contiguous()):  # for others it has no fast code: 1,000 times slower
        return False
    return onednn_is_faster()


def by_ours(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is the faster way to x (..., i) times weight (o, i), and gives the same."""
    if not float32_on_cpu(x, weight) or x.ndim < 2 or 1 not in weight.stride():
        return False
    rows, (outputs, inputs) = x.shape[:-1].numel(), weight.shape
    if rows < FEWEST_ROWS or min(outputs, inputs) < NARROWEST or rows * inputs * outputs < LARGE:
        return False
    return ours_is_faster() and library("product") is not None


def faster(x: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """The way to x weight^T that is faster than torch's own, if there is one: x, weight, what is added -> (..., o). The
    result may take the place of what was added.
    """
    return multiplied if by_onednn(x, weight) else product if by_ours(x, weight) else None


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


def to_weight(gradient: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a weight, from that of what it made (m, o) of x (m, i): (o, i), into `out` if it is given."""
    in_rows = out is None or out.is_contiguous()  # that of a weight which is a transposed view is not
    if in_rows and not torch.is_grad_enabled() and by_ours(gradient.t(), x.t()):
        return product(gradient.t(), x.t(), out=out)
    return torch.mm(gradient.t(), x, out=out)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., i), weight (o, i) -> x weight^T (..., o), as `F.linear`, which it is unless another way is faster."""
    way = faster(x, weight)
    if way is None:
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return Product.apply(x, weight)
    return way(x, weight)


def as_matrix(x: Tensor) -> Tensor:
    """x (..., n) -> (m, n)."""
    return x.reshape(-1, x.shape[-1])


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if self.bias is None else super().forward(x)


class Product(torch.autograd.Function):
    """`linear` by what is faster, with its gradients, of any order. That of the weight is never oneDNN's, which would
    first lay out both factors anew.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # beside a frozen weight x may go
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        learned = to_weight(*map(as_matrix, (gradient, x))) if ctx.needs_input_grad[1] else None
        return to_x, learned
