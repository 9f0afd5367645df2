"""palm-rlhf rl: any on-policy algorithm by name, rewards by model or by rule."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.algorithms import ALGORITHMS, algorithm_class
from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions
from palm_rlhf_pytorch.cli.on_policy import LearningOptions, PracticeOptions, improve
from palm_rlhf_pytorch.cli.process import ProcessOptions
from palm_rlhf_pytorch.flags import option


@dataclass(frozen=True, kw_only=True)
class RLOptions(PracticeOptions):
    """What to improve, by what reward, on what prompts"""

    algorithm: str = option("grpo", "how to learn; its own flags are below", choices=tuple(ALGORITHMS))
    out: str = option("runs/rl", "directory of the run")


@dataclass(frozen=True)
class RLLearning(LearningOptions):
    """How any of them learns"""

    own_lr: float = option(2e-3, "learning rate of the algorithm's own parts (a critic, log Z)", least=0)


def options_for(arguments: Sequence[str]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The dataclasses whose flags there are, and defaults of the algorithm that the arguments name."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--algorithm", default=RLOptions.__dataclass_fields__["algorithm"].default)
    name = early.parse_known_args(list(arguments))[0].algorithm
    cls = algorithm_class(name)
    return (RLOptions, cls.Options, RLLearning, ProcessOptions, PrecisionOptions, RunOptions), dict(cls.defaults)


def run(
    options: RLOptions,
    own: Any,
    learning: RLLearning,
    process: ProcessOptions,
    compute: PrecisionOptions,
    where: RunOptions,
) -> Path:
    return improve("rl", options.algorithm, learning.own_lr, options, own, learning, process, compute, where)
