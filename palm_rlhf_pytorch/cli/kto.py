"""palm-rlhf kto: a model and responses labelled good or bad in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.algorithms.kto import KTO
from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions, Tuning
from palm_rlhf_pytorch.data import read_labelled
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.preference import train_on_answers


@dataclass(frozen=True, kw_only=True)
class KTOCommandOptions(StartOptions):
    """What to learn from, and what model is to learn it"""

    data: str = required(
        "labelled responses {prompt, response, label} or {messages, label}, with labels true or false (or 1 or 0)"
    )
    out: str = option("runs/kto", "directory of the run")


def run(
    options: KTOCommandOptions,
    objective: KTO,
    tuning: TuningOptions,
    fit: TuneFitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    run = Tuning("kto", options, tuning, fit, compute, where)
    responses = run.with_roles(read_labelled(options.data))
    run.start(responses, objective=objective)
    return run.train(train_on_answers, responses, objective=objective, cache=run.directory.reference)


OPTIONS = (KTOCommandOptions, KTO, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
