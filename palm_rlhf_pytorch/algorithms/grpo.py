"""GRPO: an answer is as good as it is better than the others to its prompt, in their standard deviations.

Shao et al., "DeepSeekMath", 2402.03300.
"""

from __future__ import annotations

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, standardised


class GRPO(GroupPolicyGradient):
    """Each sequence counts the same, and k3 stands in the loss: 2402.03300, eq. 3; beta is that of its section 4.2."""

    advantage = staticmethod(standardised)
    defaults = {"kl": 0.04}
