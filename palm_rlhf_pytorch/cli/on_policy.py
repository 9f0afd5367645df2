"""What the commands that train on a model's own answers share: prompts in, practice, a better model out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.algorithms import algorithm_class
from palm_rlhf_pytorch.cli.common import MODEL, ModelUse, PrecisionOptions, RunOptions, open_model, with_roles
from palm_rlhf_pytorch.cli.process import ProcessOptions
from palm_rlhf_pytorch.cli.rewards import RewardOptions, prompt_texts, rewards
from palm_rlhf_pytorch.devices import accelerate_keywords
from palm_rlhf_pytorch.fine_tuning import AdapterOptions, keep_adapter
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.interrupts import Interrupts
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer
from palm_rlhf_pytorch.prompts import Remembered
from palm_rlhf_pytorch.rejection import prompts_with_room
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.tokenizer import Tokenizer
from palm_rlhf_pytorch.trainer import OnPolicyTrainer


@dataclass(frozen=True, kw_only=True)
class PracticeOptions(RewardOptions, ModelUse):
    """What to improve, by what reward, on what prompts"""

    model: str = required(MODEL)
    out: str = option("runs/ppo", "directory of the run")
    seed: int = option(0, "seed of everything")
    updates: int = option(50, "times to roll out and learn", least=1)
    rollouts: int = option(128, "prompts answered for each update", least=1)
    rollout_batch: int = option(64, "prompts answered at once", least=1)
    max_seq_len: int = option(256, "tokens of prompt and response together", least=2)
    temperature: float = option(1.0, "sampling temperature", least=0.01)
    save_every: int = option(10, "updates between checkpoints to resume from", least=1)


@dataclass(frozen=True)
class LearningOptions(AdapterOptions):
    """How any algorithm learns"""

    lora: bool = option(True, "train adapters on one frozen trunk, which is the reference too; not the whole model")
    actor_lr: float = option(1e-3, "learning rate of the policy", least=0)
    epochs: int = option(1, "passes over each batch of rollouts", least=1)
    minibatch_size: int = option(64, "sequences of an optimiser step; a prompt's samples stay together", least=1)
    micro_batch_size: int | None = option(None, "sequences computed at once (default: the whole minibatch)", least=1)
    max_norm: float = option(1.0, "gradient norm to clip at", least=1e-6)
    normalize_reward: bool = option(False, "scale rewards to mean 0, std 1 on the starting policy's samples")
    missing_eos_penalty: float = option(0.0, "taken from the reward of a response that did not finish")
    overlong_buffer: int = option(0, "tokens before the limit in which a penalty of length grows (0: none)", least=0)
    overlong_penalty: float = option(1.0, "what that penalty is at the limit")


ADAPTERS = {field.name for field in fields(AdapterOptions)}
PASSED_ON = [field.name for field in fields(LearningOptions) if field.name not in ADAPTERS]


def trainer_keywords(
    options: PracticeOptions,
    learning: LearningOptions,
    tokenizer: Tokenizer,
    device: torch.device,
    precision: str,
) -> dict[str, Any]:
    """What every trainer is told: prompts, all of which leave room for a response, and how to learn."""
    prompts = with_roles(prompt_texts(options), options.chat, tokenizer)
    ids, _ = prompts_with_room(tokenizer, prompts, options.max_seq_len)
    return {
        "prompt_token_ids": ids,
        "pad_value": tokenizer.pad_id,
        "tokenizer": Remembered(tokenizer, prompts),
        "actor_lora": learning.lora,
        "actor_lora_r": learning.lora_r,
        **{name: getattr(learning, name) for name in PASSED_ON},
        "seed": options.seed,
        "accelerate_kwargs": accelerate_keywords(device, precision),
    }


def improve(
    command: str,
    algorithm: str,
    own_lr: float,
    options: PracticeOptions,
    own: Any,
    learning: LearningOptions,
    process: ProcessOptions,
    compute: PrecisionOptions,
    where: RunOptions,
) -> Path:
    """Run a command: an algorithm by name, its own options, and the learning rate of its own parts."""
    directory, device = where.start(options.out, options.seed)
    palm, tokenizer = open_model(options.model, device, options.dtype)
    learning.ready(palm)
    reward = rewards(options, device, options.max_seq_len)
    shared = trainer_keywords(options, learning, tokenizer, device, compute.precision)
    process_reward = process.made(palm, shared["tokenizer"])
    learner = algorithm_class(algorithm).for_policy(palm, own_optim={"lr": own_lr}, **asdict(own))
    given = {"options": options, "own": own, "learning": learning, "process": process, "compute": compute}
    log = directory.start(command, where.resume, tokenizer, **given)
    trainer = KeywordTrainer(
        learner,
        palm=palm,
        reward_model=reward,
        process_reward=process_reward,
        metrics_path=log.path,
        **shared,
    )
    return practise(trainer, options, directory, tokenizer, where.resume)


def practise(
    trainer: OnPolicyTrainer, options: PracticeOptions, directory: RunDirectory, tokenizer: Tokenizer, resume: bool
) -> Path:
    """Train for --updates with checkpoints, and write the policy. Ctrl-C lets the update under way end."""
    scope = trainer.actor_critic.actor_lora_scope
    directory.config |= trainer.palm.pretrained
    if resume and directory.has_state():
        trainer.load(directory.state)

    def keep(row: dict[str, float]) -> None:
        if interrupts.asked or row["step"] % options.save_every == 0 or row["step"] == options.updates:
            trainer.save(directory.state)
        if interrupts.asked:
            raise KeyboardInterrupt(
                f"stopped after update {row['step']}; {str(directory.state)!r} holds it, --resume goes on from there"
            )

    with Interrupts() as interrupts:
        trainer.train(
            num_episodes=options.updates,
            max_timesteps=options.rollouts,
            update_timesteps=options.rollouts,
            max_batch_size=options.rollout_batch,
            max_seq_len=options.max_seq_len,
            eos_token=tokenizer.eos_ids,
            temperature=options.temperature,
            on_update=keep,
        )
    if scope is not None:
        keep_adapter(trainer.palm, scope, directory.adapter_of(options.model))
    trainer.merged_policy().save(directory.weights)
    directory.finish(trainer.metrics, type(trainer.algorithm).__name__)
    return directory.path
