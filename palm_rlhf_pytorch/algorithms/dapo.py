"""DAPO: more room to rise, every token the same, and no prompts that teach nothing (Yu et al., 2503.14476)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palm_rlhf_pytorch.algorithms.groups import GroupOptions
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import from_groups, to_groups


@dataclass(frozen=True)
class DAPOOptions(GroupOptions):
    """How DAPO learns"""

    sampling_rounds: int = option(4, "times to sample at most until enough prompts have unequal scores", least=1)


class DAPO(GRPO):
    """Clip-higher (eq. 10), dynamic sampling (eq. 11), token-level loss (eq. 12), no KL. Its penalty for overlong
    answers (eq. 13) is the engine's `overlong_buffer`.
    """

    Options = DAPOOptions
    defaults = {"eps_clip": 0.2, "eps_clip_high": 0.28, "normalization": "token"}

    def keep(self, experience: Experience) -> Tensor:
        """Groups whose rewards differ before penalties: where all are right, their lengths alone would be compared."""
        scores = experience.scores if experience.raw_scores is None else experience.raw_scores
        scores = to_groups(scores, experience.group_ids)
        differ = scores.amax(dim=-1, keepdim=True) > scores.amin(dim=-1, keepdim=True)
        return from_groups(differ.expand_as(scores), experience.group_ids)
