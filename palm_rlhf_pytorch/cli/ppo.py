"""palm-rlhf ppo: a model, a reward model and prompts in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions, open_model, text_reward
from palm_rlhf_pytorch.cli.on_policy import LearningOptions, PracticeOptions, practise, trainer_keywords
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ppo import RLHFTrainer


@dataclass(frozen=True)
class PPOLearning(LearningOptions):
    """How PPO learns"""

    epochs: int = option(2, "passes over each batch of rollouts", least=1)
    minibatch_size: int = option(32, "sequences of an optimiser step", least=1)
    critic_lr: float = option(2e-3, "learning rate of the critic", least=0)
    kl: float = option(0.1, "weight of the KL to the starting policy in the reward", least=0)
    entropy: float = option(0.0, "weight of the entropy bonus")
    eps_clip: float = option(0.2, "clip range of the policy ratio", least=0)
    value_clip: float = option(0.4, "clip range of values, where the critic predicts a scalar", least=0)
    gamma: float = option(1.0, "discount", least=0)
    gae_lambda: float = option(0.95, "lambda of the generalised advantages", least=0)


def run(options: PracticeOptions, learning: PPOLearning, compute: PrecisionOptions, where: RunOptions) -> Path:
    directory, device = where.start(options.out, options.seed)
    palm, tokenizer = open_model(options.model, device, options.dtype)
    learning.ready(palm)
    reward = text_reward(options.reward, device, options.whole_text, options.max_seq_len)
    shared = trainer_keywords(options, learning, tokenizer, device, compute.precision)
    log = directory.start("ppo", where.resume, tokenizer, options=options, learning=learning, compute=compute)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward,
        critic_lora=learning.lora,
        critic_lora_r=learning.lora_r,
        critic_lr=learning.critic_lr,
        kl_div_loss_weight=learning.kl,
        beta_s=learning.entropy,
        eps_clip=learning.eps_clip,
        value_clip=learning.value_clip,
        gamma=learning.gamma,
        gae_lambda=learning.gae_lambda,
        critic_num_pred_bins=1,
        critic_pooled_values=False,
        metrics_path=log.path,
        **shared,
    )
    return practise(trainer, options, directory, tokenizer, where.resume)


OPTIONS = (PracticeOptions, PPOLearning, PrecisionOptions, RunOptions)
