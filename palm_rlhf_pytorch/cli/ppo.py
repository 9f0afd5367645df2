"""palm-rlhf ppo: a model, a reward model and prompts in, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import PrecisionOptions, RunOptions, text_reward
from palm_rlhf_pytorch.data import first_words, read_prompts, read_texts
from palm_rlhf_pytorch.devices import accelerate_keywords
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.interrupts import Interrupts
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.run_directory import RunDirectory


@dataclass(frozen=True)
class PPOCommandOptions:
    """What to improve, by what reward, on what prompts"""

    model: str = required("directory of a pretrained run (or of an earlier ppo run)")
    reward: tuple[str, ...] = required("directory of a reward run, or several, whose mean counts")
    prompts: str = required("prompts: a .txt with one a line, or records with a prompt column")
    out: str = option("runs/ppo", "directory of the run")
    prompt_words: int = option(0, "take the first words of the texts in --prompts instead of whole prompts", least=0)
    whole_text: bool | None = option(
        None, "rate prompt and response as one text (default: where the reward was learned on texts alone)"
    )
    seed: int = option(0, "seed of everything")
    updates: int = option(50, "times to roll out and learn", least=1)
    rollouts: int = option(128, "prompts answered for each update", least=1)
    rollout_batch: int = option(64, "prompts answered at once", least=1)
    max_seq_len: int = option(256, "tokens of prompt and response together", least=2)
    temperature: float = option(1.0, "sampling temperature", least=0.01)
    save_every: int = option(10, "updates between checkpoints to resume from", least=1)


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


def prompt_texts(options: PPOCommandOptions) -> list[str]:
    if options.prompt_words == 0:
        return read_prompts(options.prompts)
    texts = read_texts(options.prompts, lines=True)
    openings = (first_words(text, options.prompt_words) for text in texts)
    prompts = list(dict.fromkeys(prompt for prompt, rest in openings if rest.strip()))
    if not prompts:
        raise ValueError(f"{options.prompts}: no text has more than the {options.prompt_words} words of --prompt-words")
    return prompts


def run(options: PPOCommandOptions, learning: PPOLearning, compute: PrecisionOptions, where: RunOptions) -> Path:
    directory, device = where.start(options.out, options.seed)
    source = RunDirectory(options.model)
    palm, tokenizer = source.palm().to(device), source.tokenizer()
    reward = text_reward(options.reward, device, options.whole_text, options.max_seq_len)
    ids, lengths = prompt_batch(tokenizer, prompt_texts(options), "cpu")
    if int(lengths.max()) >= options.max_seq_len:
        raise ValueError(
            f"the longest prompt has {int(lengths.max())} tokens, --max-seq-len {options.max_seq_len} leaves no room "
            "for a response: raise it, or shorten the prompts (--prompt-words)"
        )
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
    if where.resume and directory.has_state():
        trainer.load(directory.state)

    def keep(row: dict[str, float]) -> None:
        if interrupts.asked or row["step"] % options.save_every == 0 or row["step"] == options.updates:
            trainer.save(directory.state)
        if interrupts.asked:
            raise KeyboardInterrupt(
                f"stopped after update {row['step']}; {str(directory.state)!r} holds it, --resume goes on from there"
            )

    with Interrupts() as interrupts:
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


OPTIONS = (PPOCommandOptions, PPOLearning, PrecisionOptions, RunOptions)
