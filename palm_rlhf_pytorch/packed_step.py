"""One decoding step on a CPU: `PaLM.next_logits` in few operations, with weights laid out for few rows."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.attention import Attention, added_to_scores, window_mask
from palm_rlhf_pytorch.blocks import HeadsGain, LayerNorm, ParallelTransformerBlock, Residual
from palm_rlhf_pytorch.kv_cache import KVCache
from palm_rlhf_pytorch.products import Linear, multiplied, onednn_is_faster
from palm_rlhf_pytorch.rotary import HeadsRotation, RotaryEmbedding
from palm_rlhf_pytorch.swiglu import SwiGLU

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM

PACKED_FOR = 64  # rows that the layout is chosen for; it serves any number
FEWEST = 4  # rows that packed products are done with: oneDNN takes longer for fewer
PARTS = {Residual, ParallelTransformerBlock, LayerNorm, HeadsGain, Attention, RotaryEmbedding, SwiGLU}
PARTS |= {nn.ModuleList, nn.Sequential, nn.Embedding, Linear, nn.Dropout}


def can_pack(model: object) -> bool:
    """Whether this machine and torch have the layout, and the model is a PaLM in float32 on a CPU, as it was made:
    other modules in its blocks, or hooks, would not be called.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(model, "layers"):
        return False
    if hooked(model) or type(model).__module__ != "palm_rlhf_pytorch.palm":  # a subclass may do otherwise
        return False
    parts = chain(model.layers.modules(), (model.token_emb, model.norm, model.to_logits))
    return all(type(m) in PARTS and getattr(m, "bias", None) is None for m in parts)


def hooked(model: object) -> bool:
    """Whether anybody listens when the model or a part of it is called, forward or backward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return isinstance(model, nn.Module) and any(getattr(m, kind) for m in model.modules() for kind in kinds)


class Matrix:
    """W (o, i), for x W^T: in oneDNN's blocked layout, or as it is where only single rows come and MKL is good at them,
    a matrix-vector product that needs no layout. With few rows MKL's own is 1.3 to 3 times slower than the former.
    """

    def __init__(self, weight: Tensor, rows: int):
        self.packed = rows > 1 or onednn_is_faster()
        weight = weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        return multiplied(x, self.weight) if self.packed else F.linear(x, self.weight)

    def plus(self, x: Tensor, added: Tensor) -> Tensor:
        """added + x W^T."""
        return multiplied(x, self.weight, added) if self.packed else torch.addmm(added, x, self.weight.t())


class PackedNorm:
    def __init__(self, norm: LayerNorm):
        self.gain, self.eps = norm.gamma.detach() + 1, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gain.shape, self.gain, None, self.eps)


class PackedLayer:
    """`ParallelTransformerBlock` and its residual for one token a row; both ways out are one matrix."""

    def __init__(self, block: ParallelTransformerBlock, rows: int, window: int | None):
        self.heads, self.kv_heads, self.sizes, self.window = block.heads, block.kv_heads, block.fused_dims, window
        self.norm = PackedNorm(block.norm)
        self.into = Matrix(block.fused_attn_ff_proj.weight, rows)
        self.out = Matrix(torch.cat((block.attn_out.weight, block.ff_out[2].weight), dim=-1), rows)
        self.rotates, self.centres, self.eps = block.rotates, block.qk_layernorm, block.norm.eps
        self.gains = block.heads_gains.detach() if block.qk_rmsnorm or block.qk_layernorm else None

    def __call__(self, x: Tensor, between: InTorch, i: int) -> Tensor:
        """x (m, dim), layer i -> (m, dim)."""
        return self.out.plus(between(self, i, self.into(self.norm(x))), x)


class InTorch:
    """What one step does between a layer's two products: y (p, all of `sizes`) -> (p, attention + feedforward). Rows
    beyond those of the cache are padding, and give 0.
    """

    def __init__(self, cache: KVCache, turns: HeadsRotation, window: int | None):
        positions = cache.lengths
        self.cache, self.slots = cache, cache.next_slots()
        self.turns = HeadsRotation(turns.cos[positions], turns.sin[positions])
        self.far, self.near = masks(positions, cache.span(1), window)

    def __call__(self, layer: PackedLayer, i: int, y: Tensor) -> Tensor:
        m, d, (attn, kv, _, both) = len(self.slots), self.turns.cos.shape[-1], layer.sizes
        inner = y.new_zeros(len(y), attn + both // 2)
        y = y[:m]
        straight = y[:, : attn + kv].view(m, layer.heads + layer.kv_heads, d)
        qk = self._turned(layer, straight)
        if qk is not straight:
            y[:, attn : attn + kv] = qk[:, layer.heads :].reshape(m, kv)  # keys, turned, beside the values
        self.cache.write_one(i, y[:, attn : attn + 2 * kv], self.slots)
        keys, values = self.cache.read(i, self.cache.span(1))
        q = qk[:, : layer.heads].reshape(m, layer.kv_heads, -1, d)  # heads that share a key are one query axis
        visible = self.far if layer.window is None else self.near
        inner[:m, :attn] = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible).reshape(m, attn)
        value, gate = y[:, attn + 2 * kv :].chunk(2, dim=-1)
        torch.mul(F.silu(gate), value, out=inner[:m, attn:])
        return inner

    def _turned(self, layer: PackedLayer, qk: Tensor) -> Tensor:
        """Queries and keys (m, heads + kv_heads, d), normalised and turned where the block does so."""
        if layer.gains is not None:
            normed = F.layer_norm(qk, qk.shape[-1:], eps=layer.eps) if layer.centres else F.normalize(qk, dim=-1)
            qk = normed * layer.gains
        return self.turns.rotate(qk) if layer.rotates else qk


def masks(positions: Tensor, slots: int, window: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Masks of layers that see everything, and of those with a window: (m, 1, 1, slots), None where all is seen."""
    far = None
    if int(positions.min()) + 1 < slots:
        unseen = torch.arange(slots) > positions[:, None]
        far = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]
    if window is None or slots <= window:
        return far, far
    return far, added_to_scores(window_mask(positions[:, None], slots, window), torch.float32)


