"""What the commands that train on a model's own answers share: prompts in, practice, a better model out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.cli.common import MODEL, ModelUse, with_roles
from palm_rlhf_pytorch.data import first_words, read_prompts, read_texts
from palm_rlhf_pytorch.devices import accelerate_keywords
from palm_rlhf_pytorch.fine_tuning import AdapterOptions, keep_adapter
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.interrupts import Interrupts
from palm_rlhf_pytorch.prompts import Remembered
from palm_rlhf_pytorch.rejection import prompts_with_room
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.tokenizer import Tokenizer
from palm_rlhf_pytorch.trainer import OnPolicyTrainer

PROMPTS = "prompts: a .txt with one a line, or records with a prompt column (text, or messages with roles)"


@dataclass(frozen=True, kw_only=True)
class PracticeOptions(ModelUse):
    """What to improve, by what reward, on what prompts"""

    model: str = required(MODEL)
    reward: tuple[str, ...] = required("directory of a reward run, or several, whose mean counts")
    prompts: str = required(PROMPTS)
    out: str = option("runs/ppo", "directory of the run")
    prompt_words: int = option(0, "take the first words of the texts in --prompts instead of whole prompts", least=0)
    whole_text: bool | None = option(
        None, "rate prompt and response as one text (default: where the reward was learned on texts alone)"
    )
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


def prompt_texts(options: PracticeOptions) -> list[str]:
    if options.prompt_words == 0:
        return read_prompts(options.prompts)
    texts = read_texts(options.prompts, lines=True)
    openings = (first_words(text, options.prompt_words) for text in texts)
    prompts = list(dict.fromkeys(prompt for prompt, rest in openings if rest.strip()))
    if not prompts:
        raise ValueError(f"{options.prompts}: no text has more than the {options.prompt_words} words of --prompt-words")
    return prompts


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
