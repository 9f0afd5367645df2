"""What `palm-rlhf dpo` and `kto` share: a model goes on from what people preferred, by an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions, Tuning
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.preference import Objective, train_on_answers


def tune(
    command: str,
    read: Callable[[str], Sequence[Any]],
    options: StartOptions,
    objective: Objective,
    tuning: TuningOptions,
    fit: TuneFitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    """`read` makes of the options' data what the objective learns from."""
    run = Tuning(command, options, tuning, fit, compute, where)
    items = run.with_roles(read(options.data))
    run.start(items, objective=objective)
    return run.train(train_on_answers, items, objective=objective, cache=run.directory.reference)
