"""palm-rlhf rl: any on-policy algorithm by name, rewards by model or by rule."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.algorithms import ALGORITHMS, algorithm_class
from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions, open_model, text_reward
from palm_rlhf_pytorch.cli.on_policy import LearningOptions, PracticeOptions, practise, trainer_keywords
from palm_rlhf_pytorch.cli.process import ProcessOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer


@dataclass(frozen=True, kw_only=True)
class RLOptions(PracticeOptions):
    """What to improve, by what reward, on what prompts"""

    reward: tuple[str, ...] = required(
        "directory of a reward run, or FILE.py:FUNCTION, called with two lists of text (prompts, responses) for a "
        "number each (a prompt with roles is text that also has .messages); of several the mean counts"
    )
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


def rule(place: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward {place!r}: there is no file {path!r}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:  # what the file imports from beside it
        sys.path.append(folder)
    spec = spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {place!r}: {path} has no function {name!r}")
    return function


def rewards(options: RLOptions, device: torch.device) -> Any:
    """What --reward names; of several the mean, and each is logged."""
    rules = [place for place in options.reward if ".py:" in place]
    directories = [place for place in options.reward if place not in rules]
    members = {place.rpartition(":")[2]: (rule(place), 1.0) for place in rules}
    if len(members) < len(rules):
        raise ValueError("--reward: functions need names of their own, two of the same name were given")
    if directories:
        if "model" in members:
            raise ValueError("--reward: 'model' is what reward runs are called, give the function another name")
        model = text_reward(directories, device, options.whole_text, options.max_seq_len)
        members["model"] = (model, float(len(directories)))
    if len(members) == 1:
        return next(iter(members.values()))[0]
    return {name: (member, weight / len(options.reward)) for name, (member, weight) in members.items()}


def run(
    options: RLOptions,
    own: Any,
    learning: RLLearning,
    process: ProcessOptions,
    compute: PrecisionOptions,
    where: RunOptions,
) -> Path:
    directory, device = where.start(options.out, options.seed)
    palm, tokenizer = open_model(options.model, device, options.dtype)
    learning.ready(palm)
    reward = rewards(options, device)
    shared = trainer_keywords(options, learning, tokenizer, device, compute.precision)
    process_reward = process.made(palm, shared["tokenizer"])
    given = {"options": options, "own": own, "learning": learning, "process": process, "compute": compute}
    log = directory.start("rl", where.resume, tokenizer, **given)
    cls = algorithm_class(options.algorithm)
    algorithm = cls.for_policy(palm, own_optim={"lr": learning.own_lr}, **dataclasses.asdict(own))
    trainer = KeywordTrainer(
        algorithm,
        palm=palm,
        reward_model=reward,
        process_reward=process_reward,
        metrics_path=log.path,
        **shared,
    )
    return practise(trainer, options, directory, tokenizer, where.resume)
