"""The whole path in a few minutes: a corpus from a grammar, a language model, a reward model, PPO, a judgement."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from statistics import fmean

import torch

from palm_rlhf_pytorch.data import Rating, rounding_edges, split_holdout
from palm_rlhf_pytorch.devices import DEVICES, accelerate_keywords, accelerator_on, choose_device
from palm_rlhf_pytorch.evaluation import Samples, distinct_n, prompt_batch, sample
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, split_texts, train_language_model
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.ppo import RLHFTrainer
from palm_rlhf_pytorch.quickstart import grammar
from palm_rlhf_pytorch.quickstart.report import print_samples, print_table, write_report
from palm_rlhf_pytorch.rating import RatingOptions, Scale, new_reward_model, train_on_ratings
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.run_directory import RunDirectory, fresh_directory
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.text_reward import TextReward
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

MAX_SEQ_LEN = 96  # bytes; the longest review has 75
PALM_SIZES = dict(dim=128, depth=3, heads=4, dim_head=32, flash_attn=True)
PPO_SETTINGS = dict(
    actor_lora_r=16,
    actor_lr=2e-3,
    critic_lr=2e-3,
    critic_num_pred_bins=1,
    critic_pooled_values=False,
    kl_div_loss_weight=0.24,
    beta_s=0.02,
    minibatch_size=32,
    epochs=2,
    max_norm=1.0,
)


@dataclass(frozen=True)
class QuickstartOptions:
    """The whole path on an embedded grammar of reviews."""

    out: str = option("runs/quickstart", "directory of the runs and the report")
    seed: int = option(0, "seed of everything")
    device: str = option("auto", "where to compute; auto takes a GPU where there is one", choices=DEVICES)
    corpus_size: int = option(20000, "reviews to pretrain on", least=100)
    rated: int = option(4000, "reviews with a noisy rating for the reward model; a tenth is held out", least=50)
    pretrain_steps: int = option(1600, "steps of pretraining", least=1)
    reward_steps: int = option(250, "steps of the reward model", least=1)
    ppo_updates: int = option(40, "updates of PPO", least=1)
    samples: int = option(500, "samples to judge before and after", least=1)


def judge(samples: Samples, reward_model: RewardModel, tokenizer: ByteTokenizer) -> dict[str, float]:
    """What the grammar itself thinks of samples; the reward model's opinion only stands beside it."""
    stars = [grammar.rate(text) for text in samples.texts]
    accepted = [s for s in stars if s is not None]
    scores = TextReward([(reward_model, tokenizer)])(samples.prompts, samples.responses)
    return {
        "accepted by the grammar": len(accepted) / len(stars),
        "true rating of those (1-5)": fmean(accepted) if accepted else float("nan"),
        "distinct-2": distinct_n(samples.texts),
        "distinct texts": len(set(samples.texts)) / len(stars),
        "finished": fmean(samples.finished),
        "KL to the start (nats)": 0.0 if samples.kl is None else float(samples.kl.mean()),
        "reward model's rating": float(scores.mean()),
    }


def pretrain(options: QuickstartOptions, run: RunDirectory, tokenizer: ByteTokenizer, device: torch.device) -> PaLM:
    """A byte-level PaLM on the grammar's reviews."""
    texts = [review.text for review in grammar.corpus(options.corpus_size, options.seed)]
    # about 32 reviews a batch: rows of 128 hold 2.4 of them with 2 % padding (rows of 96: 1.6, with 13 %)
    corpus_options = CorpusOptions(seq_len=128, batch_size=13, held_out=0.02, seed=options.seed)
    fit_options = FitOptions(steps=options.pretrain_steps, lr=4e-3, warmup=30, eval_every=200)
    log = run.start("quickstart pretrain", False, tokenizer, corpus=corpus_options, fit=fit_options)
    corpus = build_corpus(*split_texts(texts, corpus_options.held_out, options.seed), tokenizer, corpus_options)
    palm = PaLM(num_tokens=tokenizer.num_tokens, **PALM_SIZES).to(device)
    accelerator = accelerator_on(device)
    train_language_model(palm, corpus, fit_options, corpus_options.batch_size, log=log, accelerator=accelerator)
    palm.save(run.weights)
    run.finish(log, "pretrain")
    return palm


