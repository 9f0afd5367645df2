"""RLHF on real people's ratings of film-review sentences, by the ordinary commands, judged by an outsider.

    python examples/movie_reviews.py movie_review_ratings.tsv

The file has a header `rating<TAB>text`. A PaLM is pretrained on the text, a reward model learns the ratings (a tenth of
the rows is held out from both), PPO improves the policy from the first words of sentences. The judge is a ridge
regression on TF-IDF features that never meets the policy: scikit-learn's, fitted on the training rows. Needs
pip install "palm-rlhf-pytorch[examples]".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import Pipeline, make_pipeline

from palm_rlhf_pytorch.cli import main as palm_rlhf
from palm_rlhf_pytorch.data import Rating, first_words, read_ratings, split_holdout
from palm_rlhf_pytorch.evaluation import Samples, distinct_n, sample
from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.rating import spearman
from palm_rlhf_pytorch.run_directory import RunDirectory, fresh_directory
from palm_rlhf_pytorch.text_reward import TextReward

HELD_OUT = 0.1
PROMPT_WORDS = 3
MAX_SEQ_LEN = 64

PRETRAIN = "--tokenizer bpe --vocab-size 4096 --lowercase --dim 192 --depth 3 --heads 6 --dim-head 32 --ff-dropout 0.1 "
PRETRAIN += "--seq-len 96 --batch-size 10 --steps 1600 --lr 2e-3 --eval-every 400 --save-every 800"
# Small encoders from scratch, with half of the tokens left out of each text and strong weight decay.
# They divide text differently and err differently, so their mean is better than each.
VOCABULARIES = (4096, 8192, 16384)
REWARD = "--encoder --no-lora --bins 0 --dim 64 --depth 1 --heads 2 --dim-head 32 --ff-mult 2 --dropout 0.1 "
REWARD += "--token-dropout 0.5 --weight-decay 1.0 --batch-size 32 --steps 3200 --lr 2e-3 --warmup 160 "
REWARD += "--eval-every 1600 --save-every 1600 --tokenizer bpe --lowercase"
PPO = f"--prompt-words {PROMPT_WORDS} --updates 60 --rollouts 128 --rollout-batch 128 "
PPO += f"--max-seq-len {MAX_SEQ_LEN} --actor-lr 2e-3 --kl 0.1 --entropy 0.01 --epochs 2 --minibatch-size 32"


def run(command: str, *arguments: object) -> None:
    """One palm-rlhf command, as a person would type it."""
    words = [command, *map(str, arguments)]
    print("\n$ palm-rlhf " + " ".join(words), flush=True)
    if code := palm_rlhf(words):
        raise SystemExit(code)


def fit_judge(ratings: Sequence[Rating]) -> Pipeline:
    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), Ridge(alpha=1.0))
    return judge.fit([r.response for r in ratings], [r.rating for r in ratings])


def row(samples: Samples, judge: Pipeline) -> dict[str, float]:
    ratings = judge.predict(samples.texts)
    return {
        "judge: mean rating (-4 to 4)": float(np.mean(ratings)),
        "judge: standard deviation": float(np.std(ratings)),
        "distinct-2": distinct_n(samples.texts),
        "distinct texts": len(set(samples.texts)) / len(samples.texts),
        "mean words": float(np.mean([len(text.split()) for text in samples.texts])),
        "finished": float(np.mean(samples.finished)),
        "KL to the start (nats)": 0.0 if samples.kl is None else float(samples.kl.mean()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", help="a TSV, CSV or JSON Lines file of {text, rating}")
    parser.add_argument("--out", default="runs/movie_reviews", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--samples", type=int, default=500, help="samples to judge (default: 500)")
    parser.add_argument("--pretrain", default=PRETRAIN, help="flags of palm-rlhf pretrain (default: %(default)s)")
    parser.add_argument("--reward", default=REWARD, help="flags of palm-rlhf reward (default: %(default)s)")
    parser.add_argument(
        "--vocabularies", type=int, nargs="+", default=VOCABULARIES, help="one reward model each (default: %(default)s)"
    )
    parser.add_argument("--ppo", default=PPO, help="flags of palm-rlhf ppo (default: %(default)s)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    out = fresh_directory(options.out)
    rewards = [out / f"reward-{vocabulary}" for vocabulary in options.vocabularies]
    run_commands(options, out, rewards)

    # the same rows are held out as in the commands: same file, share and seed
    train, held_out = split_holdout(read_ratings(options.data), HELD_OUT, options.seed)
    judge = fit_judge(train)
    correlations = rank_correlations(rewards, judge, held_out)
    before, after = samples_of(options, out, held_out)
    table = {"before": row(before, judge), "after": row(after, judge)}
    result = {"spearman": correlations, **summary(table), "minutes": (time.perf_counter() - started) / 60}
    show(result, table, before, after)
    write_json(out / "table.json", {**result, **table})
    return result


def run_commands(options: argparse.Namespace, out: Path, rewards: Sequence[Path]) -> None:
    """The path by the ordinary commands: pretrain, some reward models, ppo against their mean."""
    shared = ("--data", options.data, "--held-out", HELD_OUT, "--seed", options.seed)
    run("pretrain", "--out", out / "pretrain", *shared, *options.pretrain.split())
    for directory, vocabulary in zip(rewards, options.vocabularies, strict=True):
        run("reward", "--out", directory, *shared, *options.reward.split(), "--vocab-size", vocabulary)
    where = ("--model", out / "pretrain", "--reward", *rewards, "--prompts", options.data, "--out", out / "ppo")
    run("ppo", *where, "--seed", options.seed, *options.ppo.split())


def rank_correlations(rewards: Sequence[Path], judge: Pipeline, held_out: Sequence[Rating]) -> dict[str, float]:
    """Spearman's correlation with people's mean ratings of held-out sentences."""
    truth = torch.tensor([r.rating for r in held_out])
    texts = [r.response for r in held_out]
    blank = [""] * len(texts)
    members = [(run.reward_model(), run.tokenizer()) for run in map(RunDirectory, rewards)]
    scores = {
        run.name: TextReward([member], whole=True)(blank, texts) for run, member in zip(rewards, members, strict=True)
    }
    scores["mean of the reward models"] = TextReward(members, whole=True)(blank, texts)
    scores["TF-IDF ridge"] = torch.tensor(judge.predict(texts))
    return {name: spearman(score, truth) for name, score in scores.items()}


def samples_of(options: argparse.Namespace, out: Path, held_out: Sequence[Rating]) -> tuple[Samples, Samples]:
    """Completions of held-out openings by the pretrained model and by the policy."""
    start = RunDirectory(out / "pretrain")
    tokenizer, reference, policy = start.tokenizer(), start.palm(), RunDirectory(out / "ppo").palm()
    openings = [first_words(r.response, PROMPT_WORDS)[0] for r in held_out]
    prompts = [openings[i % len(openings)] for i in range(options.samples)]
    before = sample(reference, tokenizer, prompts, MAX_SEQ_LEN, seed=options.seed)
    return before, sample(policy, tokenizer, prompts, MAX_SEQ_LEN, seed=options.seed, reference=reference)


def summary(table: dict[str, dict[str, float]]) -> dict[str, float]:
    before, after = table["before"], table["after"]
    rise = after["judge: mean rating (-4 to 4)"] - before["judge: mean rating (-4 to 4)"]
    return {
        "gain_in_deviations": rise / before["judge: standard deviation"],
        "distinct_2_kept": after["distinct-2"] / before["distinct-2"],
    }


def show(result: dict[str, Any], table: dict[str, dict[str, float]], before: Samples, after: Samples) -> None:
    print("\nSpearman's correlation with people's ratings of held-out sentences")
    for name, correlation in result["spearman"].items():
        print(f"  {name:<30}{correlation:9.3f}")
    print(f"\n{'':<32}{'before':>9}{'after':>9}")
    for name, value in table["before"].items():
        print(f"{name:<32}{value:9.3f}{table['after'][name]:9.3f}")
    print(
        f"\nthe judge's mean rose by {result['gain_in_deviations']:.2f} of its standard deviation over unoptimised "
        f"samples; distinct-2 is {result['distinct_2_kept']:.0%} of before; {result['minutes']:.1f} minutes\n"
    )
    for old, new in list(zip(before.texts, after.texts, strict=True))[:8]:
        print(f"  before  {old}\n  after   {new}\n")


if __name__ == "__main__":
    main()
