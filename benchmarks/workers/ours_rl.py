"""Our PPO and GRPO, one iteration a request, on the work that the peers are given. Run by rl_iteration.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from serving import serve
from tasks import now
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer, generation
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.trainer import LearnOptions, OnPolicyTrainer

SIZES = {"num_tokens": "vocab", "dim": "dim", "depth": "depth", "heads": "heads", "dim_head": "dim_head"}
spent = {"generation": 0.0}
counts = {"optimizer_steps": 0, "tokens": 0}
trainer: OnPolicyTrainer | None = None
work: dict[str, Any] = {}


def timed_generate(*args: Any, _generate=generation.generate, **kwargs: Any) -> generation.Generation:
    started = now(work["device"])
    out = _generate(*args, **kwargs)
    spent["generation"] += now(work["device"]) - started
    counts["tokens"] += int(out.response_mask.sum())
    return out


def count_steps(*_: Any) -> None:
    counts["optimizer_steps"] += 1


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def new_palm(**keywords: Any) -> PaLM:
    """A PaLM of the work's sizes."""
    palm = PaLM(**{name: work[theirs] for name, theirs in SIZES.items()}, **keywords)
    return palm.to(work["device"], getattr(torch, work["dtype"]))


def build_ppo(prompts: Tensor, **shared: Any) -> tuple[OnPolicyTrainer, dict[str, int]]:
    """What TRL is given: a critic of its own and a reward model; with LoRA one trunk and a reward model."""
    palm = new_palm(use_xpos=False)  # Cohere has no xpos
    reward = RewardModel(palm, dropout=0.0, use_lora=False)
    critic = None if work["lora"] else new_palm(use_xpos=False)
    parameters = {"policy": size(palm), "critic": size(critic or palm), "reward": size(reward)}
    ppo = RLHFTrainer(
        palm=palm,
        critic=critic,
        reward_model=reward,
        prompt_token_ids=prompts,
        actor_lora=work["lora"],
        critic_lora=work["lora"],
        critic_num_pred_bins=1,
        critic_pooled_values=False,
        minibatch_size=work["minibatch"],
        epochs=work["epochs"],
        kl_div_loss_weight=work["kl"],
        value_clip=0.2,
        actor_lr=1e-5,
        critic_lr=1e-5,
        **shared,
    )
    return ppo, parameters


def build_grpo(prompts: Tensor, **shared: Any) -> tuple[OnPolicyTrainer, dict[str, int]]:
    """The policy alone, gradients clipped to TRL's default norm of 1; the reward is the share of odd token ids."""
    palm = new_palm(use_xpos=False)
    parameters = {"policy": size(palm)}
    grpo = OnPolicyTrainer(
        Actor(palm, actor_lora=work["lora"]),
        GRPO({"lr": 1e-5, "weight_decay": 0.0}, samples_per_prompt=work["samples"], kl=0.0, normalization="token"),
        lambda prompts, responses: [float((r % 2).float().mean()) for r in responses],
        Prompts(prompts),
        learn_options=LearnOptions(work["minibatch"], epochs=work["epochs"], max_norm=1.0),
        **shared,
    )
    return grpo, parameters


def build_defaults(prompts: Tensor, **shared: Any) -> tuple[OnPolicyTrainer, dict[str, int]]:
    """The reference's README: LoRA, a pooled critic with six bins, a reward model on the same PaLM."""
    warnings.filterwarnings("ignore", message=".*of returns .*")  # an untrained reward knows nothing of the bins
    palm = new_palm(flash_attn=True)
    reward = RewardModel(palm)
    parameters = {"policy": size(palm), "reward": size(reward)}
    return RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, **shared), parameters


BUILDERS = {"ppo": build_ppo, "grpo": build_grpo, "defaults": build_defaults}


def build(**keywords: Any) -> dict[str, Any]:
    """Models, prompts and trainer; the keywords are rl_iteration.Work as a dict."""
    global trainer
    work.update(keywords)
    torch.manual_seed(work["seed"])
    prompts = torch.randint(1, work["vocab"], (4 * work["batch"], work["prompt"]))
    shared = {"seed": work["seed"], "accelerate_kwargs": {"cpu": work["device"] == "cpu"}}
    trainer, parameters = BUILDERS[work["kind"]](prompts, **shared)
    generation.generate = timed_generate
    register_optimizer_step_post_hook(count_steps)
    return {"parameters": parameters}


def iterate() -> dict[str, Any]:
    """One iteration: answers to a batch of prompts (all at once), scores, and all optimiser steps on them."""
    counts.update(optimizer_steps=0, tokens=0)
    spent["generation"] = 0.0
    prompts = work["batch"] // work["samples"]
    started = now(work["device"])
    trainer.train(1, prompts, prompts, prompts, work["prompt"] + work["response"])
    seconds = now(work["device"]) - started
    row = trainer.history[-1]
    return {
        "seconds": seconds,
        "generation": spent["generation"],
        "scoring": row["rollout_seconds"] - spent["generation"],
        "learning": row["learn_seconds"],
        **counts,
    }


if __name__ == "__main__":
    serve({"build": build, "iterate": iterate})
