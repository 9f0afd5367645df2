"""MaxRL: towards the likelihood of being right, not only the rate (Tajwar et al., 2602.02710)."""

from __future__ import annotations

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, centred


def over_success(rewards: Tensor) -> Tensor:
    """(R - mean) / mean in each group of rewards (groups, g): the mean score of the successes less that of all, and 0
    where all fail or all succeed. 1e-6 as in the paper's code. Other rewards than 0 and 1 are refused.
    """
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError(f"MaxRL needs rewards of 0 or 1, got from {rewards.min():.3g} to {rewards.max():.3g}")
    return centred(rewards) / (rewards.mean(dim=-1, keepdim=True) + 1e-6)


class MaxRL(GroupPolicyGradient):
    """With g samples its gradient is that of log p(success), cut off after g - 1 terms of its series."""

    advantage = staticmethod(over_success)
