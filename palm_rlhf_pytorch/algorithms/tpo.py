"""TPO: first the distribution that a group should have, then cross-entropy to it (Kaddour, 2604.06159)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch.actor import PolicyOutput
from palm_rlhf_pytorch.algorithm import Algorithm, Losses, less_entropy
from palm_rlhf_pytorch.algorithms.groups import centred
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import from_groups, to_groups


@dataclass(frozen=True)
class TPOOptions:
    """How TPO learns"""

    samples_per_prompt: int = option(8, "answers to each prompt", least=2)
    eta: float = option(1.0, "temperature of the target: the larger, the closer to the old policy", least=1e-6)
    entropy: float = option(0.0, "weight of the entropy bonus")


def z_scores(rewards: Tensor, flat: float = 1e-6) -> Tensor:
    """Rewards (groups, g) to mean 0 and population variance 1 in each group; 0 where all are equal. Appendix A."""
    std = rewards.std(dim=-1, keepdim=True, correction=0)
    return torch.where(std > flat, centred(rewards) / std.clamp(min=flat), 0.0)


def target_distribution(log_probs: Tensor, rewards: Tensor, eta: float) -> Tensor:
    """q = softmax(log p_old + u / eta) over each group, eq. 2: log_probs of whole responses and rewards (groups, g)."""
    return (log_probs.log_softmax(dim=-1) + z_scores(rewards) / eta).softmax(dim=-1)


class TPO(Algorithm):
    """-sum_i q_i log softmax_i(sum_t log p(y_i,t)), a mean over prompts, eq. 3: its gradient by log p(y_i) is p - q."""

    Options = TPOOptions
    normalization = "sequence"
    whole_groups = True

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        log_probs, rewards = (
            to_groups(t, experience.group_ids) for t in (experience.log_probs.sum(dim=-1), experience.total_scores)
        )
        q = target_distribution(log_probs, rewards, self.options.eta)
        return experience.with_extra(tpo_target=from_groups(q, experience.group_ids))

    def loss(self, policy: PolicyOutput, experience: Experience) -> Losses:
        group_ids = experience.group_ids
        q, log_probs = (to_groups(t, group_ids) for t in (experience.extra["tpo_target"], policy.log_probs.sum(dim=-1)))
        log_p = log_probs.log_softmax(dim=-1)
        # samples count for the same, prompts are to: a group's sum, not its mean
        policy_loss = from_groups(-q * log_p, group_ids) * self.samples_per_prompt
        distance = (torch.special.entr(q).neg() - q * log_p).sum(dim=-1, keepdim=True).expand_as(q)
        numbers = {
            "policy_loss": policy_loss,
            "kl_to_target": from_groups(distance, group_ids),
            "entropy": policy.entropy,
        }
        return less_entropy(policy_loss, policy, self.options.entropy), numbers
