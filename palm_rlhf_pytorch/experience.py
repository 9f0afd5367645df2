"""What the policy did and what came of it: the one record that every on-policy algorithm learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.ops import groups_of_like_length

EXTRA = "extra/"


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
    scores: Tensor  # (b,) what the reward gave, less penalties
    finished: Tensor  # (b,) bool, the response ended with EOS
    group_ids: Tensor  # (b,) samples of one prompt share one
    raw_scores: Tensor | None = None  # (b,) before penalties, where there are any
    ref_log_probs: Tensor | None = None  # (b, n) of the frozen starting policy
    token_rewards: Tensor | None = None  # (b, n) what a process reward gave each token
    values: Tensor | None = None  # (b, n) of the prefix before token t
    advantages: Tensor | None = None  # (b, n)
    returns: Tensor | None = None  # (b, n)
    loss_shares: Tensor | None = None  # (b, n) what each token counts for in its minibatch's loss
    extra: dict[str, Tensor] = field(default_factory=dict)  # an algorithm's own: (b,), (b, 1, ...) or (b, n, ...)

    def __len__(self) -> int:
        return self.sequence.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """All there are by name, those of `extra` with its name before theirs."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        values.update({EXTRA + name: t for name, t in self.extra.items()})
        return {name: t for name, t in values.items() if t is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Experience:
        """The inverse of `tensors`."""
        own = {name: t for name, t in tensors.items() if not name.startswith(EXTRA)}
        extra = {name.removeprefix(EXTRA): t for name, t in tensors.items() if name.startswith(EXTRA)}
        return cls(**own, extra=extra)

    def with_extra(self, **tensors: Tensor) -> Experience:
        """With an algorithm's own (b,), (b, 1, ...) or (b, n, ...); of another width nothing would follow the rows."""
        b, n = self.sequence.shape
        for name, t in tensors.items():
            if t.shape[:1] != (b,) or (t.ndim > 1 and t.shape[1] not in (1, n)):
                shape = tuple(t.shape)
                raise ValueError(
                    f"an extra is ({b},), ({b}, 1, ...) or ({b}, {n}, ...), but {name!r} has shape {shape}"
                )
        return replace(self, extra={**self.extra, **tensors})

    def __getitem__(self, rows: Tensor | slice) -> Experience:
        """The record of some rows, cut to the longest of them."""
        part = {name: t[rows] for name, t in self.tensors().items()}
        lengths = (part["prompt_mask"] | part["response_mask"]).sum(dim=-1)
        longest = int(lengths.amax()) if len(lengths) else 0
        return self.of({name: t[:, :longest] if t.ndim > 1 else t for name, t in part.items()})  # a 1 stays a 1

    def to(self, device: torch.device | str) -> Experience:
        return self.of({name: t.to(device) for name, t in self.tensors().items()})

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
    def total_scores(self) -> Tensor:
        """Scores with what a process reward gave the tokens (b,)."""
        return self.scores if self.token_rewards is None else self.scores + self.token_rewards.sum(dim=-1)

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
        return self.of({name: torch.cat([padded(c[name], n) for c in done])[back] for name in done[0]})

    def parts(self, max_tokens: int | None = None, whole_groups: bool = False) -> list[Tensor]:
        """Row numbers of parts of like length, at most max_tokens positions each (a single row, or group, may have
        more). `whole_groups` keeps the samples of a prompt together.
        """
        lengths = self.mask.sum(dim=-1)
        if not whole_groups:
            return groups_of_like_length(lengths, max_tokens)
        _, group_of, counts = self.group_ids.unique(return_inverse=True, return_counts=True)
        longest = torch.zeros_like(counts).scatter_reduce(0, group_of, lengths, "amax")
        by_row = None if max_tokens is None else max_tokens // int(counts.max())  # a group has so many rows
        return [torch.isin(group_of, some).nonzero().squeeze(-1) for some in groups_of_like_length(longest, by_row)]

    @classmethod
    def cat(cls, parts: Sequence[Experience]) -> Experience:
        """One record of several, padded on the right to the longest. Groups of different parts stay apart."""
        n = max(part.sequence.shape[1] for part in parts)
        columns = [part.tensors() for part in parts]
        taken = 0
        for c in columns:
            c["group_ids"] = c["group_ids"] - c["group_ids"].min() + taken
            taken = int(c["group_ids"].max()) + 1

        return cls.of({name: torch.cat([padded(c[name], n) for c in columns]) for name in columns[0]})


def padded(t: Tensor, n: int) -> Tensor:
    """(b, m, ...) -> (b, n, ...), zeros behind; (b,) and (b, 1, ...) stay."""
    return t if t.ndim == 1 or t.shape[1] == 1 else F.pad(t, (*(0, 0) * (t.ndim - 2), 0, n - t.shape[1]))
