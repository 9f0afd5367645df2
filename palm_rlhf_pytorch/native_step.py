"""A decoding step on a CPU in one call of C++ (native/decode.cpp), which reads short prompts too."""

from __future__ import annotations

import ctypes
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch import huge_pages, native_draw
from palm_rlhf_pytorch.blocks import LayerNorm, ParallelTransformerBlock
from palm_rlhf_pytorch.first_layer import before_attention, is_small
from palm_rlhf_pytorch.kv_cache import KVCache
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_draw import Kept
from palm_rlhf_pytorch.packed_step import PackedStep

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM

WIDE = 16  # vectors.h's: a head's size is a multiple of it, and a panel has so many outputs
SPAN = 512  # decode.cpp's: keys of a row that one task attends to
ALL = 2**62  # a window that hides nothing
AS_MANY = 12  # a step of fewer rows takes as long as one of so many: it waits for the weights
MOST_READ = 128  # tokens of prompts; `PaLM` reads more of them as fast
WORTH = 2  # times as many tokens as there are must be drawn for the first layer to be computed of all beforehand


class Layer(ctypes.Structure):
    """decode.cpp's struct of that name."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("gain", "qkv", "gated", "out")]
    _fields_ += [(name, ctypes.c_int64) for name in ("turns", "window")] + [("eps", ctypes.c_double)]


class Step(ctypes.Structure):
    """Likewise."""

    SIZES = ("rows", "dim", "heads", "kv_heads", "d", "ff", "vocab", "depth", "max_len")
    STRIDES = ("layer_memory", "turn_place", "turn_head")
    _fields_ = [(name, ctypes.c_int64) for name in SIZES + STRIDES]
    _fields_ += [("layers", ctypes.c_void_p), ("tokens", ctypes.c_void_p), ("computed", ctypes.c_int64)]
    _fields_ += [("places", ctypes.c_void_p), ("lengths", ctypes.c_void_p), ("spans", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("cos", "sin", "memory", "gain", "to_logits")]
    _fields_ += [("eps", ctypes.c_double), ("room", ctypes.c_void_p), ("logits", ctypes.c_void_p)]


class Ahead(ctypes.Structure):
    """Likewise."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("step", "draw")]
    _fields_ += [("steps", ctypes.c_int64), ("table", ctypes.c_void_p)]
    _fields_ += [("width", ctypes.c_int64), ("first", ctypes.c_void_p), ("ends", ctypes.c_void_p)]
    _fields_ += [("end_count", ctypes.c_int64), ("logit_scale", ctypes.c_double)]


