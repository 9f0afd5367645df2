"""The parts of PaLM: norm, SwiGLU, and the block that runs attention and feedforward side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.attention import Attention
from palm_rlhf_pytorch.lora import LoRA, side_by_side
from palm_rlhf_pytorch.rotary import HeadsRotation, RotaryEmbedding
from palm_rlhf_pytorch.swiglu import SwiGLU, project_swiglu, split


class LayerNorm(nn.Module):
    """Layer normalisation without bias. The gain is gamma + 1, so weight decay pulls it to the identity."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.register_buffer("beta", torch.zeros(dim))  # always 0; it is part of the weights' names

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma + 1, self.beta, self.eps)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return x + self.fn(x, *args, **kwargs)


class ParallelTransformerBlock(nn.Module):
    """attention(norm x) + feedforward(norm x), q, k, v and feedforward from one bias-free projection."""

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
    ):
        super().__init__()
        ff_inner = int(dim * ff_mult) if ff_inner_dim is None else ff_inner_dim
        if ff_inner < 1:
            raise ValueError(f"the feedforward needs a width of 1 or more, got {ff_inner} (ff_mult, ff_inner_dim)")
        attn_inner, kv_inner = dim_head * heads, dim_head * kv_heads
        self.heads, self.kv_heads = heads, kv_heads
        self.fused_dims = (attn_inner, kv_inner, kv_inner, 2 * ff_inner)
        self.norm = LayerNorm(dim, norm_eps)
        self.qk_rmsnorm = qk_rmsnorm
        if qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(dim_head))
            self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.attend = Attention(dropout=attn_dropout, causal=causal, use_flash_attn=flash_attn)
        self.rotary_emb = rotary_emb or RotaryEmbedding(dim_head, xpos_scale_base, use_xpos and causal)
        self.fused_attn_ff_proj = nn.Linear(dim, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(attn_inner, dim, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Dropout(ff_dropout), nn.Linear(ff_inner, dim, bias=False))

    def new_lora(self, r: int) -> nn.ModuleList:
        """Adapters for q, k, v and the attention output."""
        dim, (q, k, v, _) = self.attn_out.out_features, self.fused_dims
        return nn.ModuleList([LoRA(dim, q, r), LoRA(dim, k, r), LoRA(dim, v, r), LoRA(q, dim, r)])

    def merge_lora(self, lora: Iterable[LoRA]) -> None:
        """Add the adapters to this block's weights, in place."""
        *qkv, out = lora
        update = torch.cat([adapter.weight for adapter in qkv], dim=-1).t()
        self.fused_attn_ff_proj.weight.data[: update.shape[0]] += update
        self.attn_out.weight.data += out.weight.t()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        finetune_modules: Sequence[LoRA] | None = None,
        *,
        rotation: HeadsRotation | None = None,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x (b, n, d); mask as in `Attention`; `remember` stores new keys and values and returns all to attend to."""
        x = self.norm(x)
        attn_inner, kv_inner, *_ = self.fused_dims
        qkv, ff = self._project(x)
        if finetune_modules is not None:
            *lora_qkv, lora_out = finetune_modules
            qkv = qkv + side_by_side(lora_qkv, x)
        qk, v = qkv.split((attn_inner + kv_inner, kv_inner), dim=-1)
        qk = rearrange(qk, "b n (h d) -> b n h d", h=self.heads + self.kv_heads)
        if self.qk_rmsnorm:
            gains = self.q_scale.expand(self.heads, -1), self.k_scale.expand(self.kv_heads, -1)
            qk = F.normalize(qk, dim=-1) * torch.cat(gains)
        rotation = rotation or self.rotary_emb(x.shape[1]).over(self.heads, self.kv_heads)
        qk = rearrange(rotation.rotate(qk), "b n h d -> b h n d")
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        v = rearrange(v, "b n (h d) -> b h n d", h=self.kv_heads)
        if remember is not None:
            k, v = remember(k, v)

        out = rearrange(self.attend(q, k, v, mask=mask), "b h n d -> b n (h d)")
        attended = self.attn_out(out)
        if finetune_modules is not None:
            attended = attended + lora_out(out)
        return attended + ff

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x, normed (b, n, d) -> queries, keys and values side by side, and what the feedforward gives (b, n, d)."""
        _, dropout, ff_out = self.ff_out
        if dropout.p == 0 or not self.training:
            return project_swiglu(x, self.fused_attn_ff_proj.weight, ff_out.weight)
        qkv, ff = split(self.fused_attn_ff_proj(x), ff_out.weight)
        return qkv, self.ff_out(ff)
