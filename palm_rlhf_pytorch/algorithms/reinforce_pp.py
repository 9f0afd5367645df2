"""REINFORCE++: advantages are scaled over the whole batch, without a critic (Hu et al., 2501.03262v9)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, centred
from palm_rlhf_pytorch.algorithms.policy_gradient import PolicyGradient
from palm_rlhf_pytorch.algorithms.returns import token_rewards
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.ops import whiten


def k2(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """(log p - log p_ref)^2 / 2, whose gradient is that of KL(policy || start). Eq. 8."""
    return 0.5 * (log_probs - ref_log_probs) ** 2


class ReinforcePP(PolicyGradient):
    """A_t = R - beta (KL from t on), eq. 4, scaled to mean 0, variance 1 over all tokens of the batch, eq. 5."""

    defaults = {"kl": 0.01, "kl_in": "reward"}

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        mask = experience.response_mask
        to_come = token_rewards(experience, self.kl_in_reward).flip(-1).cumsum(dim=-1).flip(-1)
        return replace(experience, advantages=whiten(to_come, mask))


class ReinforcePPBaseline(GroupPolicyGradient):
    """With several samples of a prompt: R - their mean, eq. 6, scaled over the batch, eq. 7; k2 in the loss, eq. 8."""

    advantage = staticmethod(centred)
    kl_loss = staticmethod(k2)
    defaults = {"kl": 0.01}

    def target(self, experience: Experience) -> Experience:
        experience = super().target(experience)
        return replace(experience, advantages=whiten(experience.advantages, experience.response_mask))
