"""Keys and values of tokens already seen, in memory laid out once."""

from __future__ import annotations

from copy import copy
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch import huge_pages


class Memory(Protocol):
    """What `PaLM` asks of a cache: where its rows are, and what their new queries may look at."""

    lengths: Tensor  # (b,) positions before the new ones, or (1,) for all rows
    centre: int  # of xpos
    filled: int  # no row has more positions; 0: this is the first pass
    recomputable: bool  # a layer may be computed again, which extends again

    def reserve(self, n: int) -> None: ...

    def span(self, n: int) -> int: ...

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]: ...

    def advance(self, lengths: Tensor | int, most: int) -> None: ...


class KVCache:
    """Keys and values (depth, b, kv_heads, max_len, d): slot = position, so ragged rows need no padding on the left.

    `lengths` (b,) says how much of each row is filled; what lies beyond is overwritten before it is ever seen.
    `centre` is the fixed xpos centre that all cached keys were scaled with. Grows when a position does not fit.
    Rows come and go: `keep` closes the gaps of those that leave, `admit` and `join` bring new ones into the memory
    behind. With `static` every step sees all max_len slots, so that its shapes never change. Layers with a window keep
    all slots as well, and mask the older ones: a ring of `window` slots would save their memory, but a slot would no
    longer be a position, and ragged rows, growth and layers that see everything would each need rules of their own.
    """

    recomputable = False  # a layer that is computed again would write again

    def __init__(
        self,
        depth: int,
        batch: int,
        kv_heads: int,
        max_len: int,
        dim_head: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
    ):
        # a position's key and value lie side by side: one write for both
        nothing = torch.empty(depth, batch, 0, 2, kv_heads, dim_head, dtype=dtype, device=device)
        self.memory = empty_memory(nothing, max_len)
        self.centre = max_len // 2
        self.static = static
        self.clear(batch)

    def clear(self, rows: int = 0) -> None:
        """Start again with `rows` empty rows in the same memory."""
        device = self.memory.device
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.places = torch.arange(rows, device=device)
        self.filled = 0  # no row is longer: known without asking the device

    @property
    def rows(self) -> int:
        return self.lengths.shape[0]

    @property
    def k(self) -> Tensor:
        return rearrange(self.memory[:, : self.rows, :, 0], "l b n h d -> l b h n d")

    @property
    def v(self) -> Tensor:
        return rearrange(self.memory[:, : self.rows, :, 1], "l b n h d -> l b h n d")

    @property
    def max_len(self) -> int:
        return self.memory.shape[2]

    def reserve(self, n: int) -> None:
        """Make room for n more positions behind the longest row."""
        if self.filled + n <= self.max_len:
            return
        if self.static:
            raise ValueError(f"a static cache of {self.max_len} positions cannot take {self.filled + n}")
        more = max(self.filled + n, 2 * self.max_len) - self.max_len
        old, self.memory = self.memory, empty_memory(self.memory, more)
        self.memory[:, :, : old.shape[2]] = old

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Store k, v (b, kv_heads, n, d) at positions (b, n)."""
        both = rearrange([k, v], "two b h n d -> b n two h d")
        self.memory[layer][self.places[:, None], positions] = both.to(self.memory.dtype)

    def next_slots(self) -> Tensor:
        """Where in a layer's memory each row's next position is, (b,): for `write_one`."""
        return torch.add(self.lengths, self.places, alpha=self.max_len)

    def write_one(self, layer: int, kv: Tensor, slots: Tensor) -> None:
        """Store one position of every row, its keys and then its values side by side: (b, 2 kv_heads d)."""
        self.memory[layer].view(-1, kv.shape[-1]).index_copy_(0, slots, kv)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` slots, as views (b, kv_heads, length, d)."""
        kept = self.memory[layer, : self.rows, :length].transpose(1, 3)  # (b, kv_heads, 2, length, d)
        return kept[:, :, 0], kept[:, :, 1]

    def span(self, n: int) -> int:
        """How many slots the next n tokens look at."""
        return self.max_len if self.static else self.filled + n

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; give back all that its queries may look at: in a `first` pass
        themselves.
        """
        self.write(layer, k, v, positions)
        return (k, v) if first else self.read(layer, self.span(k.shape[2]))

    def advance(self, lengths: Tensor | int, most: int) -> None:
        """Count new tokens: how many each row (b,) has taken, and the most that any has."""
        self.lengths = self.lengths + lengths
        self.filled += most

    def keep(self, rows: Tensor) -> Tensor:
        """Go on with these rows (m,), in ascending order, in the places 0 to m - 1. Returns which row each place has:
        rows below m stay, those above fill the gaps, so that little is copied.
        """
        count, used = rows.numel(), self.filled
        order = torch.arange(count, device=rows.device)
        stays = rows[rows < count]
        gaps = torch.ones(count, dtype=torch.bool, device=rows.device).index_fill_(0, stays, False).nonzero()[:, 0]
        movers = rows[rows >= count]
        order[gaps] = movers
        self.memory[:, gaps, :used] = self.memory[:, movers, :used]
        self.lengths, self.places = self.lengths[order], self.places[:count]
        self.filled = int(self.lengths.max()) if count else 0
        return order

    def restart(self, rows: Tensor) -> None:
        """Empty the rows where (b,) is True."""
        self.lengths = self.lengths.masked_fill(rows, 0)
        self.filled = int(self.lengths.max())

    def admit(self, count: int, length: int) -> KVCache:
        """The next `count` rows of the memory, empty, as a cache of their own: to be filled with at most `length`
        positions, then to `join`.
        """
        self.reserve(length - self.filled)  # here: a part that grew would grow alone
        part = copy(self)
        part.memory = self.memory[:, self.rows : self.rows + count]
        part.clear(count)
        return part

    def repeat(self, part: KVCache, rows: Tensor) -> None:
        """Have the row rows[i] (b,) of `part` as row i. Its memory may be the beginning of this one's."""
        if part is not self:
            self.memory[:, :, : part.filled] = part.memory[:, rows, : part.filled]
            self.lengths, self.filled = part.lengths[rows], part.filled

    def join(self, part: KVCache) -> None:
        """Take in the rows that `admit` gave out."""
        self.lengths = torch.cat((self.lengths, part.lengths))
        self.places = torch.arange(self.rows, device=self.lengths.device)
        self.filled = max(self.filled, part.filled)


def empty_memory(like: Tensor, more: int) -> Tensor:
    """Zeros in the shape of `like` (depth, b, n, ...), with so many positions more."""
    depth, b, n, *rest = like.shape
    return huge_pages.zeros(like, depth, b, n + more, *rest)