def noisy_ratings(options: QuickstartOptions) -> list[Rating]:
    """Reviews and what a person might have clicked: whole stars, with noise."""
    rng = random.Random(options.seed + 1)
    reviews = grammar.corpus(options.rated, options.seed + 1)
    ratings = []
    for review in reviews:
        prompt = grammar.opening(review.text)
        stars = grammar.noisy_rating(review.rating, rng)
        ratings.append(Rating(prompt, review.text.removeprefix(prompt), stars))
    return ratings


def train_reward(
    options: QuickstartOptions, run: RunDirectory, tokenizer: ByteTokenizer, palm: PaLM
) -> tuple[RewardModel, dict[str, float]]:
    """A binned reward model on noisy ratings, with how well it does on held-out ones."""
    ratings = noisy_ratings(options)
    train, held_out = split_holdout(ratings, 0.1, options.seed)
    scale = Scale.of([r.rating for r in train], bins=5, edges=rounding_edges(1, 5))
    rating_options = RatingOptions(max_len=MAX_SEQ_LEN, batch_size=32, seed=options.seed)
    fit_options = FitOptions(
        steps=options.reward_steps, lr=1e-3, warmup=30, eval_every=max(1, options.reward_steps // 4)
    )
    log = run.start("quickstart reward", False, tokenizer, ratings=rating_options, fit=fit_options)
    reward_model = new_reward_model(palm, scale, dropout=0.0, lora=False, lora_r=8)
    accelerator = accelerator_on(palm.device)
    history = train_on_ratings(
        reward_model, train, held_out, tokenizer, scale, rating_options, fit_options, log=log, accelerator=accelerator
    )
    reward_model.save(run.reward_weights)
    run.finish(log, "reward")
    return reward_model, {k: v for k, v in history[-1].items() if k.startswith("held_out")}


def improve(
    options: QuickstartOptions, run: RunDirectory, tokenizer: ByteTokenizer, palm: PaLM, reward_model: RewardModel
) -> PaLM:
    """PPO from openings of reviews."""
    rng = random.Random(options.seed + 2)
    prompts = sorted({grammar.sample_prompt(rng) for _ in range(2000)})
    ids, _ = prompt_batch(tokenizer, prompts, "cpu")
    log = run.start("quickstart ppo", False, tokenizer, options=options)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=reward_model,
        prompt_token_ids=ids,
        pad_value=tokenizer.pad_id,
        **PPO_SETTINGS,
        seed=options.seed,
        metrics_path=log.path,
        accelerate_kwargs=accelerate_keywords(palm.device),
    )
    trainer.train(
        num_episodes=options.ppo_updates,
        max_timesteps=128,
        update_timesteps=128,
        max_batch_size=128,
        max_seq_len=MAX_SEQ_LEN,
        eos_token=tokenizer.eos_id,
    )
    policy = trainer.merged_policy()
    policy.save(run.weights)
    run.finish(trainer.metrics, "ppo")
    return policy


def quickstart(options: QuickstartOptions) -> dict[str, dict[str, float]]:
    """Run it all; returns the table {'before': ..., 'after': ...} and leaves a report in `options.out`."""
    torch.manual_seed(options.seed)
    device = choose_device(options.device)
    out = fresh_directory(options.out)
    runs = {name: RunDirectory(out / name) for name in ("pretrain", "reward", "ppo")}
    tokenizer = ByteTokenizer()
    print(
        f"A grammar of {grammar.count_sentences():,} reviews with star ratings. Three steps follow; device: {device}."
    )
    palm = pretrain(options, runs["pretrain"], tokenizer, device)
    reward_model, held_out = train_reward(options, runs["reward"], tokenizer, palm)
    rng = random.Random(options.seed + 3)
    prompts = [grammar.sample_prompt(rng) for _ in range(options.samples)]
    start = PaLM.from_checkpoint(runs["pretrain"].weights).to(device)
    before = sample(start, tokenizer, prompts, MAX_SEQ_LEN, seed=options.seed)
    policy = improve(options, runs["ppo"], tokenizer, palm, reward_model)
    after = sample(policy, tokenizer, prompts, MAX_SEQ_LEN, seed=options.seed, reference=start)
    table = {name: judge(s, reward_model, tokenizer) for name, s in (("before", before), ("after", after))}
    print_table(table, held_out)
    print_samples(before, after)
    curves = [run / "curves.png" for run in runs.values()]
    report = write_report(out / "report.html", table, held_out, before, after, curves, asdict(options))
    print(f"The report with curves and samples: {report}")
    print(f"Ask the policy yourself: palm-rlhf generate --model {runs['ppo'].path} --prompt 'the coffee'")
    return table
