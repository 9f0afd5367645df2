"""palm-rlhf ppo: a model, a reward model and prompts in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions, text_reward
from palm_rlhf_pytorch.cli.on_policy import PracticeOptions, practise, prompt_ids
from palm_rlhf_pytorch.devices import accelerate_keywords
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.run_directory import RunDirectory


@dataclass(frozen=True)
class PPOLearning:
    """How PPO learns"""

    lora: bool = option(True, "train adapters on one frozen trunk that actor, critic and reference share")
    lora_r: int = option(16, "rank of the adapters", least=1)
    actor_lr: float = option(1e-3, "learning rate of the policy", least=0)
    critic_lr: float = option(2e-3, "learning rate of the critic", least=0)
    kl: float = option(0.1, "weight of the KL to the starting policy in the reward", least=0)
    entropy: float = option(0.0, "weight of the entropy bonus")
    epochs: int = option(2, "passes over each batch of rollouts", least=1)
    minibatch_size: int = option(32, "sequences of an optimiser step", least=1)
    micro_batch_size: int | None = option(None, "sequences computed at once (default: the whole minibatch)", least=1)
    max_norm: float = option(1.0, "gradient norm to clip at", least=1e-6)
    eps_clip: float = option(0.2, "clip range of the policy ratio", least=0)
    value_clip: float = option(0.4, "clip range of values, where the critic predicts a scalar", least=0)
    gamma: float = option(1.0, "discount", least=0)
    gae_lambda: float = option(0.95, "lambda of the generalised advantages", least=0)
    normalize_reward: bool = option(False, "scale rewards to mean 0, std 1 on the starting policy's samples")
    missing_eos_penalty: float = option(0.0, "taken from the reward of a response that did not finish")


def run(options: PracticeOptions, learning: PPOLearning, compute: PrecisionOptions, where: RunOptions) -> Path:
    directory, device = where.start(options.out, options.seed)
    source = RunDirectory(options.model)
    palm, tokenizer = source.palm().to(device), source.tokenizer()
    reward = text_reward(options.reward, device, options.whole_text, options.max_seq_len)
    ids = prompt_ids(options, tokenizer)
    log = directory.start("ppo", where.resume, tokenizer, options=options, learning=learning, compute=compute)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward,
        prompt_token_ids=ids,
        pad_value=tokenizer.pad_id,
        tokenizer=tokenizer,
        actor_lora=learning.lora,
        critic_lora=learning.lora,
        actor_lora_r=learning.lora_r,
        critic_lora_r=learning.lora_r,
        actor_lr=learning.actor_lr,
        critic_lr=learning.critic_lr,
        kl_div_loss_weight=learning.kl,
        beta_s=learning.entropy,
        epochs=learning.epochs,
        minibatch_size=learning.minibatch_size,
        micro_batch_size=learning.micro_batch_size,
        max_norm=learning.max_norm,
        eps_clip=learning.eps_clip,
        value_clip=learning.value_clip,
        gamma=learning.gamma,
        gae_lambda=learning.gae_lambda,
        normalize_reward=learning.normalize_reward,
        missing_eos_penalty=learning.missing_eos_penalty,
        critic_num_pred_bins=1,
        critic_pooled_values=False,
        seed=options.seed,
        metrics_path=log.path,
        accelerate_kwargs=accelerate_keywords(device, compute.precision),
    )
    return practise(trainer, options, directory, tokenizer, where.resume)


OPTIONS = (PracticeOptions, PPOLearning, PrecisionOptions, RunOptions)
