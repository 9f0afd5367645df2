"""What PPO with LoRA on one trunk takes in memory, part by part: computed for a model of any size, none of it made.

python benchmarks/memory.py --work fits                # an 8-billion-parameter Cohere against 80 GB
python benchmarks/memory.py --work fits --device cuda  # the same, measured: where there is a GPU of that size
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.vocabulary import LOGITS_PER_CHUNK

GB = 1e9
# CohereLabs/aya-expanse-8b's config.json
AYA_8B = {
    "num_tokens": 256000,
    "dim": 4096,
    "depth": 32,
    "heads": 32,
    "kv_heads": 8,
    "dim_head": 128,
    "ff_inner_dim": 14336,
    "rotary_theta": 10000,
    "use_xpos": False,
    "logit_scale": 0.125,
}


@dataclass(frozen=True)
class Plan:
    """How PPO is run: LoRA's rank, answers sampled at once and kept for an update, tokens of each, and how many
    sequences are computed at once with gradients.
    """

    rank: int = 16
    at_once: int = 64
    rollout: int = 64
    length: int = 384  # 128 of a prompt, 256 of an answer
    micro_batch: int = 4


def new_palm(sizes: Mapping[str, Any], device: str, dtype: torch.dtype) -> PaLM:
    """With random weights; on the device "meta" these take no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return PaLM(**sizes, flash_attn=True, gradient_checkpointing=True)
    finally:
        torch.set_default_dtype(before)


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def parts(sizes: Mapping[str, Any], plan: Plan, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes of what stays, and of the two phases that take turns: a rollout, and a micro-batch's step."""
    palm = new_palm(sizes, "meta", dtype)
    with torch.device("meta"):
        roles = ActorCritic(palm, actor_lora_r=plan.rank, critic_lora_r=plan.rank, critic_dim_out=1)
    size = torch.finfo(dtype).bits // 8
    block = palm.layers[0].fn
    trained = [*roles.actor_parameters(), *roles.critic_parameters()]
    touched = sum(
        bytes_of(rows)
        for layer, lora in zip(palm.layers, palm.finetune_modules["actor"], strict=True)
        for rows, _ in layer.fn.adapted(lora)
    )
    tokens = plan.micro_batch * plan.length
    inner = block.fused_attn_ff_proj.out_features
    return {
        "weights, once": bytes_of(*palm.palm_parameters(), *palm.buffers()),
        "adapters and heads, float32, with gradients and Adam": 4 * bytes_of(*trained),
        "rollout: key/value cache": bytes_of(palm.new_cache(plan.at_once, plan.length).memory),
        "rollout: weights that merged adapters replace": touched,
        "rollout: logits of a step": plan.at_once * palm.num_tokens * (size + 4 * 3),
        "step: inputs of layers (computed again)": (len(palm.layers) + 1) * tokens * palm.dim * size,
        "step: one layer, forward and backward": 4 * tokens * (inner + 2 * palm.dim) * size,
        "step: logits of a chunk, float32": 3 * 4 * max(LOGITS_PER_CHUNK, palm.num_tokens),
    }


def peak(of: Mapping[str, float]) -> float:
    """What stays, and the larger phase: they take turns."""
    phase = {name: sum(v for k, v in of.items() if k.startswith(name)) for name in ("rollout:", "step:")}
    return sum(of.values()) - min(phase.values())


def copies(sizes: Mapping[str, Any]) -> float:
    """The weights three times over in bf16, as where policy, critic and reference are models apart."""
    return 3 * bytes_of(*new_palm(sizes, "meta", torch.bfloat16).palm_parameters())


def measured(sizes: Mapping[str, Any], plan: Plan, device: str, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes that torch allocated at most over one PPO update of a model with random weights; on a GPU alone."""
    torch.cuda.reset_peak_memory_stats()
    trainer = random_trainer(sizes, plan, device, dtype)
    trainer.train(1, plan.rollout, plan.rollout, plan.at_once, plan.length)
    return torch.cuda.max_memory_allocated()


def random_trainer(sizes: Mapping[str, Any], plan: Plan, device: str, dtype: torch.dtype) -> RLHFTrainer:
    """PPO on made-up weights, with a function as reward."""
    palm = new_palm(sizes, device, dtype)
    return RLHFTrainer(
        palm=palm,
        reward_model=lambda prompts, answers: [float(len(answer)) for answer in answers],
        reward_over="tokens",
        prompt_token_ids=torch.randint(1, palm.num_tokens, (plan.rollout, plan.length // 3)),
        actor_lora_r=plan.rank,
        critic_lora_r=plan.rank,
        critic_num_pred_bins=1,
        minibatch_size=plan.rollout,
        micro_batch_size=plan.micro_batch,
        epochs=1,
        accelerate_kwargs={"cpu": True} if device == "cpu" else None,
    )


def rows_of(sizes: Mapping[str, Any], plan: Plan) -> list[dict[str, str]]:
    of = parts(sizes, plan)
    rows = [{"part": name, "GB": f"{size / GB:.2f}"} for name, size in of.items()]
    rows.append({"part": "**at most at once** (a rollout and a step take turns)", "GB": f"**{peak(of) / GB:.1f}**"})
    three = {"part": "policy, critic and reference as three models: weights alone"}
    return [*rows, {**three, "GB": f"{copies(sizes) / GB:.1f}"}]


def longest(sizes: Mapping[str, Any], plan: Plan, room: float) -> int:
    """The most tokens of a sequence, prompt and answer, that fit into so many bytes."""
    low, high = 1, 2**20
    while low < high:
        middle = (low + high + 1) // 2
        fits = peak(parts(sizes, replace(plan, length=middle))) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
