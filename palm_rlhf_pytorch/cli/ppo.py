"""palm-rlhf ppo: a model, a reward and prompts in, a better model out. `rl --algorithm ppo` with other defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.algorithms.ppo import PPO, PPOOptions
from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions
from palm_rlhf_pytorch.cli.on_policy import LearningOptions, PracticeOptions, improve
from palm_rlhf_pytorch.cli.process import ProcessOptions
from palm_rlhf_pytorch.flags import option


@dataclass(frozen=True)
class PPOLearning(LearningOptions):
    """How its models learn"""

    epochs: int = option(2, "passes over each batch of rollouts", least=1)
    minibatch_size: int = option(32, "sequences of an optimiser step", least=1)
    critic_lr: float = option(2e-3, "learning rate of the critic", least=0)


def options_for(arguments: Sequence[str]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The dataclasses whose flags there are, and PPO's defaults."""
    return (PracticeOptions, PPOOptions, PPOLearning, ProcessOptions, PrecisionOptions, RunOptions), dict(PPO.defaults)


def run(
    options: PracticeOptions,
    own: PPOOptions,
    learning: PPOLearning,
    process: ProcessOptions,
    compute: PrecisionOptions,
    where: RunOptions,
) -> Path:
    return improve("ppo", "ppo", learning.critic_lr, options, own, learning, process, compute, where)
