"""Linear maps whose weights can be laid out for decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PACKED_ROWS = 64  # the layout is chosen for about as many rows; it serves any number
LEAST_ROWS = 2  # a single row is a matrix-vector product, and as fast without


class Linear(nn.Linear):
    """x W^T without bias. Within `packed_weights`, and without gradient, W is read in oneDNN's blocked layout: what
    MKL does with few rows is 1.3 to 3 times slower on many CPUs.
    """

    packed: Tensor | None = None
    packed_version = -1  # of the weight when it was packed: one that was changed since is read as it is

    def __init__(self, dim: int, dim_out: int):
        super().__init__(dim, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        few = x.numel() < LEAST_ROWS * x.shape[-1]
        if self.packed is None or few or torch.is_grad_enabled() or self.packed_version != self.weight._version:
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether this machine and torch have the layout for such a weight."""
    ours = weight.device.type == "cpu" and weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return ours and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@contextmanager
def packed_weights(module: nn.Module) -> Iterator[None]:
    """Pack all `Linear` of a module while the context lasts."""
    linears = [m for m in module.modules() if isinstance(m, Linear) and m.packed is None and can_pack(m.weight)]
    try:
        for linear in linears:
            linear.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
            linear.packed_version = linear.weight._version
        yield
    finally:
        for linear in linears:
            linear.packed = None
