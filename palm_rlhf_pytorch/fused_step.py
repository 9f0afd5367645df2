"""What a decoding step does between two products, in one pass of C++ (native/decode.cpp): for `PackedStep` on a CPU."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from palm_rlhf_pytorch.kv_cache import KVCache
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.rotary import HeadsRotation

if TYPE_CHECKING:
    from palm_rlhf_pytorch.packed_step import PackedLayer

WIDE = 16  # decode.cpp's: heads come in multiples of it
ALL = 2**62  # a window that hides nothing
NAMES = ("rows", "heads", "kv_heads", "d", "ff", "max_len", "turn_place", "turn_head", "window")


class Sizes(ctypes.Structure):
    """decode.cpp's struct of that name."""

    _fields_ = [(name, ctypes.c_int64) for name in NAMES]


class Fused:
    """`packed_step.InTorch` in one call a layer: nothing is masked, for every row ends where it ends."""

    def __init__(self, cache: KVCache, turns: HeadsRotation, window: int | None):
        if cache.filled >= cache.max_len:  # it would be written behind
            raise ValueError(f"the cache's {cache.max_len} positions are taken: reserve(1) makes room for another")
        if not cache.memory.dtype == turns.cos.dtype == torch.float32:
            raise TypeError(f"a fused step is in float32, but the cache is in {cache.memory.dtype}")
        self.cache, self.turns, self.lengths = cache, turns, cache.lengths.contiguous()
        self.window = ALL if window is None else window
        self.call = library("decode").attend_and_gate
        self.sizes: dict[bool, Sizes] = {}

    @staticmethod
    def fits(layer: PackedLayer) -> bool:
        """Whether the pass knows all that this layer does, and can be compiled here."""
        d = layer.sizes[0] // layer.heads
        return layer.gains is None and d % WIDE == 0 and library("decode") is not None

    def __call__(self, layer: PackedLayer, i: int, y: Tensor) -> Tensor:
        rows, width = len(self.lengths), layer.sizes[0] + layer.sizes[-1] // 2
        inner = y.new_empty(rows, width) if len(y) == rows else y.new_zeros(len(y), width)
        turns = (self.turns.cos.data_ptr(), self.turns.sin.data_ptr()) if layer.rotates else (None, None)
        arguments = (y.data_ptr(), *turns, self.lengths.data_ptr(), self.cache.memory[i].data_ptr(), inner.data_ptr())
        self.call(ctypes.byref(self._sizes(layer, rows)), *(ctypes.c_void_p(a) for a in arguments))
        return inner

    def _sizes(self, layer: PackedLayer, rows: int) -> Sizes:
        windowed = layer.window is not None
        if windowed not in self.sizes:
            attn, ff, heads = layer.sizes[0], layer.sizes[-1] // 2, self.turns.cos.shape[1]
            d = attn // layer.heads
            turn = (heads * d, d if heads > 1 else 0)
            window = self.window if windowed else ALL
            self.sizes[windowed] = Sizes(rows, layer.heads, layer.kv_heads, d, ff, self.cache.max_len, *turn, window)
        return self.sizes[windowed]
