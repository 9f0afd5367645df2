"""The reference's names for TPO."""

from __future__ import annotations

from typing import Any

from palm_rlhf_pytorch.algorithms.tpo import TPO
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer, compared

__all__ = ["TPO", "RLHFTrainer"]


class RLHFTrainer(KeywordTrainer):
    """TPO on a PaLM, by these keywords and those of `KeywordTrainer`."""

    def __init__(
        self, *, num_times_sample_rewards: int = 10, tpo_eta: float = 1.0, beta_s: float = 0.01, **shared: Any
    ):
        super().__init__(
            TPO(
                samples_per_prompt=compared("num_times_sample_rewards", num_times_sample_rewards),
                eta=tpo_eta,
                entropy=beta_s,
            ),
            **shared,
        )
