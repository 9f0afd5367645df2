"""The reference's names for FlowRL."""

from __future__ import annotations

import warnings
from typing import Any

from palm_rlhf_pytorch.algorithms.flowrl import FlowRL, PartitionFunction
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer, compared
from palm_rlhf_pytorch.palm import PaLM

__all__ = ["FlowRL", "FlowRLTrainer", "PartitionFunction"]


class FlowRLTrainer(KeywordTrainer):
    """FlowRL on a PaLM, by these keywords and those of `KeywordTrainer`. The paper has no entropy bonus, beta_s."""

    def __init__(
        self,
        *,
        palm: PaLM,
        flowrl_num_times_sample: int = 8,
        beta: float = 15.0,
        eps_clip: float = 0.2,
        beta_s: float = 0.0,
        kl_div_loss_weight: float | None = None,
        partition_function_hidden_dim: int = 768,
        partition_function_lr: float = 1e-4,
        **shared: Any,
    ):
        if kl_div_loss_weight is not None:
            warnings.warn("FlowRL's loss has the starting policy in it: kl_div_loss_weight does nothing", stacklevel=2)
        algorithm = FlowRL.for_policy(
            palm,
            own_optim={"lr": partition_function_lr},
            samples_per_prompt=compared("flowrl_num_times_sample", flowrl_num_times_sample),
            beta=beta,
            eps_clip=eps_clip,
            entropy=beta_s,
            z_hidden=partition_function_hidden_dim,
        )
        super().__init__(algorithm, palm=palm, **shared)
