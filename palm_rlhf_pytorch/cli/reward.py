"""palm-rlhf reward: ratings or choices in, a reward model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import (
    MODEL,
    ComputeOptions,
    ModelOptions,
    ModelUse,
    RunOptions,
    TokenizerOptions,
    open_model,
    say_held_out,
    with_roles,
)
from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.data import Pair, Rating, first_words, read_pairs, read_ratings, split_holdout
from palm_rlhf_pytorch.fine_tuning import AdapterOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.rating import (
    RatingOptions,
    Scale,
    new_reward_model,
    train_on_pairs,
    train_on_ratings,
)
from palm_rlhf_pytorch.supervised import FitOptions


@dataclass(frozen=True, kw_only=True)
class RewardOptions(ModelUse, AdapterOptions):
    """What to learn, and from what model"""

    data: str = required(
        "ratings {prompt, response, rating}, {messages, rating} or {text, rating}; or pairs {prompt, chosen, rejected}"
    )
    model: str | None = option(None, MODEL + " (default: a new, small model)")
    out: str = option("runs/reward", "directory of the run")
    pairs: bool = option(False, "the data are choices between two responses (Bradley-Terry)")
    held_out: float = option(0.1, "share of the data kept for evaluation")
    prompt_words: int = option(0, "how many first words of a {text} are its prompt", least=0)
    lora: bool = option(True, "train adapters only, not the whole model")
    lora_r: int = option(8, "rank of the adapters", least=1)
    dropout: float = option(0.1, "dropout while training")
    encoder: bool = option(False, "let the reward model see the future (a causal=False copy)")


def opened(rating: Rating, words: int) -> Rating:
    """A text rated as a whole, divided into its first words and the rest."""
    if rating.prompt or words == 0:
        return rating
    prompt, response = first_words(rating.response, words)
    return Rating(prompt, response, rating.rating)


def texts_of(items: list[Rating] | list[Pair]) -> list[str]:
    return [item.prompt + (item.chosen if isinstance(item, Pair) else item.response) for item in items]


def run(
    options: RewardOptions,
    ratings: RatingOptions,
    fit: FitOptions,
    words: TokenizerOptions,
    sizes: ModelOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    directory, device = where.start(options.out, ratings.seed)
    keywords = compute.keywords(device)
    items = read_pairs(options.data) if options.pairs else read_ratings(options.data)
    train, held_out = split_holdout(items, options.held_out, ratings.seed) if options.held_out else (items, [])
    scale = None
    if not options.pairs:
        if ratings.bins:
            scale = Scale.of([r.rating for r in train], ratings.bins, ratings.edges)
        train, held_out = ([opened(r, options.prompt_words) for r in part] for part in (train, held_out))
    if options.model is not None:
        if (words, sizes) != (TokenizerOptions(), ModelOptions()):
            print("--model brings its own tokenizer and sizes: the flags for a new model are not used")
        palm, tokenizer = open_model(options.model, device, options.dtype)
    else:
        tokenizer = directory.tokenizer() if where.resume else words.new(texts_of(train))
        palm = sizes.new(tokenizer)
    items = with_roles([*train, *held_out], options.chat, tokenizer)
    train, held_out = items[: len(train)], items[len(train) :]
    options.ready(palm)
    model = new_reward_model(palm, scale, options.dropout, options.lora, options.lora_r, not options.encoder).to(device)
    del palm  # the reward model has a copy
    given = {"options": options, "ratings": ratings, "fit": fit, "words": words, "model": sizes, "compute": compute}
    log = directory.start("reward", where.resume, tokenizer, **given)
    directory.config["whole_text"] = not options.pairs and not any(r.prompt for r in train)
    directory.config["chat"] = any(isinstance(item.prompt, Conversation) for item in train)
    if scale is not None:
        worth = ", ".join(f"{value:.3g}" for value in scale.values)
        print(f"bins divided at {', '.join(f'{e:.3g}' for e in scale.edges)} are worth {worth}")
    keywords |= dict(log=log, checkpoint=directory.state, resume=where.resume and directory.has_state())
    if options.pairs:
        history = train_on_pairs(model, train, held_out, tokenizer, ratings, fit, **keywords)
    else:
        history = train_on_ratings(model, train, held_out, tokenizer, scale, ratings, fit, **keywords)
    model.save(directory.reward_weights)
    say_held_out(history[-1])
    directory.finish(log, "reward")
    return directory.path


OPTIONS = (RewardOptions, RatingOptions, FitOptions, TokenizerOptions, ModelOptions, ComputeOptions, RunOptions)
