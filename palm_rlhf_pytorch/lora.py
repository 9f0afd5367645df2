"""Low-rank adapters (Hu et al., 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """An update x A B * alpha / r beside a linear map dim -> dim_out; 0 until trained, because B starts at 0."""

    def __init__(self, dim: int, dim_out: int, r: int = 8, alpha: float | None = None):
        super().__init__()
        if not 0 < r:
            raise ValueError(f"the LoRA rank must be a positive integer, got {r}")
        self.scale = (r if alpha is None else alpha) / r
        self.A = nn.Parameter(torch.randn(dim, r) * dim**-0.5)
        self.B = nn.Parameter(torch.zeros(r, dim_out))

    @property
    def weight(self) -> Tensor:
        """The whole update (dim, dim_out), to merge into x @ W; `nn.Linear` keeps its transpose."""
        return (self.A @ self.B) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim_out), as (x A) B: the dense product A B is never made."""
        return (x @ self.A) @ (self.B * self.scale)


def side_by_side(adapters: Sequence[LoRA], x: Tensor) -> Tensor:
    """What several adapters of one x (..., dim) give, one behind the other (..., sum of dim_out), in two products."""
    down = torch.cat([adapter.A for adapter in adapters], dim=-1)
    up = torch.block_diag(*(adapter.B * adapter.scale for adapter in adapters))
    return (x @ down) @ up
