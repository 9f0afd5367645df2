"""The reference's names for GRPO and what it makes of GRPO by flags."""

from __future__ import annotations

from typing import Any

import torch

from palm_rlhf_pytorch.algorithms.centering import Weight, score_centering_loss
from palm_rlhf_pytorch.algorithms.dr_grpo import DrGRPO
from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.max_rl import MaxRL
from palm_rlhf_pytorch.algorithms.score_centering import ScoreCentering
from palm_rlhf_pytorch.algorithms.spo import SPO, Penalised
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer, compared

__all__ = ["GRPO", "RLHFTrainer", "score_centering_loss"]


class PenalisedDrGRPO(Penalised, DrGRPO):
    """Dr. GRPO with SPO's surrogate."""


class PenalisedMaxRL(Penalised, MaxRL):
    """MaxRL with SPO's surrogate."""


PENALISED: dict[type[GroupPolicyGradient], type[Penalised]] = {
    GRPO: SPO,
    DrGRPO: PenalisedDrGRPO,
    MaxRL: PenalisedMaxRL,
}


class RLHFTrainer(KeywordTrainer):
    """GRPO on a PaLM, by these keywords and those of `KeywordTrainer`.

    use_dr_grpo and use_max_rl say what advantages are, use_simple_policy_optimization and use_score_centering what the
    loss does with them: one of each pair at most. Score centering does not clip: eps_clip does nothing there.
    dr_grpo_constant: the length that Dr. GRPO divides by. The weight kl_div_loss_weight is that of the KL to the
    starting policy, in the loss.
    """

    def __init__(
        self,
        *,
        grpo_num_times_sample_rewards: int = 10,
        eps_clip: float = 0.2,
        beta_s: float = 0.01,
        kl_div_loss_weight: float = 0.1,
        use_simple_policy_optimization: bool = False,
        use_dr_grpo: bool = False,
        dr_grpo_constant: int | None = None,
        use_max_rl: bool = False,
        use_score_centering: bool = False,
        score_centering_topk: int | None = None,
        score_centering_weight_fn: Weight = torch.ones_like,
        add_entropy_to_advantage: bool = False,
        entropy_to_advantage_kappa: float = 2.0,
        entropy_to_advantage_scale: float = 0.4,
        **shared: Any,
    ):
        use_dr_grpo = use_dr_grpo or dr_grpo_constant is not None
        for name, flags in (
            ("use_dr_grpo and use_max_rl", (use_dr_grpo, use_max_rl)),
            (
                "use_simple_policy_optimization and use_score_centering",
                (use_simple_policy_optimization, use_score_centering),
            ),
        ):
            if all(flags):
                raise ValueError(f"{name} exclude each other: take one")
        options = {
            "samples_per_prompt": compared("grpo_num_times_sample_rewards", grpo_num_times_sample_rewards),
            "entropy": beta_s,
            "kl": kl_div_loss_weight,
            "entropy_advantage": entropy_to_advantage_scale if add_entropy_to_advantage else 0.0,
            "entropy_kappa": entropy_to_advantage_kappa,
        }
        kind = DrGRPO if use_dr_grpo else MaxRL if use_max_rl else GRPO
        if use_simple_policy_optimization:
            kind = PENALISED[kind]
        length = {"max_response": dr_grpo_constant} if use_dr_grpo else {}
        algorithm = base = kind(eps_clip=eps_clip, **options, **length)
        if use_score_centering:
            algorithm = ScoreCentering(topk=score_centering_topk, weight_fn=score_centering_weight_fn, **options)
            algorithm.advantage, algorithm.raw_scores = base.advantage, base.raw_scores
            if use_dr_grpo:
                algorithm.normalization = base.normalization
        super().__init__(algorithm, **shared)
