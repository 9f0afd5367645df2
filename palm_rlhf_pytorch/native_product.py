"""Products of large matrices in one call of C++ (native/product.cpp)."""

from __future__ import annotations

import ctypes

from torch import Tensor

from palm_rlhf_pytorch.native import library


def product(x: Tensor, weight: Tensor, added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (..., i) weight^T (i, o), float32 on a CPU, without a graph; into `out` or onto `added` (..., o), contiguous,
    where one is given. The bits of a row depend neither on other rows nor on the number of threads.
    """
    rows, shape = as_rows(x), (*x.shape[:-1], len(weight))
    if out is None:
        out = x.new_empty(shape) if added is None else added
    if out.shape != shape or not out.is_contiguous() or rows.shape[1] != weight.shape[1]:
        given = f"{tuple(x.shape)} and {tuple(weight.shape)} into {tuple(out.shape)}"
        raise ValueError(f"x (..., i), weight (o, i) and a contiguous (..., o) are multiplied, got {given}")
    library("product").product(
        *located(rows, *rows.stride()),
        *located(weight, *weight.stride()[::-1]),
        *map(ctypes.c_int64, (*rows.shape, len(weight))),
        ctypes.c_bool(added is not None),
        *located(out, len(weight)),
    )
    return out


def as_rows(x: Tensor) -> Tensor:
    """x (..., n) -> (m, n), the numbers of a row or of a column side by side."""
    rows = x.detach().flatten(0, -2)
    return rows if 1 in rows.stride() else rows.contiguous()


def located(t: Tensor, *strides: int) -> tuple[ctypes.c_void_p | ctypes.c_int64, ...]:
    """Where a tensor is, and strides, as C++ takes them."""
    return ctypes.c_void_p(t.data_ptr()), *map(ctypes.c_int64, strides)
