"""Advantages of whole responses, from the scores of a prompt's samples: what GRPO and its kin share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palm_rlhf_pytorch.algorithms.policy_gradient import (
    ClipOptions,
    MeanOptions,
    PenaltyOptions,
    PolicyGradient,
)
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import from_groups, masked_mean, to_groups


@dataclass(frozen=True)
class SampleOptions:
    """How many answers are compared"""

    samples_per_prompt: int = option(8, "answers to each prompt", least=2)


@dataclass(frozen=True)
class ResponseOptions(SampleOptions, ClipOptions, PenaltyOptions):
    """How the answers to a prompt are compared and learned from, where what the loss is a mean over is settled"""


@dataclass(frozen=True)
class GroupOptions(ResponseOptions, MeanOptions):
    """How the answers to a prompt are compared and learned from"""


def centred(rewards: Tensor) -> Tensor:
    """R - mean over a group; rewards (groups, g)."""
    return rewards - rewards.mean(dim=-1, keepdim=True)


def standardised(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(R - mean) / (std + eps) in each group of rewards (groups, g), the variance over g - 1; 0 in a flat one. GRPO,
    2402.03300, section 4.1.2, unnumbered.
    """
    return centred(rewards) / (rewards.std(dim=-1, keepdim=True) + eps)


def mean_of_others(values: Tensor) -> Tensor:
    """For each of a group (groups, g) the mean of the rest."""
    return (values.sum(dim=-1, keepdim=True) - values) / (values.shape[-1] - 1)


def dense_advantages(rewards: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """What is to come of a process reward (b, n), each token's less the mean over tokens of the prompt's other samples.
    PRIME, 2502.01456, eq. 5, without discount.
    """
    others = from_groups(mean_of_others(to_groups(masked_mean(rewards, mask), group_ids)), group_ids)
    return ((rewards - others[:, None]) * mask).flip(-1).cumsum(dim=-1).flip(-1) * mask


class GroupPolicyGradient(PolicyGradient):
    """A subclass says by `advantage` how rewards are compared."""

    Options = GroupOptions
    advantage: Callable[[Tensor], Tensor]  # rewards (groups, g) -> advantages (groups, g)

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        """Advantages of R = score - beta log p / p_ref over the response: 1909.08593, eq. 2. A KL in the loss has no
        part in R.
        """
        mask, group_ids, beta = experience.response_mask, experience.group_ids, self.kl_in_reward
        rewards = experience.scores - beta * experience.kl if beta else experience.scores
        compared = from_groups(self.advantage(to_groups(rewards, group_ids)), group_ids)
        advantages = compared[:, None] * mask
        if experience.token_rewards is not None:
            advantages = advantages + dense_advantages(experience.token_rewards, mask, group_ids)
        return replace(experience, advantages=advantages)
