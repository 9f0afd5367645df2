"""The prompts that a policy practises on, as ids and as they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.batches import encode_prompt, pad_sequences
from palm_rlhf_pytorch.conversation import from_json
from palm_rlhf_pytorch.generation import check_integers, check_prompts
from palm_rlhf_pytorch.tokenizer import Tokenizer

TokenIds = Tensor | Sequence[Sequence[int] | Tensor]


def listed(prompts: Sequence[Sequence[int] | Tensor]) -> list[list[int]]:
    """Prompts of any lengths, each a list or a tensor (n,) of ids."""
    if not prompts:
        raise ValueError("there are no prompts: the list is empty")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            row = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError):
            got = f"{type(prompt).__name__} {str(prompt)[:40]}"
            raise TypeError(f"prompt {i} must be a list or a tensor (n,) of token ids, got {got}") from None
        if row.ndim != 1:
            raise ValueError(f"prompt {i} must be token ids (n,), got shape {tuple(row.shape)}")
        if not row.numel():
            raise ValueError(f"prompt {i} is empty; drop it or start it with a token")
        check_integers(row, f"ids of prompt {i}")
        rows.append(row.tolist())
    return rows


class Prompts:
    """Token ids (p, n), padded on the right with `pad_value`, or a list of prompts (n,) of any lengths. What a prompt
    has of `pad_value` at its end is taken off, in a list too.

    Drawn without repeats until all have been seen, then in a new order. texts: what they were given as, if as text.
    Raises TypeError and ValueError for what is no ids, and for prompts without any.
    """

    def __init__(self, ids: TokenIds, pad_value: int = 0, texts: Sequence[str] = ()):
        if isinstance(ids, list | tuple):
            ids, _ = pad_sequences(listed(ids), pad_value)
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            kind = type(ids).__name__
            raise TypeError(f"prompt token ids are a tensor (prompts, n) or a list of prompts, got a {kind}") from None
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"prompt token ids (prompts, n) are needed, got shape {tuple(ids.shape)}")
        check_integers(ids, "prompt ids")
        self.ids, self.pad_value, self.texts = ids.cpu().long(), pad_value, texts
        places = torch.arange(1, ids.shape[1] + 1)
        self.lengths = (places * (self.ids != pad_value)).amax(dim=-1)
        self.queue = torch.empty(0, dtype=torch.long)
        if int(self.lengths.min()) < 1:
            row = int(self.lengths.argmin())
            raise ValueError(f"prompt {row} is empty (only padding, id {pad_value}); drop it or start it with a token")

    @property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return int(self.lengths.min())

    @classmethod
    def gather(
        cls,
        prompts: Sequence[str] | None,
        prompts_path: str | Path | None,
        prompt_token_ids: TokenIds | None,
        tokenizer: Callable[[list[str]], Any] | None,
        pad_value: int = 0,
    ) -> Prompts:
        """From exactly one of texts (or lists of messages), a file with one a line, or ids. Texts are padded with the
        tokenizer's `pad_id`, if it has one, and begin with bos where the tokenizer is one of ours: so do the texts of
        pretraining.
        """
        if sum(x is not None for x in (prompts, prompts_path, prompt_token_ids)) != 1:
            raise ValueError("exactly one of prompts, prompts_path and prompt_token_ids is needed")
        if prompt_token_ids is not None:
            return cls(prompt_token_ids, pad_value)
        if isinstance(prompts, str):
            raise TypeError("prompts is a list of texts; a single text goes in as [text]")
        if prompts is not None:
            prompts = [from_json(prompt) for prompt in prompts]
        if prompts_path is not None:
            lines = Path(prompts_path).read_text(encoding="utf-8-sig").split("\n")
            prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise ValueError("there are no prompts: the list or file is empty")
        if tokenizer is None:
            raise ValueError("prompts of text need a tokenizer: a function from list[str] to token ids (b, n)")
        if isinstance(tokenizer, Tokenizer):
            ids, _ = pad_sequences([encode_prompt(tokenizer, prompt) for prompt in prompts], tokenizer.pad_id)
            return cls(ids, tokenizer.pad_id, prompts)
        ids = tokenizer(list(prompts))
        try:
            ids = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError):
            kind = type(ids).__name__
            raise TypeError(f"the tokenizer must make token ids (b, n) of a list of texts, got a {kind}") from None
        if ids.shape[:1] != (len(prompts),):
            raise ValueError(f"the tokenizer made ids of shape {tuple(ids.shape)} from {len(prompts)} prompts")
        return cls(ids, getattr(tokenizer, "pad_id", pad_value))

    def __len__(self) -> int:
        return len(self.ids)

    def check(self, num_tokens: int) -> None:
        check_prompts(self.ids, self.lengths, num_tokens)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Row numbers of the next `count` prompts (count,)."""
        while len(self.queue) < count:
            self.queue = torch.cat((self.queue, torch.randperm(len(self), generator=generator)))
        drawn, self.queue = self.queue[:count], self.queue[count:]
        return drawn

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (b, n), cut to the longest, and lengths (b,)."""
        lengths = self.lengths[rows]
        return self.ids[rows, : int(lengths.max())], lengths


class Remembered:
    """What a `Scorer` decodes with where a reward is to see prompts as they were given, a `Conversation` with its
    messages, and not as the text of their ids.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str]):
        self.tokenizer = tokenizer
        self.prompts = {tuple(encode_prompt(tokenizer, prompt)): prompt for prompt in prompts}

    def decode(self, ids: Sequence[int]) -> str:
        found = self.prompts.get(tuple(ids))
        return self.tokenizer.decode(ids) if found is None else found
