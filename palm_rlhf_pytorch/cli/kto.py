"""palm-rlhf kto: a model and responses labelled good or bad in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from palm_rlhf_pytorch.algorithms.kto import KTO
from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions
from palm_rlhf_pytorch.cli.preference import tune
from palm_rlhf_pytorch.data import read_labelled
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required


@dataclass(frozen=True, kw_only=True)
class KTOCommandOptions(StartOptions):
    """What to learn from, and what model is to learn it"""

    data: str = required(
        "labelled responses {prompt, response, label} or {messages, label}, with labels true or false (or 1 or 0)"
    )
    out: str = option("runs/kto", "directory of the run")


run = partial(tune, "kto", read_labelled)
OPTIONS = (KTOCommandOptions, KTO, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
