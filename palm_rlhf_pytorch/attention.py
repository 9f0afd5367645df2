"""Attention of many query heads over few key/value heads, through torch's fused kernels or ours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.fused_attention import fits, fused_attention


def causal_key_mask(key_mask: Tensor) -> Tensor:
    """Key padding (b, n) -> which key each query may see, (b, 1, n, n): the past that is not padding, and itself.

    Itself also where it is padding: a query that sees nothing would turn into NaN and spread.
    """
    n = key_mask.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=key_mask.device).tril()
    itself = torch.eye(n, dtype=torch.bool, device=key_mask.device)
    return rearrange(key_mask, "b j -> b 1 1 j") & causal | itself


def segment_mask(segment_ids: Tensor, causal: bool) -> Tensor:
    """The documents of packed rows (b, n) -> which key each query may see, (b, 1, n, n): those of its own document, and
    of them, when causal, the past and itself.
    """
    same = rearrange(segment_ids, "b i -> b 1 i 1") == rearrange(segment_ids, "b j -> b 1 1 j")
    return same.tril() if causal else same


def window_mask(positions: Tensor, keys: int, window: int) -> Tensor:
    """Which of the keys at 0, 1, ... each query at positions (b, n) may see, (b, 1, n, keys): itself and the past, as
    far back as makes `window` of them.
    """
    key, query = torch.arange(keys, device=positions.device), rearrange(positions, "b i -> b 1 i 1")
    return (key <= query) & (key > query - window)


def added_to_scores(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what the kernels add, 0 or -inf. Made of a bool mask, every layer would make and keep its own."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def narrowed(mask: Tensor | None, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What a whole mask, bool or added to the scores, and `visible` both let through: added to the scores."""
    if mask is not None and mask.dtype != torch.bool:
        return mask.masked_fill(~visible, -torch.inf)
    return added_to_scores(visible if mask is None else mask & visible, dtype)


def shares_keys_under_masks(q: Tensor) -> bool:
    """Whether a fused kernel takes a mask where several heads share a key. On a GPU none does: torch would hold all
    scores, beside which repeated keys are small.
    """
    return not q.is_cuda


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v by `fused_attention`, where it fits, or by `scaled_dot_product_attention`.

    `use_flash_attn` is the reference's switch between two code paths. Here both values take the kernel that is best
    for the inputs, so by default too scores are not held in memory (except with dropout on a CPU). Of torch's, where
    the plain formula is wanted (second derivatives), wrap the call in `torch.nn.attention.sdpa_kernel`.
    """

    def __init__(self, dropout: float = 0.0, causal: bool = False, use_flash_attn: bool = False):
        super().__init__()
        self.causal = causal
        self.use_flash_attn = use_flash_attn
        self.attn_dropout = nn.Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q (b, h, n, d); k, v (b, j, d) for one shared head or (b, kv_heads, j, d) -> (b, h, n, d).

        mask: (b, j) bool, True for keys that are not padding; or (b, 1, n, j), the whole truth, causality too:
        bool, or added to the scores.
        """
        if k.ndim == 3:
            k, v = (rearrange(t, "b j d -> b 1 j d") for t in (k, v))
        causal = self.causal and (mask is None or mask.ndim == 2)
        if mask is not None and mask.ndim == 2:
            mask = causal_key_mask(mask) if causal else rearrange(mask, "b j -> b 1 1 j")
            causal = False
        dropout = self.attn_dropout.p if self.training else 0.0

        heads, kv_heads, n, j = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
        if n > 1 and dropout == 0 and fits(q, k, v, mask, causal):
            if mask is not None and mask.dtype == torch.bool:
                mask = added_to_scores(mask, q.dtype)
            return fused_attention(q, k, v, mask, causal)
        if causal and n != j:  # the queries are the last n positions
            mask, causal = torch.ones(n, j, dtype=torch.bool, device=q.device).tril(j - n), False
        if n == 1:  # decoding: the heads that share a key become one query axis, and no key is repeated
            q = rearrange(q, "b (kv g) 1 d -> b kv g d", kv=kv_heads)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            return rearrange(out, "b kv g d -> b (kv g) 1 d")
        shared = 1 < kv_heads < heads
        if kv_heads == 1:  # a view with stride 0: one head in memory, seen by all
            k, v = (t.expand(-1, heads, -1, -1) for t in (k, v))
        elif shared and mask is not None and not shares_keys_under_masks(q):
            k, v, shared = *(t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v)), False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=shared
        )
