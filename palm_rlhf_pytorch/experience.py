"""What the policy did and what came of it: the one record that every on-policy algorithm learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.ops import groups_of_like_length


@dataclass
class Experience:
    """b sequences of prompt and response, right padded. Nothing here has a vocabulary axis.

    Token fields (b, n) are aligned to the sequence: place t speaks of token t. Floats are float32 without a graph,
    and 0 outside the response mask.
    """

    sequence: Tensor  # (b, n) token ids
    prompt_mask: Tensor  # (b, n) bool
    response_mask: Tensor  # (b, n) bool, the first EOS included
    log_probs: Tensor  # (b, n) of the policy that sampled, at its temperature
    scores: Tensor  # (b,) what the reward gave
    finished: Tensor  # (b,) bool, the response ended with EOS
    group_ids: Tensor  # (b,) samples of one prompt share one
    ref_log_probs: Tensor | None = None  # (b, n) of the frozen starting policy
    values: Tensor | None = None  # (b, n) of the prefix before token t
    advantages: Tensor | None = None  # (b, n)
    returns: Tensor | None = None  # (b, n)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in values.items() if t is not None}

    def __getitem__(self, rows: Tensor | slice) -> Experience:
        """The record of some rows, cut to the longest of them."""
        part = {name: t[rows] for name, t in self.tensors().items()}
        longest = int((part["prompt_mask"] | part["response_mask"]).sum(dim=-1).amax())
        return replace(self, **{name: t[:, :longest] if t.ndim == 2 else t for name, t in part.items()})

    def to(self, device: torch.device | str) -> Experience:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def mask(self) -> Tensor:
        """Real tokens (b, n)."""
        return self.prompt_mask | self.response_mask

    @property
    def lengths(self) -> Tensor:
        """Response lengths (b,)."""
        return self.response_mask.sum(dim=-1)

    @property
    def kl(self) -> Tensor | None:
        """The k1 estimate of KL(policy || start) by sequence (b,): the sum of log p - log p_ref over its tokens."""
        return None if self.ref_log_probs is None else (self.log_probs - self.ref_log_probs).sum(dim=-1)

    def by_length(self, compute: Callable[[Experience], Experience], max_tokens: int | None = None) -> Experience:
        """What `compute` makes of rows of like length, a group at a time (see `groups_of_like_length`), in the order
        of these rows.
        """
        groups = groups_of_like_length(self.mask.sum(dim=-1), max_tokens)
        done = [compute(self[rows]).tensors() for rows in groups]
        back = torch.cat(groups).argsort()
        n = self.sequence.shape[1]
        return replace(self, **{name: torch.cat([padded(c[name], n) for c in done])[back] for name in done[0]})

    @classmethod
    def cat(cls, parts: Sequence[Experience]) -> Experience:
        """One record of several, padded on the right to the longest. Groups of different parts stay apart."""
        n = max(part.sequence.shape[1] for part in parts)
        columns = [part.tensors() for part in parts]
        taken = 0
        for c in columns:
            c["group_ids"] = c["group_ids"] - c["group_ids"].min() + taken
            taken = int(c["group_ids"].max()) + 1

        return cls(**{name: torch.cat([padded(c[name], n) for c in columns]) for name in columns[0]})


def padded(t: Tensor, n: int) -> Tensor:
    """(b, m) -> (b, n), zeros behind; (b,) stays."""
    return F.pad(t, (0, n - t.shape[1])) if t.ndim == 2 else t
