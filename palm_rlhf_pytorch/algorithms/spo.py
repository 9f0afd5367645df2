"""SPO: a penalty where PPO clips, so that no gradient is lost (Xie et al., Simple Policy Optimization, 2401.16025)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.policy_gradient import PolicyGradient


def penalised(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-(A rho - |A| (rho - 1)^2 / (2 eps)), least at rho = 1 + sign(A) eps. 2401.16025, eq. 16.

    Its eps is `low` below 1 and `high` above.
    """
    eps = (ratio > 1) * (high - low) + low
    return -(advantages * ratio - advantages.abs() * (ratio - 1) ** 2 / (2 * eps))


class Penalised(PolicyGradient):
    """SPO's surrogate, for any policy gradient: to be inherited from before it."""

    surrogate = staticmethod(penalised)
    clips = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if min(self.options.clip_range) <= 0:
            raise ValueError(f"SPO divides by eps_clip, which must be above 0, got {self.options.clip_range}")


class SPO(Penalised, GRPO):
    """GRPO with SPO's surrogate."""
