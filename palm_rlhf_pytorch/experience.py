"""What the policy did and what came of it: the one record that every on-policy algorithm learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


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
    ref_log_probs: Tensor  # (b, n) of the frozen starting policy
    scores: Tensor  # (b,) what the reward gave
    finished: Tensor  # (b,) bool, the response ended with EOS
    group_ids: Tensor  # (b,) samples of one prompt share one
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
        longest = int((part["prompt_mask"] | part["response_mask"]).sum(dim=-1).max())
        return replace(self, **{name: t[:, :longest] if t.ndim == 2 else t for name, t in part.items()})

    def to(self, device: torch.device | str) -> Experience:
        return replace(self, **{name: t.to(device) for name, t in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def lengths(self) -> Tensor:
        """Response lengths (b,)."""
        return self.response_mask.sum(dim=-1)

    @property
    def kl(self) -> Tensor:
        """The k1 estimate of KL(policy || start) by sequence (b,): the sum of log p - log p_ref over its tokens."""
        return (self.log_probs - self.ref_log_probs).sum(dim=-1)

    @classmethod
    def cat(cls, parts: Sequence[Experience]) -> Experience:
        """One record of several, padded on the right to the longest. Groups of different parts stay apart."""
        n = max(part.sequence.shape[1] for part in parts)
        columns = [part.tensors() for part in parts]
        taken = 0
        for c in columns:
            c["group_ids"] = c["group_ids"] - c["group_ids"].min() + taken
            taken = int(c["group_ids"].max()) + 1

        def column(name: str) -> Tensor:
            padded = [
                torch.nn.functional.pad(c[name], (0, n - c[name].shape[1])) if c[name].ndim == 2 else c[name]
                for c in columns
            ]
            return torch.cat(padded)

        return cls(**{name: column(name) for name in columns[0]})
