"""KTO: learning from single responses, each labelled desirable or not (Ethayarajh et al., 2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palm_rlhf_pytorch.batches import Row, encode_response
from palm_rlhf_pytorch.data import Labelled
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.tokenizer import Tokenizer


@dataclass(frozen=True)
class KTO:
    """How labelled responses are learned from"""

    beta: float = option(0.1, "how much a log-ratio is worth")
    desirable_weight: float = option(
        1.0, "weight of desirable responses; times their number best 1 to 1.5 times the same of the others", least=0
    )
    undesirable_weight: float = option(1.0, "weight of undesirable responses", least=0)

    needs_reference: ClassVar[bool] = True
    both_learn: ClassVar[bool] = False  # row 1 only measures

    def __post_init__(self):
        if not self.beta > 0:
            raise ValueError(f"beta must be above 0, got {self.beta}: without it nothing would be learned")

    def __call__(
        self, log_probs: Tensor, reference: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed log-probs under policy and reference (2, b), and labels (b,) bool -> losses (b,), and numbers.

        Row 0 is of responses to their own prompts, row 1 of responses to others'. 2402.01306, eq. 8:
        L = lambda_y - v, v = lambda_D sigma(beta (r - z0)) where desirable, lambda_U sigma(beta (z0 - r)) where not,
        r = log(pi / pi_ref) in row 0, and z0 = max(0, mean of log(pi / pi_ref) in row 1), without gradient.
        """
        ratios = log_probs - reference
        r, z0 = ratios[0], ratios[1].detach().mean().clamp(min=0)
        weights = torch.where(labels, self.desirable_weight, self.undesirable_weight)
        losses = weights * (1 - torch.where(labels, r - z0, z0 - r).mul(self.beta).sigmoid())
        rewards = self.beta * r
        numbers = {  # a mean of nothing is NaN, which is passed over
            "accuracy": ((r > z0) == labels).float().mean(),
            "kl": z0,
            "desirable_reward": rewards[labels].mean(),
            "undesirable_reward": rewards[~labels].mean(),
            "desirable_log_prob": log_probs[0][labels].mean(),
            "undesirable_log_prob": log_probs[0][~labels].mean(),
        }
        return losses, {name: number.detach() for name, number in numbers.items()}

    def answers(
        self, responses: Sequence[Labelled], tokenizer: Tokenizer, max_len: int
    ) -> tuple[list[Row], list[Row], Tensor]:
        """Each response to its own prompt, another's to that prompt, and the labels (m,)."""
        own = [encode_response(tokenizer, r.prompt, r.response, max_len) for r in responses]
        others = [responses[i].response for i in mismatched(responses)]
        foreign = [encode_response(tokenizer, r.prompt, o, max_len) for r, o in zip(responses, others, strict=True)]
        return own, foreign, torch.tensor([r.label for r in responses])


def mismatched(responses: Sequence[Labelled]) -> list[int]:
    """For each response the number of another one, to another prompt: the next longer, or after the longest the
    shortest. The pairs of a batch of like lengths are then of like lengths too, and always the same, so that the
    reference need read them once.
    """
    order = sorted(range(len(responses)), key=lambda i: len(responses[i].response))
    found = [0] * len(responses)
    for place, i in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        partner = next((j for j in following if responses[j].prompt != responses[i].prompt), None)
        if partner is None:
            raise ValueError("KTO measures its KL on answers to other prompts, so it needs at least two prompts, got 1")
        found[i] = partner
    return found
