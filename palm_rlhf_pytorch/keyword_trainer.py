"""Trainers by the reference's keywords: what all of them take is said here once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.algorithm import Algorithm
from palm_rlhf_pytorch.deprecation import moved
from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.optimizers import AdamW
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.prompts import Prompts, TokenIds
from palm_rlhf_pytorch.rollout import Reward
from palm_rlhf_pytorch.trainer import LearnOptions, OnPolicyTrainer


class KeywordTrainer(OnPolicyTrainer):
    """An algorithm on a PaLM with a reward: a `RewardModel`, or any function (prompts, responses) -> scores, or several
    by name (see `Scorer`).

    The keywords up to `accelerate_kwargs` are the reference's; prompt_token_ids may be a list of prompts (n,) of any
    lengths, too. Beyond them: actor_eps (Adam); optimizer_class;
    micro_batch_size (sequences computed at once); normalize_reward, missing_eos_penalty and overlong_buffer; kl_stop;
    reward_over ('text' or 'tokens', or by name which); process_reward (see `ProcessReward`); seed; metrics_path (a
    metrics.jsonl).
    make_actor: what is made of palm and the actor's keywords (None: the algorithm's `new_actor`).
    """

    def __init_subclass__(cls, **kwargs: Any):
        """help() and editors show all keywords, not **shared."""
        super().__init_subclass__(**kwargs)
        found: dict[str, inspect.Parameter] = {}
        for owner in cls.__mro__[:-1]:
            for name, parameter in inspect.signature(owner.__init__).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("make_actor", "learn_options"):
                    found.setdefault(name, parameter)
        cls.__signature__ = inspect.Signature(list(found.values()))

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        palm: PaLM,
        reward_model: Reward,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: TokenIds | None = None,
        tokenizer: Any = None,
        actor_lr: float = 1e-4,
        actor_wd: float = 0.0,
        actor_lora: bool = True,
        actor_lora_r: int = 8,
        actor_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        pad_value: int | float = 0,
        minibatch_size: int = 16,
        epochs: int = 1,
        accelerate_kwargs: dict[str, Any] | None = None,
        actor_adam_eps: float | None = None,
        use_lion: bool | None = None,
        actor_eps: float = 1e-8,
        optimizer_class: Callable[..., Optimizer] = AdamW,
        make_actor: Callable[..., Actor] | None = None,
        micro_batch_size: int | None = None,
        normalize_reward: bool = False,
        kl_stop: float | None = None,
        **engine: Any,
    ):
        actor_eps = moved("actor_adam_eps", actor_adam_eps, "actor_eps", actor_eps, stacklevel=4)
        if moved("use_lion", use_lion, "optimizer_class", stacklevel=4):
            optimizer_class = require("lion_pytorch", "lion").Lion
        algorithm.actor_optim = accepted(
            optimizer_class, lr=actor_lr, weight_decay=actor_wd, betas=betas, eps=actor_eps
        )
        algorithm.own_optim = accepted(optimizer_class, **{**algorithm.actor_optim, **algorithm.own_optim})
        super().__init__(
            (make_actor or algorithm.new_actor)(
                palm, actor_lora=actor_lora, actor_lora_r=actor_lora_r, actor_dropout=actor_dropout
            ),
            algorithm,
            reward_model,
            Prompts.gather(prompts, prompts_path, prompt_token_ids, tokenizer, int(pad_value)),
            tokenizer=tokenizer,
            learn_options=LearnOptions(minibatch_size, micro_batch_size, epochs, max_norm, normalize_reward, kl_stop),
            optimizer_class=optimizer_class,
            accelerate_kwargs=accelerate_kwargs,
            **engine,
        )


def compared(name: str, samples: int) -> int:
    """How many answers to a prompt are compared, which the keyword `name` said; or refused."""
    if samples < 2:
        raise ValueError(f"{name} must be 2 or more, to have answers to compare, got {samples}")
    return samples


def accepted(optimizer_class: Callable[..., Optimizer], **keywords: Any) -> dict[str, Any]:
    """The keywords that an optimiser knows (Lion has no eps)."""
    known = inspect.signature(optimizer_class).parameters
    return {name: value for name, value in keywords.items() if name in known}
