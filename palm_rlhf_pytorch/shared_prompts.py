"""Prompts that several rows begin with are read once, in learning too. Liu et al., Prefix Grouper, 2506.05433."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.ops import lengths_to_mask
from palm_rlhf_pytorch.palm import PaLM

# of all positions; below it one pass costs less than two, on a GPU sooner: the second has a mask, which the fastest
# kernel of attention does not take
LEAST_SAVED = {"cpu": 0.1}
LEAST_SAVED_ELSEWHERE = 0.25


def predicting_embeds(
    palm: PaLM, sequence: Tensor, response_mask: Tensor, scope: str | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """The final embeddings (m, d) of sequence (b, n) at the places before response tokens, in the order of the mask."""
    shared = shared_prompts(sequence, response_mask) if segment_ids is None and may_share(palm) else None
    if shared is not None:
        return shared.embeds(palm, scope)
    if segment_ids is not None:
        segment_ids = segment_ids[:, :-1]
    embeds = palm(sequence[:, :-1], return_only_embedding=True, finetune_scope=scope, segment_ids=segment_ids)
    return embeds[response_mask[:, 1:]]


def may_share(palm: PaLM) -> bool:
    """Not with dropout, which every row has of its own; nor while compiling, where no shape may hang on the data."""
    drops = palm.training and any(module.p > 0 for module in palm.modules() if isinstance(module, nn.Dropout))
    return palm.causal and not drops and not torch.compiler.is_compiling()


@dataclass(frozen=True)
class SharedPrompts:
    """u different prompts, each without its last token, and b rows with what comes behind: r places."""

    prompts: Tensor  # (u, p) ids, padded on the right
    lengths: Tensor  # (b,) of each row's prompt, without its last token
    copy_of: Tensor  # (b,) which of the prompts it is
    rest: Tensor  # (b, r) ids from a prompt's last token to a response's last but one
    predicts: Tensor  # (b, r) bool, a response token follows
    uniform: bool  # all lengths are the same

    def embeds(self, palm: PaLM, scope: str | None = None) -> Tensor:
        """As `predicting_embeds`."""
        memory = PromptMemory(self)
        keywords = {"return_only_embedding": True, "finetune_scope": scope, "cache": memory}
        palm(self.prompts, **keywords)
        return palm(self.rest, **keywords)[self.predicts]


def shared_prompts(sequence: Tensor, response_mask: Tensor) -> SharedPrompts | None:
    """None where rows have too little in common."""
    b, n = sequence.shape
    places = torch.arange(n, device=sequence.device)
    lengths = (response_mask.int().argmax(dim=-1) - 1).clamp(min=0)
    behind_them = ((places * response_mask).amax(dim=-1) - lengths).clamp(min=0)
    shortest, longest, r = torch.stack((*lengths.aminmax(), behind_them.max())).tolist()
    most = (1 - LEAST_SAVED.get(sequence.device.type, LEAST_SAVED_ELSEWHERE)) * b * (n - 1)
    if longest == 0 or longest + b * r > most:
        return None
    heads = sequence[:, :longest].masked_fill(~lengths_to_mask(lengths, longest), -1)
    prompts, copy_of = heads.unique(dim=0, return_inverse=True)
    if prompts.numel() + b * r > most:
        return None
    places = lengths[:, None] + places[:r]
    predicts = response_mask[:, 1:].gather(1, places.clamp(max=n - 2)) & (places < n - 1)
    return SharedPrompts(
        prompts.clamp(min=0),
        lengths,
        copy_of,
        sequence.gather(1, places.clamp(max=n - 2)),
        predicts,
        shortest == longest,
    )


class PromptMemory:
    """Keys and values of shared prompts, with their graph: what `PaLM` takes for a cache, in two passes. That over the
    prompts keeps its keys and values; in the other every row finds those of its own prompt before it.
    """

    def __init__(self, shared: SharedPrompts):
        self.shared = shared
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.lengths = torch.zeros(1, dtype=torch.long, device=shared.lengths.device)  # one row stands for all
        self.centre = (shared.prompts.shape[1] + shared.rest.shape[1]) // 2
        self.filled = 0

    def reserve(self, n: int) -> None:
        """There is room for what is there."""

    def span(self, n: int) -> int:
        """How many slots the second pass looks at."""
        return self.filled + n

    def extend(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values (rows, kv_heads, n, d) -> all that its queries may look at, by position."""
        if first:
            self.kept[layer] = k, v
            return k, v
        before = (t[self.shared.copy_of] for t in self.kept[layer])
        return tuple(behind(old, new, positions) for old, new in zip(before, (k, v), strict=True))

    def advance(self, lengths: Tensor | int, most: int) -> None:
        """The first pass is over."""
        self.lengths, self.filled = self.shared.lengths[: 1 if self.shared.uniform else None], most


def behind(old: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """old (b, h, p, d) and new (b, h, r, d) at positions (b, r) -> (b, h, p + r, d). Where one row of positions stands
    for all, they follow p.
    """
    if len(positions) == 1:
        return torch.cat((old, new), dim=2)
    room = F.pad(old, (0, 0, 0, new.shape[2]))
    return room.scatter(2, positions[:, None, :, None].expand_as(new), new)
