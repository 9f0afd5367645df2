"""GRPO: an answer is as good as it is better than the others to its prompt, in their standard deviations.

Shao et al., "DeepSeekMath", 2402.03300.
"""

from __future__ import annotations

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, centred


def standardised(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-4) in each group of rewards (groups, g), 0 in a flat one. 2402.03300, section 4.1.2."""
    return centred(rewards) / (rewards.std(dim=-1, keepdim=True) + 1e-4)


class GRPO(GroupPolicyGradient):
    """Each sequence counts the same, and k3 stands in the loss: 2402.03300, eq. 3; beta is that of its section 4.2."""

    advantage = staticmethod(standardised)
    defaults = {"kl": 0.04}
