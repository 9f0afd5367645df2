"""What the commands that train on a model's own answers share: prompts in, practice, a better model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from palm_rlhf_pytorch.data import first_words, read_prompts, read_texts
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.interrupts import Interrupts
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.tokenizer import Tokenizer
from palm_rlhf_pytorch.trainer import OnPolicyTrainer


@dataclass(frozen=True)
class PracticeOptions:
    """What to improve, by what reward, on what prompts"""

    model: str = required("directory of a run that trained a language model (pretrain, sft, ppo, ...)")
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


def prompt_texts(options: PracticeOptions) -> list[str]:
    if options.prompt_words == 0:
        return read_prompts(options.prompts)
    texts = read_texts(options.prompts, lines=True)
    openings = (first_words(text, options.prompt_words) for text in texts)
    prompts = list(dict.fromkeys(prompt for prompt, rest in openings if rest.strip()))
    if not prompts:
        raise ValueError(f"{options.prompts}: no text has more than the {options.prompt_words} words of --prompt-words")
    return prompts


def prompt_ids(options: PracticeOptions, tokenizer: Tokenizer) -> Tensor:
    """The prompts (p, n), all of which leave room for a response."""
    ids, lengths = prompt_batch(tokenizer, prompt_texts(options), "cpu")
    if int(lengths.max()) >= options.max_seq_len:
        raise ValueError(
            f"the longest prompt has {int(lengths.max())} tokens, --max-seq-len {options.max_seq_len} leaves no room "
            "for a response: raise it, or shorten the prompts (--prompt-words)"
        )
    return ids


def practise(
    trainer: OnPolicyTrainer, options: PracticeOptions, directory: RunDirectory, tokenizer: Tokenizer, resume: bool
) -> Path:
    """Train for --updates with checkpoints, and write the policy. Ctrl-C lets the update under way end."""
    if resume and directory.has_state():
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
    directory.finish(trainer.metrics, type(trainer.algorithm).__name__)
    return directory.path
