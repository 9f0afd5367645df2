"""palm-rlhf sft: a model and responses to prompts in, a model that answers so out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions, Tuning
from palm_rlhf_pytorch.data import read_demonstrations
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.sft import train_on_demonstrations


@dataclass(frozen=True, kw_only=True)
class SFTCommandOptions(StartOptions):
    """What to learn from, and what model is to learn it"""

    data: str = required(
        "demonstrations {prompt, response}, such as the best.jsonl of a rejection run, or {messages} with roles, of "
        "which the last is learned"
    )
    out: str = option("runs/sft", "directory of the run")


def run(
    options: SFTCommandOptions,
    tuning: TuningOptions,
    fit: TuneFitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    run = Tuning("sft", options, tuning, fit, compute, where)
    demonstrations = run.with_roles(read_demonstrations(options.data))
    run.start(demonstrations)
    return run.train(train_on_demonstrations, demonstrations)


OPTIONS = (SFTCommandOptions, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
