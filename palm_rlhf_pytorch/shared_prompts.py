"""Prompts that several rows begin with are read once, in learning too. Liu et al., Prefix Grouper, 2506.05433."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.ops import LEAST_TOKENS, lengths_to_mask
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.products import ROWS

DEVICES = ("cpu", "cuda")  # where copies can be found in every version of torch


def predicting_embeds(
    palm: PaLM, sequence: Tensor, response_mask: Tensor, scope: str | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """The final embeddings (m, d) of sequence (b, n) at the places before response tokens, in the order of the mask."""
    shared = shared_prompts(sequence, response_mask) if segment_ids is None and may_share(palm) else None
    if shared is not None and shared.pays(palm, sequence):
        return shared.embeds(palm, scope)
    # the last token predicts nothing: it stays only where rows come out even with it, as products want them
    n = sequence.shape[1] - (sequence.device.type != "cpu" or sequence.numel() % ROWS > 0)
    places = F.pad(response_mask[:, 1:], (0, 1))[:, :n]
    segment_ids = None if segment_ids is None else segment_ids[:, :n]
    keywords = {"finetune_scope": scope, "segment_ids": segment_ids, "places": places}
    return palm(sequence[:, :n], return_only_embedding=True, **keywords)


def may_share(palm: PaLM) -> bool:
    """Not with dropout, which every row has of its own; nor while compiling, where no shape may hang on the data."""
    drops = palm.training and any(module.p > 0 for module in palm.modules() if isinstance(module, nn.Dropout))
    return palm.causal and palm.device.type in DEVICES and not drops and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class SharedPrompts:
    """u different prompts, each without its last token, and b rows with what comes behind: r places."""

    prompts: Tensor  # (u, p) ids, padded on the right
    lengths: Tensor  # (b,) of each row's prompt, without its last token
    copy_of: Tensor  # (b,) which of the prompts it is
    rest: Tensor  # (b, r) ids from a prompt's last token to a response's last but one
    predicts: Tensor  # (b, r) bool, a response token follows
    uniform: bool  # all lengths are the same

    def pays(self, palm: PaLM, sequence: Tensor) -> bool:
        """Whether two passes, over the prompts and over what is behind them, cost less than one over all."""
        b, n = sequence.shape
        (u, p), r = self.prompts.shape, self.rest.shape[1]
        if not self.uniform and p + r > 2 * palm.dim:
            return False  # the mask, which rows then have each of their own, would outgrow a layer's activations
        # of a pair of positions in attention, in what the matrices cost a position: half as fast as they are
        pair = 4 * palm.heads * palm.dim_head / sum(w.numel() for w in palm.layers[0].parameters() if w.ndim == 2)
        whole = b * (n - 1) * (1 + pair * (n - 1) / 2)
        once, behind = u * p * (1 + pair * p / 2), b * r * (1 + pair * (p + r))  # a mask hides no work from a kernel
        but_the_last = 1 - 1 / len(palm.layers)  # of the layers: there, prompts are hardly computed either way
        return LEAST_TOKENS.get(sequence.device.type, 4096) < (whole - once - behind) * but_the_last

    def embeds(self, palm: PaLM, scope: str | None = None) -> Tensor:
        """As `predicting_embeds`."""
        keywords = {"return_only_embedding": True, "finetune_scope": scope}
        first = PromptPass(self)
        palm(self.prompts, cache=first, places=torch.zeros_like(self.prompts, dtype=torch.bool), **keywords)
        return palm(self.rest, cache=ResponsePass(self, first.hand_over()), places=self.predicts, **keywords)


def shared_prompts(sequence: Tensor, response_mask: Tensor) -> SharedPrompts | None:
    """What the rows of sequence (b, n) have in common before their first response tokens; None if nothing."""
    b, n = sequence.shape
    if b * n == 0:
        return None
    places = torch.arange(n, device=sequence.device)
    lengths = (response_mask.int().argmax(dim=-1) - 1).clamp(min=0)
    lengths = torch.where(response_mask.any(dim=-1), lengths, lengths.max())  # rows without a response fit in anywhere
    ends = (places * response_mask).amax(dim=-1)
    shortest, longest, r = torch.stack((*lengths.aminmax(), (ends - lengths).max())).tolist()
    if longest == 0:
        return None
    heads = sequence[:, :longest].masked_fill(~lengths_to_mask(lengths, longest), -1)
    prompts, copy_of = heads.unique(dim=0, return_inverse=True)
    if len(prompts) == b:
        return None
    places = lengths[:, None] + places[:r]
    predicts = response_mask[:, 1:].gather(1, places.clamp(max=n - 2)) & (places < n - 1)
    rest = sequence.gather(1, places.clamp(max=n - 2))
    return SharedPrompts(prompts, lengths, copy_of, rest, predicts, shortest == longest)


class PromptPass:
    """What `PaLM` takes for a cache (see `kv_cache.Memory`) while it reads the prompts: keeps their keys and values."""

    recomputable = True
    filled = 0

    def __init__(self, shared: SharedPrompts):
        self.lengths = torch.zeros(1, dtype=torch.long, device=shared.lengths.device)  # one row stands for all
        self.centre = centre_of(shared)
        self.kept: list[tuple[Tensor, Tensor]] | None = []

    def reserve(self, n: int) -> None:
        """There is room for what is there."""

    def span(self, n: int) -> int:
        """The prompts look at themselves alone."""
        return n

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values (u, kv_heads, p, d). Copies: what was computed beside them may go."""
        if self.kept is not None:
            self.kept.append((k.clone(), v.clone()))
        return k, v

    def advance(self, lengths: Tensor | int, most: int) -> None:
        """Nothing follows in this pass."""

    def hand_over(self) -> list[tuple[Tensor, Tensor]]:
        """Layer by layer what was kept; from now on nothing is. A layer that is computed again for the backward pass
        must not keep its results, and what it holds until then must not lead to them: it would never be freed.
        """
        kept, self.kept = self.kept, None
        return kept


class ResponsePass:
    """The same for what is behind the prompts: every row finds the keys and values of its own prompt before it."""

    recomputable = True

    def __init__(self, shared: SharedPrompts, kept: list[tuple[Tensor, Tensor]]):
        self.kept, self.copy_of = kept, shared.copy_of
        self.lengths = shared.lengths[:1] if shared.uniform else shared.lengths
        self.centre = centre_of(shared)
        self.filled = shared.prompts.shape[1]

    def reserve(self, n: int) -> None:
        """There is room for what is there."""

    def span(self, n: int) -> int:
        """How many slots these places look at."""
        return self.filled + n

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """A layer's keys and values (b, kv_heads, r, d) -> those of the prompts and these, slot by position."""
        of_prompts = (t.index_select(0, self.copy_of) for t in self.kept[layer])
        return tuple(appended(old, new, positions) for old, new in zip(of_prompts, (k, v), strict=True))

    def advance(self, lengths: Tensor | int, most: int) -> None:
        """Nothing follows."""


def centre_of(shared: SharedPrompts) -> int:
    """The middle of all positions, for xpos."""
    return (shared.prompts.shape[1] + shared.rest.shape[1]) // 2


def appended(old: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """old (b, h, p, d) and new (b, h, r, d) at positions (b, r) -> (b, h, p + r, d). Where one row of positions stands
    for all, they follow p.
    """
    if len(positions) == 1:
        return torch.cat((old, new), dim=2)
    room = F.pad(old, (0, 0, 0, new.shape[2]))
    return room.scatter(2, positions[:, None, :, None].expand_as(new), new)
