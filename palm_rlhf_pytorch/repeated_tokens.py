"""What the first layer computes of a token before attention depends on nothing else, so it is computed once a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.products import only_computed

if TYPE_CHECKING:
    from palm_rlhf_pytorch.blocks import ParallelTransformerBlock
    from palm_rlhf_pytorch.lora import LoRA

LEAST = 256  # places; below, finding out costs more than it may save
WORTH = 0.75  # of the places are computed at most
ROUND = 128  # how many are computed is a multiple of it: oneDNN gets ready anew, and keeps it, for every other number


class RepeatedTokens(NamedTuple):
    """Which places (b, n) hold the same token: u different ones, and some over again to fill up."""

    first: Tensor  # (u,) a place that holds each, counted over b and n
    which: Tensor  # (b, n) the token's number among the u

    def once(self, x: Tensor) -> Tensor:
        """x (b, n, d), the same wherever a token is -> (u, d)."""
        return x.flatten(0, 1).index_select(0, self.first)

    def projected(
        self, block: ParallelTransformerBlock, x: Tensor, lora: Sequence[LoRA] | None
    ) -> tuple[Tensor, Tensor]:
        """The block's projections of x (b, n, d), once for each token: (u, ...)."""
        return block.projected(block.norm(self.once(x)), lora)

    def everywhere(self, x: Tensor) -> Tensor:
        """(u, d) -> (b, n, d)."""
        return everywhere(x, self.which)


def everywhere(x: Tensor, which: Tensor) -> Tensor:
    """The rows of x (u, d) that places (b, n) hold: (b, n, d)."""
    return x.index_select(0, which.flatten()).unflatten(0, which.shape)


def repeated_tokens(ids: Tensor) -> RepeatedTokens | None:
    """The repetitions among ids (b, n); None where they are not worth it. Only on a CPU: how many tokens differ decides
    shapes, for which a GPU would be waited for, and which may not hang on the data while compiling.
    """
    if not only_computed(ids) or ids.device.type != "cpu" or ids.numel() < LEAST:
        return None
    different, which = ids.unique(return_inverse=True)
    u = -(-len(different) // ROUND) * ROUND
    if u > WORTH * ids.numel():
        return None
    places = torch.arange(ids.numel(), device=ids.device)
    first = places.new_zeros(u).scatter_reduce_(0, which.flatten(), places, "amin", include_self=False)
    return RepeatedTokens(first, which)
