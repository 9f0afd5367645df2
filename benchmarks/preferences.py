"""Pairs of which a quarter is labelled the wrong way round: a reward model, and what best-of-n, DPO and PPO make of it.

Texts of eight letters out of sixteen have a true reward, the sum of what each letter and each pair of neighbours is
worth. A policy that writes any of them alike is the reference; its samples are the pairs. Where a policy ends is a
point: its KL to the reference, and its mean true reward in standard deviations of the reference's samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.algorithms.dpo import DPO
from palm_rlhf_pytorch.data import Pair
from palm_rlhf_pytorch.evaluation import prompt_batch, sample
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, train_language_model
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.preference import train_on_answers
from palm_rlhf_pytorch.rating import RatingOptions, new_reward_model, train_on_pairs
from palm_rlhf_pytorch.rejection import kl_bound
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.text_reward import TextReward
from palm_rlhf_pytorch.tokenizer import Tokenizer

LETTERS, LENGTH, ROOM = "abcdefghijklmnop", 8, 12  # tokens of bos, eight letters and eos, and some to spare
PAIRS, HELD_OUT, FLIPS, EPOCHS = 20_000, 2000, 0.25, 2


class LetterTokenizer(Tokenizer):
    """A token for each letter, after pad, bos and eos."""

    num_tokens = 3 + len(LETTERS)
    pad_id, bos_id, eos_id = range(3)

    def encode(self, text: str) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def _decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - 3] for i in ids)

    def save(self, directory: object) -> None:
        raise NotImplementedError("this vocabulary lives in a benchmark")


TOKENIZER = LetterTokenizer()


class TrueReward:
    """What letters and neighbours are worth; the same for all seeds. Texts of another length are worth the least."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.letters = torch.randn(len(LETTERS), generator=generator)
        self.neighbours = 0.25 * torch.randn(len(LETTERS), len(LETTERS), generator=generator)
        every = torch.randint(len(LETTERS), (20_000, LENGTH), generator=generator)
        worth = self.worth(every)
        self.mean, self.std, self.least = worth.mean(), worth.std(), worth.min()

    def worth(self, letters: Tensor) -> Tensor:
        return self.letters[letters].sum(dim=-1) + self.neighbours[letters[:, :-1], letters[:, 1:]].sum(dim=-1)

    def __call__(self, texts: list[str]) -> Tensor:
        """Texts -> in standard deviations above the mean of all texts (b,)."""
        whole = torch.tensor([len(text) == LENGTH for text in texts])
        ids = [[LETTERS.index(letter) for letter in text[:LENGTH].ljust(LENGTH, "a")] for text in texts]
        worth = torch.where(whole, self.worth(torch.tensor(ids)), self.least)
        return (worth - self.mean) / self.std


@dataclass(frozen=True)
class Point:
    """Where a method ended: how it was told to go, KL to the reference, mean true reward, that of the reward model."""

    method: str
    strength: str
    kl: float
    true: float
    proxy: float


def any_texts(count: int, generator: torch.Generator) -> list[str]:
    letters = torch.randint(len(LETTERS), (count, LENGTH), generator=generator)
    return ["".join(LETTERS[i] for i in row) for row in letters.tolist()]


def new_reference(seed: int) -> PaLM:
    """A policy that writes eight letters, any of them."""
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=64, depth=2, heads=2, dim_head=32, flash_attn=True)
    texts = any_texts(20_000, torch.Generator().manual_seed(seed))
    corpus = build_corpus(texts, [], TOKENIZER, CorpusOptions(seq_len=100, batch_size=16, seed=seed))
    train_language_model(palm, corpus, FitOptions(steps=300, lr=2e-3, weight_decay=0.0), batch_size=64)
    return palm


def new_pairs(texts: list[str], truth: TrueReward, flips: float, generator: torch.Generator) -> list[Pair]:
    """Neighbouring texts, the better one chosen; a share of the labels is turned."""
    scores = truth(texts)
    first_better = scores[::2] > scores[1::2]
    turned = torch.rand(len(first_better), generator=generator) < flips
    sides = zip(texts[::2], texts[1::2], (first_better ^ turned).tolist(), strict=True)
    return [Pair("", a, b) if first else Pair("", b, a) for a, b, first in sides]


