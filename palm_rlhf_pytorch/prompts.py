"""The prompts that a policy practises on, as ids and as they were given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf_pytorch.batches import encode_prompt, pad_sequences
from palm_rlhf_pytorch.conversation import from_json
from palm_rlhf_pytorch.generation import check_prompts
from palm_rlhf_pytorch.tokenizer import Tokenizer

TokenIds = Tensor | Sequence[Sequence[int] | Tensor]


def side_by_side(prompts: Sequence[Sequence[int] | Tensor], pad_value: int) -> Tensor:
    """Prompts (n,) of any lengths -> (p, n), padded on the right."""
    wanted = "prompt token ids are a tensor (prompts, n) or a list of prompts, each a list or tensor (n,) of ids"
    try:
        rows = [torch.as_tensor(prompt) for prompt in prompts]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}; got what is no number") from None
    if not rows:
        raise ValueError(f"{wanted}; got none")
    for i, row in enumerate(rows):
        if row.ndim != 1:
            raise ValueError(f"{wanted}; number {i} has shape {tuple(row.shape)}")
    return pad_sequence(rows, batch_first=True, padding_value=pad_value)


class Prompts:
    """Token ids (p, n), padded on the right with `pad_value`, or a list of prompts (n,) of any lengths; only trailing
    padding is taken off a prompt.

    Drawn without repeats until all have been seen, then in a new order. texts: what they were given as, if as text.
    """

    def __init__(self, ids: TokenIds, pad_value: int = 0, texts: Sequence[str] = ()):
        ids = ids if isinstance(ids, Tensor) else side_by_side(ids, pad_value)
        if ids.ndim != 2 or ids.numel() == 0:
            raise ValueError(f"prompt token ids (prompts, n) are needed, got shape {tuple(ids.shape)}")
        self.ids, self.pad_value, self.texts = ids.cpu(), pad_value, texts
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
