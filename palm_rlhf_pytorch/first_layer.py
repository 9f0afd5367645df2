"""What the first layer makes of each token of a vocabulary before attention, where that is small enough to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.blocks import ParallelTransformerBlock, adapts_feedforward
from palm_rlhf_pytorch.lora import LoRA
from palm_rlhf_pytorch.products import only_computed
from palm_rlhf_pytorch.repeated_tokens import WORTH, everywhere

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM


class Tokens(NamedTuple):
    """Of every token: its normed embedding (v, dim), queries, keys and values side by side (v, o), not yet turned, and
    what the feedforward gives (v, dim).
    """

    normed: Tensor
    qkv: Tensor
    ff: Tensor


@torch.no_grad()
def before_attention(palm: PaLM) -> Tokens:
    """By the weights alone, without adapters."""
    block = palm.layers[0].fn
    normed = block.norm(palm.token_emb.weight)
    return Tokens(normed, *block.projected(normed, None))


def is_small(palm: PaLM) -> bool:
    """Whether `Tokens` take no more memory than the weights that they stand for."""
    block = palm.layers[0].fn
    return palm.num_tokens * (sum(block.fused_dims[:3]) + 2 * palm.dim) <= block.fused_attn_ff_proj.weight.numel()


class KnownTokens(NamedTuple):
    """Places (b, n) that hold tokens of which all is known: to be used like `RepeatedTokens`."""

    which: Tensor
    tokens: Tokens

    def projected(
        self, block: ParallelTransformerBlock, x: Tensor, lora: Sequence[LoRA] | None
    ) -> tuple[Tensor, Tensor]:
        normed, qkv, ff = self.tokens
        return block.beside(qkv, normed, lora), ff

    def everywhere(self, x: Tensor) -> Tensor:
        return everywhere(x, self.which)


class FirstLayer:
    """`Tokens` of frozen weights, made when they are first asked for and again when weights were written to.

    A write through `.data` is not seen: whoever keeps this answers for there being none.
    """

    def __init__(self) -> None:
        self.tokens: Tokens | None = None
        self.made_of: tuple[Tensor, ...] = ()  # kept, so that no other tensor can take their places
        self.written: list[tuple[int, int, int]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Copies and files of a model keep nothing: nobody would answer for them."""
        return type(None), ()

    def known(self, palm: PaLM, ids: Tensor, lora: Sequence[LoRA] | None) -> KnownTokens | None:
        """What is kept, for places `ids` (b, n); None where it does not fit or does not pay."""
        block = palm.layers[0].fn
        into, _, out = block.matrices
        weights = palm.token_emb.weight, block.norm.gamma, into, out
        if not only_computed(ids, *weights) or ids.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        if any(w.requires_grad or w.is_inference() for w in weights) or adapts_feedforward(lora):
            return None
        if palm.num_tokens > WORTH * ids.numel() or not is_small(palm):
            return None
        written = [(id(w), w.data_ptr(), w._version) for w in weights]
        if self.tokens is None or written != self.written:
            with torch.inference_mode(False):  # for those who will learn with it
                self.tokens, self.made_of, self.written = before_attention(palm), weights, written
        return KnownTokens(ids, self.tokens)