def measured(palm: PaLM, reference: PaLM, truth: TrueReward, proxy: TextReward, how: tuple[str, str]) -> Point:
    samples = sample(palm, TOKENIZER, [""] * 1024, ROOM, reference=reference, seed=1)
    scores = proxy(samples.prompts, samples.responses)
    return Point(*how, float(samples.kl.mean()), float(truth(samples.responses).mean()), float(scores.mean()))


def best_of(n: int, texts: list[str], truth: TrueReward, proxy: TextReward) -> Point:
    """The KL is a bound."""
    scores = proxy([""] * len(texts), texts).view(-1, n)
    best = scores.argmax(dim=-1, keepdim=True)
    true = truth(texts).view(-1, n).gather(1, best).mean()
    return Point("best of n", str(n), kl_bound(n), float(true), float(scores.amax(dim=-1).mean()))


def by_dpo(reference: PaLM, pairs: list[Pair], beta: float, seed: int) -> PaLM:
    palm = deepcopy(reference)
    tuning = TuningOptions(lora=False, max_len=ROOM, batch_size=128, seed=seed)
    fit = FitOptions(steps=EPOCHS * len(pairs) // 128, lr=2e-4, warmup=10, weight_decay=0.0)
    train_on_answers(palm, pairs, [], TOKENIZER, tuning, fit, objective=DPO(beta=beta))
    return palm


def by_ppo(reference: PaLM, proxy: TextReward, kl: float, seed: int, updates: int) -> PaLM:
    ids, _ = prompt_batch(TOKENIZER, [""], "cpu")
    trainer = RLHFTrainer(
        palm=deepcopy(reference),
        reward_model=proxy,
        reward_over="text",
        prompt_token_ids=ids,
        pad_value=TOKENIZER.pad_id,
        tokenizer=TOKENIZER,
        actor_lora=False,
        critic_lora=False,
        critic_num_pred_bins=1,
        critic_pooled_values=False,
        actor_lr=3e-4,
        critic_lr=1e-3,
        kl_div_loss_weight=kl,
        beta_s=0.0,
        minibatch_size=128,
        epochs=2,
        max_norm=1.0,
        seed=seed,
        accelerate_kwargs={"cpu": True},
    )
    trainer.train(updates, 256, 256, 256, ROOM, TOKENIZER.eos_id)
    return trainer.merged_policy()


def run(seed: int, flips: float = FLIPS, updates: int = 100) -> tuple[dict[str, float], Iterator[Point]]:
    """-> accuracies of the reward model on held-out pairs, labelled with the same noise and without; and the points.
    With flips 0.5 the labels say nothing: the control.
    """
    truth, generator = TrueReward(), torch.Generator().manual_seed(seed)
    reference = new_reference(seed)
    texts = sample(reference, TOKENIZER, [""] * 2 * (PAIRS + HELD_OUT), ROOM, seed=seed, batch_size=1024).responses
    train, held = texts[: 2 * PAIRS], texts[2 * PAIRS :]
    pairs, noisy = (new_pairs(some, truth, flips, generator) for some in (train, held))
    clean = new_pairs(held, truth, 0.0, generator)

    model = new_reward_model(reference, None, 0.0, lora=False, lora_r=8)
    options = RatingOptions(max_len=ROOM, batch_size=128, seed=seed)
    fit = FitOptions(steps=EPOCHS * PAIRS // 128, lr=1e-3, warmup=20, weight_decay=0.1)
    train_on_pairs(model, pairs, [], TOKENIZER, options, fit)
    proxy = TextReward([(model.eval(), TOKENIZER)], max_len=ROOM)
    accuracies = {name: accuracy(proxy, some) for name, some in (("noisy", noisy), ("clean", clean))}

    def points() -> Iterator[Point]:
        yield measured(reference, reference, truth, proxy, ("reference", ""))
        for n in (2, 4, 16, 64):
            yield best_of(n, held[: len(held) // n * n], truth, proxy)
        for beta in (1.0, 0.3, 0.1):
            yield measured(by_dpo(reference, pairs, beta, seed), reference, truth, proxy, ("DPO", f"beta {beta}"))
        for kl in (1.0, 0.3, 0.1):
            palm = by_ppo(reference, proxy, kl, seed, updates)
            yield measured(palm, reference, truth, proxy, ("PPO", f"KL {kl}"))

    return accuracies, points()


def accuracy(proxy: TextReward, pairs: list[Pair]) -> float:
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = (proxy(prompts, [getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected"))
    return float((chosen > rejected).float().mean())
