"""SPO: a penalty where PPO clips, so that no gradient is lost (Xie et al., Simple Policy Optimization, 2401.16025)."""

from __future__ import annotations

from torch import Tensor

from palm_rlhf_pytorch.algorithms.grpo import GRPO


def penalised(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """-(A rho - |A| (rho - 1)^2 / (2 eps)), least at rho = 1 + sign(A) eps. 2401.16025, eq. 16.

    Its eps is `low` below 1 and `high` above.
    """
    eps = (ratio > 1) * (high - low) + low
    return -(advantages * ratio - advantages.abs() * (ratio - 1) ** 2 / (2 * eps))


class SPO(GRPO):
    """GRPO with SPO's surrogate."""

    surrogate = staticmethod(penalised)
