"""MaxRL: towards the likelihood of being right, not only the rate (Tajwar et al., 2602.02710)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, centred


def over_success(rewards: Tensor) -> Tensor:
    """(R - mean) / mean in each group of rewards (groups, g): the mean score of the successes less that of all, and 0
    where all fail or all succeed. As in the authors' code, 1e-6 too (tajwarfahim/maxrl, core_algos.py); the paper's
    number of it was not at hand. Other rewards than 0 and 1 are refused.
    """
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError(f"MaxRL needs rewards of 0 or 1, got from {rewards.min():.3g} to {rewards.max():.3g}")
    return centred(rewards) / (rewards.mean(dim=-1, keepdim=True) + 1e-6)


class MaxRL(GroupPolicyGradient):
    """With g samples its gradient is that of log p(success) = -sum_k (1 - p)^k / k, cut off after g - 1 terms: the
    Maclaurin expansion of 2602.02710, unnumbered on the authors' page (zanette-labs.github.io/MaxRL). The
    successes' mean score alone gives g terms, taking off that of all costs one. All tokens count the same: by sequence,
    the short answers of a group would count for more.
    """

    advantage = staticmethod(over_success)
    defaults = {"normalization": "token"}
    raw_scores = True

    def __init__(
        self, actor_optim: dict[str, Any] | None = None, own_optim: dict[str, Any] | None = None, **options: Any
    ):
        super().__init__(actor_optim, own_optim, **options)
        if self.kl_in_reward:
            raise ValueError("MaxRL needs rewards of 0 or 1, a KL in them is neither: take kl_in='loss'")
