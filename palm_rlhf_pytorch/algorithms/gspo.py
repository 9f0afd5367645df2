"""GSPO: ratios and clipping by the whole response, as rewards are (Zheng et al., 2507.18071)."""

from __future__ import annotations

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import ResponseOptions
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.policy_gradient import shared
from palm_rlhf_pytorch.ops import masked_mean


def per_token_mean(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """log s_i: the mean over a response's tokens (b, n), for each of them. 2507.18071, eq. 7."""
    return shared(masked_mean(log_ratio, mask, keepdim=True), log_ratio)


class GSPO(GRPO):
    """Eq. 5, a mean over responses, with the paper's clip ranges: a mean over tokens moves far less than a token."""

    Options = ResponseOptions
    normalization = "sequence"
    log_ratio = staticmethod(per_token_mean)
    defaults = {"eps_clip": 3e-4, "eps_clip_high": 4e-4}
