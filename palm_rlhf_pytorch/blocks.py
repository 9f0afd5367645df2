"""The parts of PaLM: norm, SwiGLU, and the block that runs attention and feedforward side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.attention import Attention
from palm_rlhf_pytorch.lora import LoRA, LoraOptions, side_by_side
from palm_rlhf_pytorch.places import Places
from palm_rlhf_pytorch.precision import Unrounded, at_least_float32
from palm_rlhf_pytorch.products import Linear, linear
from palm_rlhf_pytorch.repeated_tokens import RepeatedTokens
from palm_rlhf_pytorch.rotary import HeadsRotation, RotaryEmbedding
from palm_rlhf_pytorch.swiglu import SwiGLU, project_swiglu, split

if TYPE_CHECKING:
    from palm_rlhf_pytorch.first_layer import KnownTokens


class LayerNorm(Unrounded):
    """Layer normalisation without bias. The gain is gamma + 1, so weight decay pulls it to the identity."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim, dtype=at_least_float32(torch.get_default_dtype())))
        self.register_buffer("beta", torch.zeros(dim))  # always 0; it is part of the weights' names

    def forward(self, x: Tensor) -> Tensor:
        gain, beta = (self.gamma + 1).to(x.dtype), self.beta.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], gain, beta, self.eps)


class HeadsGain(Unrounded):
    """A gain gamma + 1 for each head's features, (heads, d): what follows the normalisation of queries or keys."""

    def __init__(self, heads: int, dim_head: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(heads, dim_head, dtype=at_least_float32(torch.get_default_dtype())))


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args, places: Places | None = None, **kwargs) -> Tensor:
        if places is not None:
            return places.of(x) + self.fn.at(places, x, *args, **kwargs)
        return x + self.fn(x, *args, **kwargs)


def adapts_feedforward(lora: Sequence[LoRA] | None) -> bool:
    """Whether a layer's adapters are more than those of queries, keys, values and the way out of attention."""
    return lora is not None and len(lora) > 4


