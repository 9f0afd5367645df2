"""Rotary position embedding (Su et al., 2104.09864) with xpos scaling (Sun et al., 2212.10554)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch.precision import Unrounded
from palm_rlhf_pytorch.turning import turned


@dataclass(frozen=True)
class Rotation:
    """What turns queries and keys at given positions: each (n, d) or (b, 1, n, d), float32."""

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor

    def rotate_queries(self, q: Tensor) -> Tensor:
        return rotate(q, self.q_cos, self.q_sin)

    def rotate_keys(self, k: Tensor) -> Tensor:
        return rotate(k, self.k_cos, self.k_sin)

    def over(self, heads: int, kv_heads: int) -> HeadsRotation:
        """The same for all heads of a layer at once, query heads first."""
        if self.q_cos is self.k_cos:
            return HeadsRotation(heads_behind(self.q_cos), signed(heads_behind(self.q_sin)))

        def side_by_side(of_q: Tensor, of_k: Tensor) -> Tensor:
            repeated = (heads_behind(t, times) for t, times in ((of_q, heads), (of_k, kv_heads)))
            return torch.cat(tuple(repeated), dim=-2)

        return HeadsRotation(side_by_side(self.q_cos, self.k_cos), signed(side_by_side(self.q_sin, self.k_sin)))


@dataclass(frozen=True)
class HeadsRotation:
    """What turns queries and keys side by side: cos and sin (n, h, d) or (b, n, h, d), h 1 where all heads agree.

    sin is negated in its first half: see `turned`.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, qk: Tensor) -> Tensor:
        """qk (b, n, heads + kv_heads, d), turned."""
        return turned(qk, self.cos, self.sin)

    def some(self, heads: slice, positions: slice = slice(None)) -> HeadsRotation:
        """What turns some of the heads, at some of the positions."""
        if self.cos.shape[-2] == 1:
            heads = slice(None)
        return HeadsRotation(self.cos[..., positions, heads, :], self.sin[..., positions, heads, :])


def signed(sin: Tensor) -> Tensor:
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def heads_behind(t: Tensor, heads: int = 1) -> Tensor:
    """(n, d) -> (n, heads, d); (b, 1, n, d) -> (b, n, heads, d)."""
    return (t.unsqueeze(-2) if t.ndim == 2 else t.transpose(-2, -3)).expand(*t.shape[:-3], -1, heads, -1)


def rotate_half(t: Tensor) -> Tensor:
    """(..., d): the two halves (x, y) become (-y, x)."""
    first, second = t.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """t (..., d), turned in float32 and given back in its own dtype."""
    return (t * cos + rotate_half(t) * sin).to(t.dtype)


class RotaryEmbedding(Unrounded):
    """Angles position * theta^(-2i/d) on the two halves of a head; with xpos, queries grow by
    scale^((position - centre) / scale_base) and keys shrink by it. The centre cancels in q . k, so any fixed one
    gives the same attention; cached keys stay valid as long as it does not move.
    """

    def __init__(self, dim: int, scale_base: float = 512, use_xpos: bool = True, theta: float = 10000.0):
        super().__init__()
        even = torch.arange(0, dim, 2).float()
        self.use_xpos = use_xpos
        self.scale_base = scale_base
        self.register_buffer("inv_freq", theta ** -(even / dim))
        self.register_buffer("scale", (even + 0.4 * dim) / (1.4 * dim))

    def forward(self, positions: Tensor | int, centre: float | None = None) -> Rotation:
        """Positions (n,) or (b, n), or a length n; `centre` is n // 2 unless given."""
        if isinstance(positions, int):
            positions = torch.arange(positions, device=self.inv_freq.device)
        if positions.ndim == 2:  # one row of positions for each sequence, shared by its heads
            positions = positions[:, None]
        angles = positions[..., None] * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        if not self.use_xpos:
            return Rotation(cos, sin, cos, sin)
        centre = positions.shape[-1] // 2 if centre is None else centre
        scale = self.scale ** ((positions[..., None] - centre) / self.scale_base)
        scale = torch.cat((scale, scale), dim=-1)
        return Rotation(cos * scale, sin * scale, cos / scale, sin / scale)
