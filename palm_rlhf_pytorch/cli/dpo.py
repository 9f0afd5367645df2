"""palm-rlhf dpo: a model and choices between two responses in, a model that prefers the chosen out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.algorithms.dpo import DPO
from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions, Tuning
from palm_rlhf_pytorch.data import read_pairs
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.preference import train_on_answers


@dataclass(frozen=True, kw_only=True)
class DPOCommandOptions(StartOptions):
    """What to learn from, and what model is to learn it"""

    data: str = required(
        "pairs {prompt, chosen, rejected}, or {chosen, rejected} as whole transcripts; all text, or messages with roles"
    )
    out: str = option("runs/dpo", "directory of the run")


def run(
    options: DPOCommandOptions,
    objective: DPO,
    tuning: TuningOptions,
    fit: TuneFitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    run = Tuning("dpo", options, tuning, fit, compute, where)
    pairs = run.with_roles(read_pairs(options.data))
    run.start(pairs, objective=objective)
    return run.train(train_on_answers, pairs, objective=objective, cache=run.directory.reference)


OPTIONS = (DPOCommandOptions, DPO, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