class ParallelTransformerBlock(nn.Module):
    """attention(norm x) + feedforward(norm x), q, k, v and feedforward from one bias-free projection.

    Of queries and keys each head may be normalised: its length (`qk_rmsnorm`), or its mean and variance
    (`qk_layernorm`). Without `rotates`, positions do not count.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        causal: bool = True,
        heads: int = 8,
        qk_rmsnorm: bool = False,
        ff_mult: int | float = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        use_xpos: bool = True,
        xpos_scale_base: float = 512,
        flash_attn: bool = False,
        *,
        kv_heads: int = 1,
        ff_inner_dim: int | None = None,
        norm_eps: float = 1e-5,
        rotary_emb: RotaryEmbedding | None = None,
        qk_layernorm: bool = False,
        rotates: bool = True,
    ):
        super().__init__()
        ff_inner = int(dim * ff_mult) if ff_inner_dim is None else ff_inner_dim
        if ff_inner < 1:
            raise ValueError(f"the feedforward needs a width of 1 or more, got {ff_inner} (ff_mult, ff_inner_dim)")
        attn_inner, kv_inner = dim_head * heads, dim_head * kv_heads
        self.heads, self.kv_heads = heads, kv_heads
        self.fused_dims = (attn_inner, kv_inner, kv_inner, 2 * ff_inner)
        self.norm = LayerNorm(dim, norm_eps)
        self.qk_rmsnorm, self.qk_layernorm, self.rotates = qk_rmsnorm, qk_layernorm, rotates
        if qk_rmsnorm and qk_layernorm:
            raise ValueError(
                "queries and keys are normalised by qk_rmsnorm or by qk_layernorm, not by both: choose one"
            )
        if qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(dim_head))
            self.k_scale = nn.Parameter(torch.ones(dim_head))
        if qk_layernorm:
            self.q_norm, self.k_norm = HeadsGain(heads, dim_head), HeadsGain(kv_heads, dim_head)
        self.attend = Attention(dropout=attn_dropout, causal=causal, use_flash_attn=flash_attn)
        self.rotary_emb = rotary_emb or RotaryEmbedding(dim_head, xpos_scale_base, use_xpos and causal)
        self.fused_attn_ff_proj = Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = Linear(attn_inner, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Dropout(ff_dropout), Linear(ff_inner, dim, bias=False))

    def new_lora(self, options: LoraOptions) -> nn.ModuleList:
        """Adapters for q, k, v and the attention output; with `ff` for the feedforward's value, gate and output too."""
        dim, (q, k, v, both), width = self.attn_out.out_features, self.fused_dims, self.ff_out[2].in_features
        sizes = [(dim, q), (dim, k), (dim, v), (q, dim)]
        if options.ff:
            sizes += [(dim, both - width), (dim, width), (width, dim)]
        return nn.ModuleList([LoRA(*size, options.r, options.alpha, options.rslora) for size in sizes])

    def adapted(self, lora: Iterable[LoRA]) -> list[tuple[Tensor, list[LoRA]]]:
        """Which rows of this block's weights, as views, the adapters change, and which adapters change them."""
        q, k, v, out, *ff = lora
        into = [q, k, v, *ff[:2]]
        rows = self.fused_attn_ff_proj.weight.data[: sum(adapter.B.shape[-1] for adapter in into)]
        return [(rows, into), (self.attn_out.weight.data, [out])] + [(self.ff_out[2].weight.data, ff[2:])] * bool(ff)

    def merge_lora(self, lora: Iterable[LoRA]) -> None:
        """Add the adapters to this block's weights, in place, rounded once where these are in half precision."""
        for weight, adapters in self.adapted(lora):
            sizes = [adapter.B.shape[-1] for adapter in adapters]
            for rows, adapter in zip(weight.split(sizes), adapters, strict=True):
                rows += adapter.weight.t()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        finetune_modules: Sequence[LoRA] | None = None,
        *,
        rotation: HeadsRotation | None = None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        repeated: RepeatedTokens | KnownTokens | None = None,
    ) -> Tensor:
        """x (b, n, d); mask as in `Attention`; `remember` stores new keys and values and returns all to attend to;
        `repeated` tells where x is the same.
        """
        attn_inner, kv_inner, *_ = self.fused_dims
        if repeated is None:
            qkv, ff = self.projected(self.norm(x), finetune_modules)
        else:
            qkv, ff = map(repeated.everywhere, repeated.projected(self, x, finetune_modules))
        qk, v = qkv.split((attn_inner + kv_inner, kv_inner), dim=-1)
        qk = self._normed(rearrange(qk, "b n (h d) -> b n h d", h=self.heads + self.kv_heads))
        if self.rotates:
            rotation = rotation or self.rotary_emb(x.shape[1]).over(self.heads, self.kv_heads)
            qk = rotation.rotate(qk)
        q, k = rearrange(qk, "b n h d -> b h n d").split((self.heads, self.kv_heads), dim=1)
        v = rearrange(v, "b n (h d) -> b h n d", h=self.kv_heads)
        if remember is not None:
            k, v = remember(k, v)
        out = rearrange(self.attend(q, k, v, mask=mask), "b h n d -> b n (h d)")
        return self._way_out(out, finetune_modules) + ff

    def at(
        self,
        places: Places,
        x: Tensor,
        mask: Tensor | None = None,
        finetune_modules: Sequence[LoRA] | None = None,
        *,
        rotation: HeadsRotation,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """What `forward` gives at m places (m, d): keys and values are those of all, the rest of these alone. mask:
        (b, j) for keys only where that is the whole truth.
        """
        columns, inside = places.columns, places.within_columns()
        normed = self.norm(x)
        q, kv, ff = self._project_apart(places.of(normed), normed, finetune_modules)
        q = rearrange(q, "m (h d) -> m h d", h=self.heads)
        k, v = rearrange(kv, "b n (two h d) -> two b n h d", two=2, h=self.kv_heads)
        queries, keys = slice(0, self.heads), slice(self.heads, None)
        q, k = inside.spread(self._normed(q, queries)), self._normed(k, keys)
        if self.rotates:
            q, k = rotation.some(queries, columns).rotate(q), rotation.some(keys).rotate(k)
        q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
        if remember is not None:
            k, v = remember(k, v)
        if mask is None and self.attend.causal:
            k, v = k[:, :, : columns.stop], v[:, :, : columns.stop]  # the queries are the last of these
        elif mask is not None and mask.ndim == 4:
            mask = mask[:, :, columns]
        out = inside.of(rearrange(self.attend(q, k, v, mask=mask), "b h n d -> b n (h d)"))
        return self._way_out(out, finetune_modules) + ff

    def _way_out(self, attended: Tensor, lora: Sequence[LoRA] | None) -> Tensor:
        """What the heads give, side by side (..., h d) -> (..., dim)."""
        out = self.attn_out(attended)
        return out if lora is None else out + lora[3](attended)

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of the products into the block, and out of its attention and its feedforward."""
        return self.fused_attn_ff_proj.weight, self.attn_out.weight, self.ff_out[2].weight

    @property
    def drops(self) -> bool:
        """Whether the feedforward drops out features, in every place others."""
        return self.training and self.ff_out[1].p > 0

    @property
    def heads_gains(self) -> Tensor:
        """What normalised queries and keys are multiplied by: (heads + kv_heads, d)."""
        if self.qk_layernorm:
            return torch.cat((self.q_norm.gamma, self.k_norm.gamma)) + 1
        return torch.cat((self.q_scale.expand(self.heads, -1), self.k_scale.expand(self.kv_heads, -1)))

    def _normed(self, qk: Tensor, heads: slice = slice(None)) -> Tensor:
        """Queries and keys (..., heads + kv_heads, d), or those of some heads, normalised where that is asked for."""
        if self.qk_layernorm:  # in the gains' precision, and rounded once
            gains = self.heads_gains[heads]
            return (F.layer_norm(qk.to(gains.dtype), qk.shape[-1:], eps=self.norm.eps) * gains).to(qk.dtype)
        return F.normalize(qk, dim=-1) * self.heads_gains[heads] if self.qk_rmsnorm else qk

    def projected(self, x: Tensor, lora: Sequence[LoRA] | None) -> tuple[Tensor, Tensor]:
        """x, normed (..., d) -> queries, keys and values side by side, and what the feedforward gives (..., d)."""
        if adapts_feedforward(lora):
            return self._project_adapted(x, lora)
        ff_out = self.ff_out[2]
        if not self.drops:
            qkv, ff = project_swiglu(x, self.fused_attn_ff_proj.weight, ff_out.weight)
        else:
            qkv, ff = split(self.fused_attn_ff_proj(x), ff_out.weight)
            ff = self.ff_out(ff)
        return self.beside(qkv, x, lora), ff

    def beside(self, qkv: Tensor, x: Tensor, lora: Sequence[LoRA] | None) -> Tensor:
        """What the weights make of x as queries, keys and values, and what adapters for these add to it."""
        return qkv if lora is None else qkv + side_by_side(lora[:3], x)

    def _project_apart(
        self, x: Tensor, everywhere: Tensor, lora: Sequence[LoRA] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (m, d) and what it is some of (b, n, d), both normed -> queries of x, keys and values side by side of all,
        and what the feedforward gives of x (m, d).
        """
        into, before, width = self.fused_attn_ff_proj.weight, self.fused_dims[0], sum(self.fused_dims[1:3])
        if self.drops or adapts_feedforward(lora):
            qkv, ff = self.projected(x, lora)
            q, kv = qkv[:, :before], linear(everywhere, into.narrow(0, before, width))
        else:
            q, ff, kv = project_swiglu(x, into, self.ff_out[2].weight, everywhere, width)
            q = q if lora is None else q + lora[0](x)
        return q, kv if lora is None else kv + side_by_side(lora[1:3], everywhere), ff

    def _project_adapted(self, x: Tensor, lora: Sequence[LoRA]) -> tuple[Tensor, Tensor]:
        """The same with adapters within the feedforward, where the fused function has no room for them."""
        q, k, v, _, value, gate, lora_out = lora
        activation, dropout, ff_out = self.ff_out
        fused = self.fused_attn_ff_proj(x) + side_by_side((q, k, v, value, gate), x)
        qkv, ff = split(fused, ff_out.weight)
        inner = dropout(activation(ff))
        return qkv, ff_out(inner) + lora_out(inner)
