"""Rejection sampling: of several answers to each prompt the best is kept, to be learned from.

Nakano et al., "WebGPT", 2112.09332; the best fine-tuned on, Touvron et al., "Llama 2", 2307.09288, section 3.2.3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch import generation
from palm_rlhf_pytorch.conversation import as_json, from_json
from palm_rlhf_pytorch.data import read_records
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.files import atomic_path
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.palm import PaLM, seeded
from palm_rlhf_pytorch.prompts import Remembered
from palm_rlhf_pytorch.rollout import Reward, Scorer, ends_with_eos
from palm_rlhf_pytorch.tokenizer import Tokenizer

BATCHES_AT_ONCE = 8  # whose answers are in memory together, so that few places wait for a window's last answers


@dataclass(frozen=True)
class BestOfOptions:
    """How answers are drawn"""

    samples: int = option(8, "answers to each prompt, of which the best is kept", least=1)
    rollout_batch: int = option(64, "answers drawn at once", least=1)
    max_seq_len: int = option(256, "tokens of prompt and response together", least=2)
    temperature: float = option(1.0, "sampling temperature", least=0.01)
    missing_eos_penalty: float = option(0.0, "taken from the score of a response that did not finish")


class Best(NamedTuple):
    """The best answer to a prompt, its score, and the mean score of all answers to it."""

    prompt: str
    response: str
    score: float
    mean_score: float
    finished: bool


@torch.no_grad()
def best_of_n(
    palm: PaLM, tokenizer: Tokenizer, prompts: Sequence[str], reward: Reward, options: BestOfOptions, seed: int = 0
) -> list[Best]:
    """The answer with the highest score of `samples` to each prompt. The reward is one that `Scorer` takes: of text."""
    palm.eval()
    ids, lengths = (t.to(palm.device) for t in prompts_with_room(tokenizer, prompts, options.max_seq_len))
    scorer, generator, n = Scorer(reward, Remembered(tokenizer, prompts)), seeded(seed, palm.device), options.samples
    scorer.check(palm.num_tokens)
    window = max(1, BATCHES_AT_ONCE * options.rollout_batch // n)
    found: list[Best] = []
    with tqdm(total=n * len(prompts), desc=f"best of {n}", unit="answer") as bar:
        for start in range(0, len(prompts), window):
            part = slice(start, start + window)
            answers = generation.generate(
                palm,
                *generation.repeat_prompts(ids[part], lengths[part], n),
                options.max_seq_len,
                generation.Sampling(options.temperature),
                tokenizer.pad_id,
                eos_token=tokenizer.eos_ids,
                generator=generator,
                max_batch=options.rollout_batch,
                on_ended=bar.update,
            )
            finished = ends_with_eos(answers.sequence, answers.mask, tokenizer.eos_ids)
            tokens = options.rollout_batch * answers.sequence.shape[1]
            scores = scorer(answers, tokens, options.rollout_batch) - options.missing_eos_penalty * ~finished
            for i, (prompt, group) in enumerate(zip(prompts[part], scores.view(-1, n), strict=True)):
                row = n * i + int(group.argmax())
                response = tokenizer.decode(answers.sequence[row][answers.response_mask[row]])
                found.append(Best(prompt, response, float(group.max()), float(group.mean()), bool(finished[row])))
    return found


def prompts_with_room(tokenizer: Tokenizer, prompts: Sequence[str], max_seq_len: int) -> tuple[Tensor, Tensor]:
    """`prompt_batch`, on the CPU, which refuses prompts that leave no room for a response."""
    ids, lengths = prompt_batch(tokenizer, prompts, "cpu")
    if int(lengths.max()) >= max_seq_len:
        raise ValueError(
            f"the longest prompt has {int(lengths.max())} tokens, --max-seq-len {max_seq_len} leaves no room for a "
            "response: raise it, or shorten the prompts (--prompt-words)"
        )
    return ids, lengths


def kl_bound(n: int) -> float:
    """KL(best of n || policy) is at most ln n - (n - 1) / n nats: given as the KL by Stiennon et al., 2009.01325,
    appendix G.3, unnumbered; shown to be a bound by Beirami et al., 2401.01879, section 3.
    """
    return math.log(n) - (n - 1) / n


def summary(found: Sequence[Best], n: int) -> str:
    """What the choice gained, and how far it went."""
    best, mean = fmean(b.score for b in found), fmean(b.mean_score for b in found)
    return (
        f"best of {n}: mean score {best:.3f} (of all answers {mean:.3f}), "
        f"at most {kl_bound(n):.2f} nats of KL, {fmean(b.finished for b in found):.0%} finished"
    )


def write_best(path: str | Path, found: Sequence[Best]) -> None:
    """JSON Lines, atomically; `read_demonstrations` takes them."""
    with atomic_path(path) as temporary:
        lines = (json.dumps({**b._asdict(), "prompt": as_json(b.prompt)}, ensure_ascii=False) + "\n" for b in found)
        temporary.write_text("".join(lines), encoding="utf-8")


def read_best(path: str | Path) -> list[Best]:
    """What `write_best` wrote."""
    return [Best(**{**record, "prompt": from_json(record["prompt"])}) for _, record in read_records(path)]