class NativeStep(PackedStep):
    """`PackedStep` with weights in panels of 16 outputs, read once a step, and nothing of Python between the products.

    The bits of a row's logits do not depend on the other rows of the step, nor on the number of threads. Where `steps`
    promises enough tokens of a vocabulary that is small beside a layer, what the first layer makes of each before its
    attention is computed beforehand, for it depends on nothing else; that is torch's work, which may round otherwise
    with other threads.
    """

    def __init__(self, palm: PaLM, rows: int, steps: int = 0):
        self.room = torch.empty(0, dtype=torch.float32, device="cpu")
        self.memory = spare.pop(palm, self.room)
        self.computes = computes_beforehand(palm, rows, steps)
        super().__init__(palm, rows)

    @staticmethod
    def fits(palm: PaLM) -> bool:
        """Whether the step knows all that the layers do, and can be compiled here."""
        blocks = [layer.fn for layer in palm.layers]
        normed = any(block.qk_rmsnorm or block.qk_layernorm for block in blocks)
        shapes = {(*block.fused_dims, block.heads, block.kv_heads) for block in blocks}
        own = {(palm.kv_heads * palm.dim_head, palm.heads, palm.kv_heads)}
        alike = len(shapes) == 1 and {(kv, heads, kv_heads) for _, kv, _, _, heads, kv_heads in shapes} == own
        whole = len(palm.to_logits.weight) == len(palm.token_emb.weight) == palm.num_tokens
        plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in palm.palm_parameters())
        fits = not normed and alike and whole and plain and palm.dim_head % WIDE == 0
        return fits and library("decode") is not None

    def _lay_out(self) -> None:
        palm, blocks = self.palm, [layer.fn for layer in self.palm.layers]
        self.kept = []  # what the pointers point to
        needed = sum(map(laid_out, (palm.to_logits.weight, *chain(*map(matrices, blocks)))))
        if self.memory.numel() < needed:
            self.memory = huge_pages.zeros(self.room, needed)
        self.free = self.memory
        self.table = palm.token_emb.weight.detach().contiguous()  # what a step is given of each token
        if self.computes:  # what the first layer gives (v, qkv + dim): what goes on beside its attention comes last
            _, qkv, ff = before_attention(palm)
            self.table = torch.cat((qkv, self.table + ff), dim=-1)
        windows = [palm.sliding_window if windowed else ALL for windowed in palm.windowed]
        layers = [
            self._layer(block, window, self.computes and i == 0)
            for i, (block, window) in enumerate(zip(blocks, windows, strict=True))
        ]
        self.layers = (Layer * len(layers))(*layers)
        self.gain, self.to_logits = self._gain(palm.norm), self._panels(palm.to_logits.weight)

    def _layer(self, block: ParallelTransformerBlock, window: int, computed: bool) -> Layer:
        """A block's weights; of a `computed` one only the way out of its attention."""
        qkv, values, gates, of_attention, of_ff = matrices(block)
        panels = (
            (None, None, self._panels(of_attention))
            if computed
            else (self._panels(qkv), self._panels(values, gates, in_turn=True), self._panels(of_attention, of_ff))
        )
        return Layer(self._gain(block.norm), *panels, block.rotates, window, block.norm.eps)

    def _gain(self, norm: LayerNorm) -> int:
        return self._address(norm.gamma.detach() + 1)

    def _panels(self, *weights: Tensor, in_turn: bool = False) -> int:
        """Weights (o, i) in panels of WIDE outputs: all of each panel's inputs, or a panel of each weight in turn."""
        panels, self.free = self.free.tensor_split([sum(map(laid_out, weights))])
        inputs, step = (weights[0].shape[1], len(weights)) if in_turn else (sum(w.shape[1] for w in weights), 1)
        begin = 0
        for i, weight in enumerate(weights):
            numbers = *weight.shape, begin, inputs, i if in_turn else 0, step
            begin += 0 if in_turn else weight.shape[1]
            weight = weight.detach().contiguous()
            addresses = (ctypes.c_void_p(t.data_ptr()) for t in (weight, panels))
            library("decode").pack(*addresses, *map(ctypes.c_int64, numbers))
        return self._address(panels)

    def close(self) -> None:
        spare[self.palm] = self.memory

    def _address(self, t: Tensor) -> int:
        self.kept.append(t)
        return t.data_ptr()

    def read(self, tokens: Tensor, real: Tensor, cache: KVCache) -> bool:
        count, n = int(real.sum()), real.shape[1]
        if not 0 < count <= MOST_READ:
            return False
        self._keep_up()
        rows, after = real.nonzero(as_tuple=True)
        check_room(cache, self.palm, n)
        self._run(tokens[real], cache.places[rows], cache.lengths[rows] + after, cache.filled + n, cache, None)
        cache.advance(real.sum(dim=-1), n)
        return True

    def _logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        check_room(cache, self.palm, 1)
        logits = self.room.new_empty(len(tokens), self.palm.num_tokens)
        if len(tokens):
            self._run(tokens, cache.places, cache.lengths, cache.filled + 1, cache, logits)
        return logits

    def ahead(
        self, tokens: Tensor, cache: KVCache, steps: int, kept: Kept, uniform: Tensor | None, ends: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What `steps` steps draw, each with its numbers of `uniform` (steps * m,), after tokens (m,) -> tokens (n, m),
        log_probs (n, m). They end early, behind a step that draws one of `ends` (k,), or from what is not finite.
        """
        self._keep_up()
        self._check_rows(tokens, cache)
        check_room(cache, self.palm, steps)
        logits, table = self.room.new_empty(len(tokens), self.palm.num_tokens), self.table
        drawn, log_probs = (
            tokens.new_empty(steps, len(tokens), dtype=torch.long),
            self.room.new_empty(steps, len(tokens)),
        )
        inputs = self.room.new_empty(len(tokens), table.shape[1])
        step = self._filled(inputs, cache.places, cache.lengths.clone(), cache.filled + steps, cache, logits)
        draw = native_draw.call(logits, uniform, kept, drawn, log_probs)
        tokens, ends = (t.long().contiguous() for t in (tokens, tokens[:0] if ends is None else ends))
        ahead = Ahead(ctypes.addressof(step), ctypes.addressof(draw), steps, table.data_ptr(), table.shape[1])
        ahead.first, ahead.ends, ahead.end_count = tokens.data_ptr(), ends.data_ptr(), len(ends)
        ahead.logit_scale = self.palm.logit_scale
        run = library("decode").steps
        run.restype = ctypes.c_int64
        count = run(ctypes.byref(ahead))
        return drawn[:count], log_probs[:count]

    def _run(
        self, tokens: Tensor, places: Tensor, lengths: Tensor, longest: int, cache: KVCache, logits: Tensor | None
    ) -> None:
        """Tokens (m,) that follow `lengths` (m,) others in `places` (m,) of the cache, where the longest then has so
        many -> logits (m, v), where these are wanted.
        """
        inputs = F.embedding(tokens, self.table)
        step = self._filled(inputs, places, lengths, longest, cache, logits)
        library("decode").step(ctypes.byref(step))

    def _filled(
        self, inputs: Tensor, places: Tensor, lengths: Tensor, longest: int, cache: KVCache, logits: Tensor | None
    ) -> Step:
        """What C++ is told of a step. What the struct points to is not freed before itself."""
        palm, block = self.palm, self.palm.layers[0].fn
        turns, places, lengths = self._turns(cache), places.contiguous(), lengths.contiguous()
        cos, sin = turns.cos.float(), turns.sin.float()  # by torch's default dtype they may be more
        heads, d = cos.shape[-2:]
        widths = palm.dim, palm.heads, palm.kv_heads, d, block.fused_dims[-1] // 2, palm.num_tokens
        strides = cache.memory.stride(0), heads * d, d if heads > 1 else 0
        step = Step(len(inputs), *widths, len(palm.layers), cache.max_len, *strides)
        step.layers, step.tokens = ctypes.addressof(self.layers), inputs.data_ptr()
        step.computed = self.computes
        step.places, step.lengths, step.spans = places.data_ptr(), lengths.data_ptr(), -(-longest // SPAN)
        step.cos, step.sin = cos.data_ptr(), sin.data_ptr()
        step.memory, step.gain, step.to_logits = cache.memory.data_ptr(), self.gain, self.to_logits
        step.eps, step.room = palm.norm.eps, self._room_for(step)
        step.logits = None if logits is None else logits.data_ptr()
        step.holds = inputs, places, lengths, cos, sin, logits
        return step

    def _room_for(self, step: Step) -> int:
        """The address of memory to work in, which is kept."""
        room_of = library("decode").room_of
        room_of.restype = ctypes.c_int64
        needed = room_of(ctypes.byref(step))
        if self.room.numel() < needed:
            self.room = self.room.new_empty(needed)
        return self.room.data_ptr()


# Memory that a model's last step had its weights in, for the next one: the system clears each page that it gives, which
# takes several times as long as laying weights out there. Only the memory is kept, for weights do not tell of a write
# through `.data`; and only until the model learns, or is moved or cast.
spare: WeakKeyDictionary[PaLM, Tensor] = WeakKeyDictionary()


def forget(palm: PaLM) -> None:
    """Keep no memory for its next step any longer."""
    spare.pop(palm, None)


def matrices(block: ParallelTransformerBlock) -> tuple[Tensor, ...]:
    """The weights for queries, keys and values, for SwiGLU's values and its gates, and of both ways out."""
    into, of_attention, of_ff = block.matrices
    queries, keys, values, both = block.fused_dims
    return *into.split([queries + keys + values, both // 2, both // 2]), of_attention, of_ff


def laid_out(weight: Tensor) -> int:
    """How many numbers its panels have, which are whole."""
    outputs, inputs = weight.shape
    return -(-outputs // WIDE) * WIDE * inputs


def computes_beforehand(palm: PaLM, rows: int, steps: int) -> bool:
    """Whether what the first layer makes of each token is worth it."""
    return is_small(palm) and steps * max(rows, AS_MANY) >= WORTH * palm.num_tokens


def check_room(cache: KVCache, palm: PaLM, more: int) -> None:
    """Refuse so many positions more that would be written behind, or as something else."""
    own = (len(palm.layers), 2, palm.kv_heads, palm.dim_head)
    if (given := (len(cache.memory), *cache.memory.shape[3:])) != own:
        raise ValueError(f"a cache (layers, 2, key heads, head size) of {given} is not this model's, which is {own}")
    if cache.filled + more > cache.max_len:
        room = f"the cache has {cache.max_len} positions, {cache.filled} of them taken"
        raise ValueError(f"{room}: reserve({more}) makes room for {more} more")
    if cache.memory.dtype != torch.float32:
        raise TypeError(f"a native step is in float32, but the cache is in {cache.memory.dtype}")


def packed_step(palm: PaLM, rows: int, steps: int) -> PackedStep:
    """The fastest way to decode `rows` rows some steps on a CPU."""
    return NativeStep(palm, rows, steps) if NativeStep.fits(palm) else PackedStep(palm, rows)
