"""The reference's PPO (PaLM-rlhf-pytorch 0.8.0) with its defaults, one prompt a request, as it takes them.

Run by rl_iteration.py in benchmarks/.venvs/reference. Its RLHFTrainer rolls out one prompt after another without a
cache, so its time for several is the sum; `train` is called for one, which is learned from at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from serving import serve
from tasks import now
from torch.optim.optimizer import register_optimizer_step_post_hook

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

SIZES = {"num_tokens": "vocab", "dim": "dim", "depth": "depth", "heads": "heads", "dim_head": "dim_head"}
spent = {"generation": 0.0, "learning": 0.0}
counts = {"optimizer_steps": 0, "tokens": 0}
trainer: Any = None
work: dict[str, Any] = {}


def timed(part: str, function: Callable) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = now(work["device"])
        out = function(*args, **kwargs)
        spent[part] += now(work["device"]) - started
        counts["tokens"] += out.numel() if part == "generation" else 0
        return out

    return wrapped


def count_steps(*_: Any) -> None:
    counts["optimizer_steps"] += 1


def build(**keywords: Any) -> dict[str, Any]:
    """Models, prompts and trainer; the keywords are rl_iteration.Work as a dict."""
    global trainer
    work.update(keywords)
    torch.manual_seed(work["seed"])
    palm = PaLM(**{name: work[ours] for name, ours in SIZES.items()}, flash_attn=True).to(work["device"])
    reward = RewardModel(palm).to(work["device"])
    parameters = {name: sum(p.numel() for p in m.parameters()) for name, m in (("policy", palm), ("reward", reward))}
    prompts = torch.randint(1, work["vocab"], (4, work["prompt"]), device=work["device"])
    accelerate = {"cpu": work["device"] == "cpu"}
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, accelerate_kwargs=accelerate)
    actor = trainer.actor_critic.actor_palm
    actor.generate = timed("generation", actor.generate)
    trainer.learn = timed("learning", trainer.learn)
    register_optimizer_step_post_hook(count_steps)
    return {"parameters": parameters}


def iterate(response: int | None = None) -> dict[str, Any]:
    """One prompt answered with `response` tokens (None: the work's), scored and learned from."""
    spent.update(generation=0.0, learning=0.0)
    counts.update(optimizer_steps=0, tokens=0)
    max_seq_len = work["prompt"] + (response or work["response"])
    started = now(work["device"])
    trainer.train(num_episodes=1, max_timesteps=1, update_timesteps=1, max_seq_len=max_seq_len)
    seconds = now(work["device"]) - started
    return {"seconds": seconds, "scoring": seconds - sum(spent.values()), **spent, **counts}


if __name__ == "__main__":
    serve({"build": build, "iterate": iterate})
