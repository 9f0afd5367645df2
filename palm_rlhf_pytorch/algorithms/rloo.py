"""RLOO: REINFORCE with the other samples' mean as a baseline (Ahmadian et al., 2402.14740)."""

from __future__ import annotations

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, ResponseOptions, mean_of_others
from palm_rlhf_pytorch.algorithms.policy_gradient import shared


def leave_one_out(rewards: Tensor) -> Tensor:
    """R_i - mean of the others' R, in each group of rewards (groups, g). 2402.14740, section 2.3, unnumbered."""
    return rewards - mean_of_others(rewards)


def of_sequence(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The whole response is one action: the sum over its tokens (b, n), for each of them."""
    return shared(log_ratio.sum(dim=-1, keepdim=True), log_ratio, mask.sum(dim=-1, keepdim=True))


class RLOO(GroupPolicyGradient):
    """The KL stands in the reward. Further steps on the same samples are clipped by the response's ratio, as TRL's. A
    response is one action, and counts as one: by token, a long one would count for more.
    """

    Options = ResponseOptions
    normalization = "sequence"
    advantage = staticmethod(leave_one_out)
    log_ratio = staticmethod(of_sequence)
    defaults = {"kl": 0.03, "kl_in": "reward"}
