"""Reward models as functions of text, each with a tokenizer of its own."""

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
    response are rated as one text (for models trained on rated texts without prompts).
    """

    def __init__(self, members: Sequence[tuple[RewardModel, Tokenizer]], whole: bool = False, max_len: int = 512):
        if not members:
            raise ValueError("a text reward needs at least one reward model")
        self.members, self.whole, self.max_len = list(members), whole, max_len

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """-> scores (b,)"""
        pairs = zip(prompts, responses, strict=True)
        texts = [Rating("", p + r, 0.0) if self.whole else Rating(p, r, 0.0) for p, r in pairs]
        scores = [
            score_all(model, encode_ratings(texts, tokenizer, self.max_len), tokenizer.pad_id)
            for model, tokenizer in self.members
        ]
        return torch.stack(scores).mean(dim=0)
