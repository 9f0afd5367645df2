"""palm-rlhf dpo: a model and choices between two responses in, a model that prefers the chosen out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from palm_rlhf_pytorch.algorithms.dpo import DPO
from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions
from palm_rlhf_pytorch.cli.preference import tune
from palm_rlhf_pytorch.data import read_pairs
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required


@dataclass(frozen=True, kw_only=True)
class DPOCommandOptions(StartOptions):
    """What to learn from, and what model is to learn it"""

    data: str = required(
        "pairs {prompt, chosen, rejected}, or {chosen, rejected} as whole transcripts; all text, or messages with roles"
    )
    out: str = option("runs/dpo", "directory of the run")


run = partial(tune, "dpo", read_pairs)
OPTIONS = (DPOCommandOptions, DPO, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
