"""SPO: a penalty where PPO clips, so that no gradient is lost (Xie et al., Simple Policy Optimization, 2401.16025)."""

from __future__ import annotations

from typing import Any

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

    def __init__(
        self, actor_optim: dict[str, Any] | None = None, own_optim: dict[str, Any] | None = None, **options: Any
    ):
        super().__init__(actor_optim, own_optim, **options)
        if min(self.options.clip_range) <= 0:
            raise ValueError(f"SPO divides by eps_clip, which must be above 0, got {self.options.clip_range}")

    def out_of_range(self, log_ratio: Tensor) -> dict[str, Tensor]:
        """Nothing is clipped."""
        return {}
