"""palm-rlhf ppo: a model, a reward model and prompts in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import RunOptions, text_reward
from palm_rlhf_pytorch.data import first_words, read_prompts, read_texts
from palm_rlhf_pytorch.devices import accelerate_keywords
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.run_directory import RunDirectory


@dataclass(frozen=True)
class PPOCommandOptions:
    """What to improve, by what reward, on what prompts"""

    model: str = required("directory of a pretrained run (or of an earlier ppo run)")
    reward: tuple[str, ...] = required("directory of a reward run, or several, whose mean counts")
    prompts: str = required("prompts: a .txt with one a line, or records with a prompt column")
    out: str = option("runs/ppo", "directory of the run")
    prompt_words: int = option(0, "take the first words of the texts in --prompts instead of whole prompts")
    whole_text: bool = option(False, "rate prompt and response as one text (for rewards learned on texts alone)")
    seed: int = option(0, "seed of everything")
    updates: int = option(50, "times to roll out and learn")
    rollouts: int = option(128, "prompts answered for each update")
    rollout_batch: int = option(64, "prompts answered at once")
    max_seq_len: int = option(256, "tokens of prompt and response together")
    temperature: float = option(1.0, "sampling temperature")
    save_every: int = option(10, "updates between checkpoints to resume from")


@dataclass(frozen=True)
class PPOLearning:
    """How PPO learns"""

    lora: bool = option(True, "train adapters on one frozen trunk that actor, critic and reference share")
    lora_r: int = option(16, "rank of the adapters")
    actor_lr: float = option(1e-3, "learning rate of the policy")
    critic_lr: float = option(2e-3, "learning rate of the critic")
    kl: float = option(0.1, "weight of the KL to the starting policy in the reward")
    entropy: float = option(0.0, "weight of the entropy bonus")
    epochs: int = option(2, "passes over each batch of rollouts")
    minibatch_size: int = option(32, "sequences of an optimiser step")
    micro_batch_size: int | None = option(None, "sequences computed at once (default: the whole minibatch)")
    max_norm: float = option(1.0, "gradient norm to clip at")
    eps_clip: float = option(0.2, "clip range of the policy ratio")
    value_clip: float = option(0.4, "clip range of values, where the critic predicts a scalar")
    gamma: float = option(1.0, "discount")
    gae_lambda: float = option(0.95, "lambda of the generalised advantages")
    normalize_reward: bool = option(False, "scale rewards to mean 0, std 1 on the starting policy's samples")
    missing_eos_penalty: float = option(0.0, "taken from the reward of a response that did not finish")


def prompt_texts(options: PPOCommandOptions) -> list[str]:
    if options.prompt_words == 0:
        return read_prompts(options.prompts)
    texts = read_texts(options.prompts, lines=True)
    openings = (first_words(text, options.prompt_words) for text in texts)
    return list(dict.fromkeys(prompt for prompt, rest in openings if rest.strip()))


def run(options: PPOCommandOptions, learning: PPOLearning, where: RunOptions) -> Path:
    device = where.start(options.seed)
    source, directory = RunDirectory(options.model), RunDirectory(options.out)
    tokenizer, palm = source.tokenizer(), source.palm().to(device)
    reward = text_reward(options.reward, device, options.whole_text, options.max_seq_len)
    ids, _ = prompt_batch(tokenizer, prompt_texts(options), "cpu")
    log = directory.start("ppo", where.resume, options=options, learning=learning)
    tokenizer.save(directory.path)
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
        accelerate_kwargs=accelerate_keywords(device),
    )
    if where.resume:
        trainer.load(directory.state)

    def keep(row: dict[str, float]) -> None:
        if row["step"] % options.save_every == 0 or row["step"] == options.updates:
            trainer.save(directory.state)

    trainer.train(
        num_episodes=options.updates,
        max_timesteps=options.rollouts,
        update_timesteps=options.rollouts,
        max_batch_size=options.rollout_batch,
        max_seq_len=options.max_seq_len,
        eos_token=tokenizer.eos_id,
        temperature=options.temperature,
        on_update=keep,
    )
    trainer.merged_policy().save(directory.weights)
    directory.finish(trainer.metrics, "ppo")
    return directory.path


OPTIONS = (PPOCommandOptions, PPOLearning, RunOptions)
