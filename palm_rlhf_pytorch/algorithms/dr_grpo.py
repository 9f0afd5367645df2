"""Dr. GRPO: GRPO without the two divisions that favour some lengths and some prompts (Liu et al., 2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass

from palm_rlhf_pytorch.algorithms.groups import GroupOptions, GroupPolicyGradient, centred
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option


@dataclass(frozen=True)
class DrGRPOOptions(GroupOptions):
    """How Dr. GRPO learns"""

    max_response: int | None = option(
        None, "tokens that every response's loss is divided by (default: the longest of the batch)", least=1
    )


class DrGRPO(GroupPolicyGradient):
    """A = R - mean (section 3.2), and a token's gradient does not depend on how long its response is."""

    Options = DrGRPOOptions
    advantage = staticmethod(centred)

    def target(self, experience: Experience) -> Experience:
        self.normalization = self.options.max_response or int(experience.lengths.max())
        return super().target(experience)
