"""Sums with carry, learned byte by byte: a little pretraining, then GRPO on answers that code can check.

    python examples/arithmetic.py --seed 0

A PaLM reads sums like `37+85=122` until its samples solve a third of them; then it practises on problems alone. Code
rewards its answers: 1 where they are right, and up to a half for the digits that are. A tenth of all problems is held
out from both. Prints the share of these that sampled answers solve, before and after, and leaves metrics.jsonl and
report.json in --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.batches import encode_prompt, pad_sequences
from palm_rlhf_pytorch.grpo import RLHFTrainer
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, train_language_model
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
LONGEST = 12  # tokens of bos, "99+99=", "198" and eos, and one to spare
LR, WARMUP = 3.5e-4, 20  # of GRPO: rises over so many updates, then falls to a fifth


def problems(seed: int) -> tuple[list[str], list[str]]:
    """All sums of two numbers below 100, as `37+85=`: nine tenths to learn from, one held out."""
    order = torch.randperm(100 * 100, generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [f"{i // 100}+{i % 100}=" for i in order]
    return texts[1000:], texts[:1000]


def answer(problem: str) -> str:
    a, b = problem.rstrip("=").split("+")
    return str(int(a) + int(b))


def correct(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for the right number and nothing else."""
    return [float(r == answer(p)) for p, r in zip(prompts, responses, strict=True)]


def digits(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of right digits, 0 where there are more or fewer than there should be."""
    pairs = [(answer(p), r) for p, r in zip(prompts, responses, strict=True)]
    return [(len(a) == len(r)) * sum(x == y for x, y in zip(a, r, strict=False)) / len(a) for a, r in pairs]


def encoded(texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, mask = pad_sequences([encode_prompt(TOKENIZER, text) for text in texts], TOKENIZER.pad_id)
    return ids, mask.sum(dim=-1)


def solved(palm: PaLM, texts: list[str]) -> float:
    """The share of problems whose sampled answer is right."""
    ids, lengths = encoded(texts)
    palm.eval()
    out = palm.generate(
        LONGEST,
        ids,
        temperature=1.0,
        filter_logits_fn=None,
        eos_token=TOKENIZER.eos_id,
        prompt_lengths=lengths,
        return_log_probs=True,
        max_batch=256,
    )
    answers = [TOKENIZER.decode(row[mask].tolist()) for row, mask in zip(out.sequence, out.response_mask, strict=True)]
    return sum(correct(texts, answers)) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic"))
    parser.add_argument("--start", type=float, default=0.33, help="share solved at which pretraining ends")
    parser.add_argument("--updates", type=int, default=750)
    parser.add_argument("--dim", type=int, default=128)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(options.seed)
    learnt, held_out = problems(options.seed)

    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=options.dim, depth=3, heads=4, dim_head=32, flash_attn=True)
    corpus_options = CorpusOptions(seq_len=128, batch_size=8, seed=options.seed)
    corpus = build_corpus([p + answer(p) for p in learnt], [p + answer(p) for p in held_out], TOKENIZER, corpus_options)
    while solved(palm, learnt[:500]) < options.start:
        train_language_model(palm, corpus, FitOptions(steps=50, lr=2e-3, warmup=5), batch_size=64)
    before = solved(palm, held_out)
    print(f"pretrained: {before:.1%} of {len(held_out)} held-out problems solved")

    ids, _ = encoded(learnt)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model={"correct": correct, "digits": (digits, 0.5)},
        prompt_token_ids=ids,
        pad_value=TOKENIZER.pad_id,
        tokenizer=TOKENIZER,
        grpo_num_times_sample_rewards=8,
        actor_lora=False,
        actor_lr=LR,
        kl_div_loss_weight=0.0,
        beta_s=0.0,
        minibatch_size=256,
        epochs=1,
        max_norm=1.0,
        seed=options.seed,
        metrics_path=options.out / "metrics.jsonl",
        accelerate_kwargs={"cpu": True},
    )

    def schedule(_: object) -> None:
        done = trainer.step / options.updates
        trainer.optimizer.param_groups[0]["lr"] = LR * min(trainer.step / WARMUP, 1 - 0.8 * done)

    trainer.optimizer.param_groups[0]["lr"] = LR / WARMUP
    trainer.train(options.updates, 128, 128, 128, LONGEST, TOKENIZER.eos_id, on_update=schedule)
    after = solved(trainer.merged_policy(), held_out)
    minutes = (time.perf_counter() - started) / 60
    print(f"after GRPO: {after:.1%} solved; {minutes:.1f} minutes in all")
    report = {"seed": options.seed, "before": before, "after": after, "minutes": minutes}
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
