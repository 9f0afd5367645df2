"""Small tasks whose answers code can check, and how each algorithm is set for them. `learning.py` runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.algorithms import algorithm_class
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.rollout import Reward
from palm_rlhf_pytorch.trainer import LearnOptions, OnPolicyTrainer


@dataclass(frozen=True)
class Task:
    """tokens: the vocabulary; prompts (p, n); answers of `length` tokens; what is right; and how long to learn it."""

    name: str
    tokens: int
    prompts: Tensor
    length: int
    right: Callable[[Tensor, Tensor], bool]
    updates: int
    lr: float
    batch: int  # prompts an update, each answered eight times
    epochs: int = 4  # passes over them
    minibatches: int = 1  # optimiser steps a pass
    dim: int = 64
    depth: int = 2
    modes: Tensor | None = None  # where several answers are right: how evenly they are covered is measured

    def reward(self, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        return torch.tensor([float(self.right(p, r)) for p, r in zip(prompts, responses, strict=True)])


def forced() -> Task:
    """One prompt, and one of 16 tokens is right."""
    right = lambda p, r: int(r[0]) == 7  # noqa: E731
    return Task("forced", 16, torch.tensor([[1]]), 1, right, updates=100, lr=1e-2, batch=8, dim=32, depth=1)


def reversal(length: int) -> Task:
    """All prompts of `length` tokens out of two, to be answered in reverse. There are four tokens: 2 stands before
    every prompt, because rotary angles alone tell no place, and answers are read by parity, so that a random one is
    right one time in 2^length, as in the paper.
    """
    prompts = torch.tensor([(2, *tokens) for tokens in product((0, 1), repeat=length)])
    right = lambda p, r: torch.equal(r % 2, p[1:].flip(0))  # noqa: E731
    batch, updates = min(100, 2**length), 100 * (length - 2)
    return Task(f"reversal {length}", 4, prompts, length, right, updates, 1e-3, batch, epochs=1, minibatches=4)


MODES = torch.tensor([[1, 1, 2], [2, 3, 1], [3, 2, 2], [4, 4, 4]])


def modes() -> Task:
    """Four answers are equally right."""
    right = lambda p, r: bool((MODES == r).all(dim=-1).any())  # noqa: E731
    return Task("modes", 5, torch.tensor([[0]]), 3, right, updates=300, lr=5e-4, batch=32, dim=32, depth=1, modes=MODES)


TASKS: dict[str, Callable[[], Task]] = {
    "forced": forced,
    "modes": modes,
    **{f"reversal{n}": partial(reversal, n) for n in (5, 6, 7)},
}

# what differs from the defaults: no KL where the start is not worth keeping
NO_KL = {name: {"kl": 0.0} for name in ("ppo", "grpo", "spo", "rloo", "reinforce_pp", "reinforce_pp_baseline")}
SETTINGS: dict[str, dict[str, Any]] = {
    **NO_KL,
    "gspo": {"eps_clip": 0.2, "eps_clip_high": 0.27},  # the paper's 4e-4 is for answers of thousands of tokens
    "flowrl": {"z_hidden": 64},
}
# In the reversal a prompt whose answer is always the same wrong one teaches nothing, unless something holds against it:
# for PPO the paper's baseline, the mean of the batch (a critic that does not learn), and a bonus for entropy; for GRPO
# and its kin the KL to the start; TPO draws to what sampled from a batch's second pass on.
LIKE_GRPO = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "spo", "max_rl", "gspo", "dapo", "score_centering")
IN_REVERSAL: dict[str, dict[str, Any]] = {
    "ppo": {"own_optim": {"lr": 0.0}, "gae_lambda": 1.0, "entropy": 0.05},
    "reinforce_pp": {"entropy": 0.05},
    **{name: {"kl": 0.04, "kl_in": "loss"} for name in LIKE_GRPO},
    "flowrl": {"beta": 4.0},
}
TWO_PASSES = ("ppo", "tpo")


def options_of(task: Task, algorithm: str) -> dict[str, Any]:
    if is_reversal(task):
        return {**SETTINGS.get(algorithm, {}), **IN_REVERSAL.get(algorithm, {})}
    # the mean over tokens in FlowRL's loss sharpens the target by the length
    return {**SETTINGS.get(algorithm, {}), **({"beta": 3.0 / task.length} if algorithm == "flowrl" else {})}


def is_reversal(task: Task) -> bool:
    return task.name.startswith("reversal")


def for_algorithm(task: Task, algorithm: str) -> Task:
    """The task as this algorithm takes it."""
    if not is_reversal(task) or algorithm not in TWO_PASSES:
        return task
    return replace(task, epochs=2, updates=task.updates * 4 // 5)


class Shuffled:
    """The same rewards, to other answers: the control, from which nothing can be learned."""

    def __init__(self, reward: Reward, seed: int):
        self.reward, self.generator = reward, torch.Generator().manual_seed(seed)

    def __call__(self, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        scores = self.reward(prompts, responses)
        return scores[torch.randperm(len(scores), generator=self.generator)]


def build(task: Task, name: str, seed: int, shuffled: bool, own: Mapping[str, Any] | None = None) -> OnPolicyTrainer:
    """A policy with random weights, all of which are trained. `own`: the algorithm's options instead of the task's."""
    torch.manual_seed(seed)
    sizes = {"dim": task.dim, "depth": task.depth, "heads": 2, "dim_head": 32, "ff_mult": 8 / 3}
    palm = PaLM(num_tokens=task.tokens, flash_attn=True, **sizes)  # as many weights as a plain feedforward times 4
    optimisers = {"actor_optim": {"lr": task.lr}, "own_optim": {"lr": task.lr}}
    options = {**optimisers, **options_of(task, name), **(own or {})}
    algorithm = algorithm_class(name).for_policy(palm, **options)
    if options["own_optim"].get("lr") == 0.0:
        algorithm.critic_loss = None  # it would only cost time
    return OnPolicyTrainer(
        algorithm.new_actor(palm, actor_lora=False),
        algorithm,
        Shuffled(task.reward, seed) if shuffled else task.reward,
        Prompts(task.prompts, pad_value=-1),
        learn_options=LearnOptions(8 * task.batch // task.minibatches, epochs=task.epochs, max_norm=1.0),
        seed=seed,
        accelerate_kwargs={"cpu": True},
    )


@torch.no_grad()
def measured(task: Task, trainer: OnPolicyTrainer, count: int = 4096) -> tuple[float, float | None]:
    """Of freshly sampled answers the share that is right; and where there are modes, e^entropy of the right ones: 4
    where all are as frequent, 1 where one is left, 0 where none is right.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = task.prompts[torch.randint(len(task.prompts), (count,), generator=generator)]
    scope = trainer.actor_critic.actor_lora_scope
    answers = trainer.palm.generate(
        prompts.shape[1] + task.length, prompts, filter_logits_fn=None, finetune_scope=scope
    )
    right = float(task.reward(list(prompts), list(answers)).mean())
    if task.modes is None:
        return right, None
    counts = (answers[:, None] == task.modes).all(dim=-1).sum(dim=0).double()
    return right, float(torch.special.entr(counts / counts.sum()).sum().exp()) if counts.sum() else 0.0


def learn(task: Task, name: str, seed: int, shuffled: bool, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """-> what was `measured` before and after, and each update's reward. The learning rate falls to 0 along a line."""
    trainer = build(task, name, seed, shuffled, own)
    before, modes_before = measured(task, trainer)
    full = [group["lr"] for group in trainer.optimizer.param_groups]

    def decay(_: object) -> None:
        for group, lr in zip(trainer.optimizer.param_groups, full, strict=True):
            group["lr"] = lr * (1 - trainer.step / task.updates)

    prompts = task.batch * (8 if trainer.algorithm.samples_per_prompt == 1 else 1)
    total = task.prompts.shape[1] + task.length
    trainer.train(task.updates, prompts, prompts, prompts, total, on_update=decay)
    rewards = [round(row["reward"], 4) for row in trainer.history]
    after, modes_after = measured(task, trainer)
    return {"before": before, "after": after, "modes": [modes_before, modes_after], "rewards": rewards}