class PackedStep:
    """Call it like `PaLM.next_logits`: tokens (m,), cache -> logits (m, v). Weights that change are packed again."""

    def __init__(self, palm: PaLM, rows: int):
        self.palm, self.rows = palm, rows
        self.turns: tuple[tuple[int, float], HeadsRotation] | None = None
        self._pack()

    def _pack(self) -> None:
        palm = self.palm
        layers = chain(*(layer.parameters() for layer in palm.layers))
        self.sources = [*layers, palm.token_emb.weight, palm.norm.gamma, palm.to_logits.weight]
        self.versions = versions(self.sources)
        self._lay_out()

    def _lay_out(self) -> None:
        palm = self.palm
        windows = [palm.sliding_window if windowed else None for windowed in palm.windowed]
        self.layers = [PackedLayer(r.fn, self.rows, w) for r, w in zip(palm.layers, windows, strict=True)]
        self.norm, self.to_logits = PackedNorm(palm.norm), Matrix(palm.to_logits.weight, self.rows)

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        self._keep_up()
        self._check_rows(tokens, cache)
        logits = self._logits(tokens, cache)
        return logits if self.palm.logit_scale == 1.0 else logits * self.palm.logit_scale

    def _logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        between = InTorch(cache, self._turns(cache), self.palm.sliding_window)
        x = F.embedding(tokens, self.palm.token_emb.weight)
        if self.to_logits.packed and len(x) < FEWEST:
            x = F.pad(x, (0, 0, 0, FEWEST - len(x)))
        for i, layer in enumerate(self.layers):
            x = layer(x, between, i)
        return self.to_logits(self.norm(x))[: len(tokens)]

    def _check_rows(self, tokens: Tensor, cache: KVCache) -> None:
        if len(tokens) != cache.rows:
            raise ValueError(f"the cache has {cache.rows} rows, but there are {len(tokens)} tokens")

    def _keep_up(self) -> None:
        if versions(self.sources) != self.versions:
            self._pack()

    def read(self, tokens: Tensor, real: Tensor, cache: KVCache) -> bool:
        """Take in tokens (b, n) that follow what the cache has, padded on the right where they are not `real` (b, n).
        Whether it was done: if not, the model itself is the better reader.
        """
        return False

    def close(self) -> None:
        """No more steps will be asked for."""

    def _turns(self, cache: KVCache) -> HeadsRotation:
        """Of every position that the cache has room for."""
        size = cache.max_len, cache.centre
        if self.turns is None or self.turns[0] != size:
            self.turns = size, self.palm.rotary_emb(*size).over(self.palm.heads, self.palm.kv_heads)
        return self.turns[1]


def versions(tensors: list[Tensor]) -> list[int]:
    """How often each was written to (made in inference mode, they do not say)."""
    return [0 if t.is_inference() else t._version for t in tensors]
