"""TRL's PPO, one iteration a request. TRL 1.12 is the last release that has it (trl.experimental.ppo).

Run by rl_iteration.py in benchmarks/.venvs/trl_ppo. The policy is transformers' Cohere, PaLM's architecture;
`PPOTrainer.train` is called for one batch at a time.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from cohere import config_of
from serving import serve
from tasks import now
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import CohereConfig, CohereForCausalLM, CoherePreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_layers import GenericForSequenceClassification

device = "cpu"
trainer: Any = None
marks: dict[str, float] = {}  # when the named function last returned
counts = {"optimizer_steps": 0, "tokens": 0}
folder = tempfile.TemporaryDirectory()  # the trainers want one, though nothing is saved
# settings that have to do with measuring, not with the algorithm; both of TRL's trainers get them
QUIET: dict[str, Any] = dict(
    output_dir=folder.name,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
    learning_rate=1e-5,
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
    bf16=False,  # no autocast: the weights are in the work's dtype, as ours are
)


class CohereForSequenceClassification(GenericForSequenceClassification, CoherePreTrainedModel):
    """A Cohere with a head, which transformers does not have; made as it makes those of its other models."""


def marked(function: Callable) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        marks[function.__name__] = now(device)
        return out

    return wrapped


def count_steps(*_: Any) -> None:
    counts["optimizer_steps"] += 1


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def cohere_config(work: dict[str, Any]) -> CohereConfig:
    """The sizes of ours, without an end-of-text token: every response takes its full length."""
    names = {name: work[name] for name in ("dim", "depth", "heads", "dim_head")}
    fixed = dict(ff_mult=4, ff_inner_dim=None, kv_heads=1, logit_scale=1.0, norm_eps=1e-5, rotary_theta=10000)
    return config_of({"num_tokens": work["vocab"], **names, **fixed})


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """Word i is token i. Padding and end of text lie above the model's vocabulary, so neither is ever drawn."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def lora_config() -> Any:
    """Ours: rank 8, alpha 8, on q, k, v and the attention's output."""
    from peft import LoraConfig

    return LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


def build_models(work: dict[str, Any]) -> tuple[CohereForCausalLM, nn.Module, nn.Module]:
    """Policy, value model, reward model, all of one size."""
    config = cohere_config(work)
    scalar = copy.deepcopy(config)
    scalar.num_labels = 1
    where = (work["device"], getattr(torch, work["dtype"]))
    value, reward = (CohereForSequenceClassification(scalar).to(*where) for _ in range(2))
    return CohereForCausalLM(config).to(*where), value, reward


def build(**work: Any) -> dict[str, Any]:
    """Models, prompts and trainer; `work` is rl_iteration.Work as a dict."""
    global device, trainer
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    device = work["device"]
    torch.manual_seed(work["seed"])
    policy, value, reward = build_models(work)
    parameters = {"policy": size(policy), "critic": size(value), "reward": size(reward)}
    if work["lora"]:  # the trainer adapts the policy, and takes it without adapters as the reference
        from peft import inject_adapter_in_model

        value = inject_adapter_in_model(lora_config(), value)
        value.score.requires_grad_(True)
    prompts = torch.randint(1, work["vocab"], (4 * work["batch"], work["prompt"])).tolist()
    args = PPOConfig(
        # A minibatch is one micro batch and one optimiser step. With gradient accumulation a step would span several
        # minibatches, whatever num_mini_batches says.
        per_device_train_batch_size=work["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=work["batch"] // work["minibatch"],
        num_ppo_epochs=work["epochs"],
        total_episodes=work["batch"],
        local_rollout_forward_batch_size=work["batch"],
        response_length=work["response"],
        temperature=1.0,
        kl_coef=work["kl"],
        num_sample_generations=0,
        use_cpu=device == "cpu",
        **QUIET,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer_of(work["vocab"]),
        model=policy,
        ref_model=None if work["lora"] else copy.deepcopy(policy),
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        peft_config=lora_config() if work["lora"] else None,
    )
    watch(ppo_trainer)
    return {"parameters": parameters}


def watch(ppo_trainer: Any) -> None:
    """Note when tokens are drawn, when the last thing before learning is done, and every optimiser step."""
    batch_generation = ppo_trainer.batch_generation

    def counted(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        out = batch_generation(model, queries, *rest)
        counts["tokens"] += out[0].numel() - queries.numel()
        marks["drawn"] = now(device)
        return out

    ppo_trainer.batch_generation = counted
    ppo_trainer.masked_whiten = marked(ppo_trainer.masked_whiten)  # of the advantages
    register_optimizer_step_post_hook(count_steps)


def iterate() -> dict[str, Any]:
    """One iteration: answers to a batch of prompts, scores, and all optimiser steps on them."""
    counts.update(optimizer_steps=0, tokens=0)
    started = now(device)
    trainer.train()
    ended = now(device)
    drawn, judged = marks["drawn"], marks["masked_whiten"]
    split = {"generation": drawn - started, "scoring": judged - drawn, "learning": ended - judged}
    return {"seconds": ended - started, **split, **counts}


if __name__ == "__main__":
    serve({"build": build, "iterate": iterate})
