"""Keys and values of tokens already seen, in memory laid out once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values (depth, b, kv_heads, max_len, d): slot = position, so ragged rows need no padding on the left.

    `lengths` (b,) says how much of each row is filled; what lies beyond is overwritten before it is ever seen.
    `centre` is the fixed xpos centre that all cached keys were scaled with. Grows when a position does not fit.
    """

    def __init__(
        self,
        depth: int,
        batch: int,
        kv_heads: int,
        max_len: int,
        dim_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = (depth, batch, kv_heads, max_len, dim_head)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0  # the longest row, known without asking the device
        self.centre = max_len // 2

    @property
    def max_len(self) -> int:
        return self.k.shape[3]

    def reserve(self, n: int) -> None:
        """Make room for n more positions behind the longest row."""
        if self.filled + n <= self.max_len:
            return
        more = max(self.filled + n, 2 * self.max_len) - self.max_len
        self.k, self.v = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Store k, v (b, kv_heads, n, d) at positions (b, n)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2).to(self.k.dtype)
        self.v[layer][rows, :, positions] = v.transpose(1, 2).to(self.v.dtype)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` slots, as views (b, kv_heads, length, d)."""
        return self.k[layer, :, :, :length], self.v[layer, :, :, :length]

    def advance(self, lengths: Tensor | int, most: int) -> None:
        """Count new tokens: how many each row (b,) has taken, and the most that any has."""
        self.lengths = self.lengths + lengths
        self.filled += most

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (m,) only, in ascending order; the others leave the work and the memory is kept."""
        count, used = rows.numel(), self.filled
        for t in (self.k, self.v):
            t[:, :count, :, :used] = t[:, rows, :, :used]
        self.k, self.v = self.k[:, :count], self.v[:, :count]
        self.lengths = self.lengths[rows]

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; give back all that its queries may look at."""
        self.write(layer, k, v, positions)
        return (k, v) if self.filled == 0 else self.read(layer, self.filled + k.shape[2])
