"""TRL's GRPO, one iteration a request: a batch of completions and all optimiser steps on it.

Run by rl_iteration.py in benchmarks/.venvs/trl_grpo. `GRPOTrainer.train` runs in a thread of its own, the only one that
computes, and waits after each iteration, so that the peers can take turns.
"""

from __future__ import annotations

import threading
from queue import Queue
from typing import Any

import torch
import trl_ppo
from serving import serve
from tasks import now
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CohereForCausalLM, TrainerCallback
from trl_ppo import QUIET, cohere_config, count_steps, counts, lora_config, marked, marks, size, tokenizer_of

go: Queue = Queue()
done: Queue = Queue()
trainer: Any = None


def odd_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing: the share of odd token ids."""
    counts["tokens"] += sum(len(ids) for ids in completion_ids)
    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]


class Turns(TrainerCallback):
    """Stops training after every `steps` optimiser steps until it is told to go on."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.steps == 0:
            done.put(now(trl_ppo.device))
            go.get()


def run() -> None:
    """The thread. What ends it is raised by `iterate`."""
    torch.set_num_threads(torch.get_num_threads())  # OpenMP keeps the number by thread
    go.get()
    try:
        trainer.train()
        done.put(RuntimeError("training came to its end"))
    except Exception as error:
        done.put(error)


def build(**work: Any) -> dict[str, Any]:
    """Model, prompts and trainer; `work` is rl_iteration.Work as a dict."""
    global trainer
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trl_ppo.device = work["device"]
    torch.manual_seed(work["seed"])
    policy = CohereForCausalLM(cohere_config(work)).to(work["device"], getattr(torch, work["dtype"]))
    parameters = {"policy": size(policy)}
    prompts = torch.randint(1, work["vocab"], (2048, work["prompt"])).tolist()
    steps = work["batch"] // work["minibatch"]
    args = GRPOConfig(
        per_device_train_batch_size=work["minibatch"],
        steps_per_generation=steps,
        gradient_accumulation_steps=1,
        num_generations=work["samples"],
        num_iterations=work["epochs"],
        max_completion_length=work["response"],
        temperature=1.0,
        beta=0.0,
        max_steps=10**6,
        use_cpu=work["device"] == "cpu",
        **QUIET,
    )
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=odd_tokens,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in prompts]}),
        processing_class=tokenizer_of(work["vocab"]),
        peft_config=lora_config() if work["lora"] else None,
        callbacks=[Turns(steps * work["epochs"])],
    )
    trainer._generate = marked(trainer._generate)
    trainer._generate_and_score_completions = marked(trainer._generate_and_score_completions)
    register_optimizer_step_post_hook(count_steps)
    threading.Thread(target=run, daemon=True).start()
    return {"parameters": parameters}


def iterate() -> dict[str, Any]:
    """One iteration. The first also has what `train` does before its loop."""
    counts.update(optimizer_steps=0, tokens=0)
    started = now(trl_ppo.device)
    go.put(None)
    ended = done.get()
    if isinstance(ended, Exception):
        raise ended
    drawn, scored = marks["_generate"], marks["_generate_and_score_completions"]
    split = {"generation": drawn - started, "scoring": scored - drawn, "learning": ended - scored}
    return {"seconds": ended - started, **split, **counts}


if __name__ == "__main__":
    serve({"build": build, "iterate": iterate})
