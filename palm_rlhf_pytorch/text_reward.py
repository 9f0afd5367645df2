"""Reward models as functions of text, each with a tokenizer of its own; prompts with roles stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palm_rlhf_pytorch.data import Rating
from palm_rlhf_pytorch.rating import encode_ratings, score_all
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.tokenizer import Tokenizer


class TextReward:
    """The mean score of several reward models: a reward for `RLHFTrainer` that takes (prompts, responses) as text.

    Models that divide text differently err differently, so their mean is better than each. With `whole`, prompt and
    response are rated as one text (for models trained on rated texts without prompts). chat: for each model whether a
    `Conversation` keeps its roles, which the model's tokenizer has a template for, or is plain text to it (None: it
    keeps them where there is a template).
    """

    def __init__(
        self,
        members: Sequence[tuple[RewardModel, Tokenizer]],
        whole: bool = False,
        max_len: int = 512,
        chat: Sequence[bool] | None = None,
    ):
        if not members:
            raise ValueError("a text reward needs at least one reward model")
        self.members, self.whole, self.max_len = list(members), whole, max_len
        self.chat = [tokenizer.has_chat for _, tokenizer in members] if chat is None else list(chat)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """-> scores (b,)"""
        pairs = list(zip(prompts, responses, strict=True))
        scores = []
        for (model, tokenizer), chat in zip(self.members, self.chat, strict=True):
            texts = [("", p + r) if self.whole else (p if chat else str(p), r) for p, r in pairs]
            rows = encode_ratings([Rating(p, r, 0.0) for p, r in texts], tokenizer, self.max_len)
            scores.append(score_all(model, rows, tokenizer.pad_id))
        return torch.stack(scores).mean(dim=0)
