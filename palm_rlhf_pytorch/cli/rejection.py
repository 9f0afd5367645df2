"""palm-rlhf rejection: a model, a reward and prompts in, the best answers and a model that learned them out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import ComputeOptions, RunOptions, StartOptions, TuneFitOptions, Tuning
from palm_rlhf_pytorch.cli.rewards import RewardOptions, prompt_texts, rewards
from palm_rlhf_pytorch.data import read_demonstrations
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.rejection import BestOfOptions, best_of_n, prompts_with_room, read_best, summary, write_best
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.sft import train_on_demonstrations

DRAWN_BY = ("model", "reward", "prompts", "prompt_words", "whole_text", "chat")


@dataclass(frozen=True, kw_only=True)
class RejectionCommandOptions(RewardOptions, StartOptions):
    """What to improve, by what reward, on what prompts"""

    out: str = option("runs/rejection", "directory of the run")


def run(
    options: RejectionCommandOptions,
    drawing: BestOfOptions,
    tuning: TuningOptions,
    fit: TuneFitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    run = Tuning("rejection", options, tuning, fit, compute, where)
    prompts = run.with_roles(prompt_texts(options))
    prompts_with_room(run.tokenizer, prompts, drawing.max_seq_len)
    reward = rewards(options, run.device, drawing.max_seq_len)
    run.start(prompts, drawing=drawing)
    best = run.directory / "best.jsonl"
    if where.resume and best.is_file():
        refuse_other_answers(run.directory, options, drawing)
    else:
        write_best(best, best_of_n(run.palm, run.tokenizer, prompts, reward, drawing, tuning.seed))
    print(summary(read_best(best), drawing.samples))
    return run.train(train_on_demonstrations, read_demonstrations(best))


def refuse_other_answers(directory: RunDirectory, options: RejectionCommandOptions, drawing: BestOfOptions) -> None:
    """A run that has its answers cannot go on with others."""
    before = directory.options("rejection")
    now = {**{name: getattr(options, name) for name in DRAWN_BY}, **asdict(drawing)}
    changed = [name for name, value in now.items() if before.get(name) != json.loads(json.dumps(value))]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ValueError(
            f"{str(directory.path)!r} has its best answers, drawn with another {flags}: take another --out"
        )


OPTIONS = (RejectionCommandOptions, BestOfOptions, TuningOptions, TuneFitOptions, ComputeOptions, RunOptions)
