"""Training a reward model on people's ratings or choices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.batches import Batch, Row, bucketed_rows, by_length, collate, encode_pair, encode_response
from palm_rlhf_pytorch.data import Pair, Rating, bin_ratings, quantile_edges, rounding_edges
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.supervised import FitOptions, fit
from palm_rlhf_pytorch.tokenizer import Tokenizer


@dataclass(frozen=True)
class RatingOptions:
    """How ratings are learned from."""

    bins: int = option(5, "classes of ratings; 0 predicts a scalar with mean squared error", least=0)
    edges: tuple[float, ...] = option((), "edges between bins (default: between whole ratings, or quantiles)")
    max_len: int = option(512, "tokens of prompt and response together", least=2)
    batch_size: int = option(32, "sequences (or pairs) of a batch", least=1)
    token_dropout: float = option(0.0, "share of tokens left out of each text while training")
    seed: int = option(0, "seed of head, split and batches")


@dataclass(frozen=True)
class Scale:
    """Bins of ratings: edges between them, and the mean training rating in each, which is what it is worth."""

    edges: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, ratings: Sequence[float], bins: int, edges: Sequence[float] = ()) -> Scale:
        """Given edges; or those between whole ratings, where there are no more than `bins` of them; or quantiles."""
        low, high = min(ratings), max(ratings)
        whole = all(float(r).is_integer() for r in ratings)
        if not edges:
            between_whole = whole and 1 < high - low + 1 <= bins
            edges = rounding_edges(int(low), int(high)) if between_whole else quantile_edges(ratings, bins)
        labels = torch.tensor(bin_ratings(ratings, edges))
        values = []
        for i in range(len(edges) + 1):
            inside = torch.tensor(ratings, dtype=torch.float64)[labels == i]
            if inside.numel() == 0:
                raise ValueError(f"no rating falls into bin {i} of edges {list(edges)}; choose other edges")
            values.append(float(inside.mean()))
        return cls(tuple(edges), tuple(values))

    def labels(self, ratings: Sequence[float]) -> list[int]:
        return bin_ratings(ratings, self.edges)


def encode_ratings(ratings: Sequence[Rating], tokenizer: Tokenizer, max_len: int) -> list[Row]:
    """Ids and prompt length of each rated response."""
    return [encode_response(tokenizer, r.prompt, r.response, max_len) for r in ratings]


def drop_tokens(row: Row, share: float, generator: torch.Generator) -> Row:
    """A row without a random share of its tokens; the first (bos) and the last (eos) stay. Word dropout keeps a model
    from leaning on single words (Iyyer et al., ACL 2015, section 3.1).
    """
    if share == 0:
        return row
    ids, prompt_length = row
    keep = torch.rand(len(ids), generator=generator) >= share
    keep[0] = keep[-1] = True
    return [i for i, kept in zip(ids, keep.tolist(), strict=True) if kept], int(keep[:prompt_length].sum())


def rating_loss(model: RewardModel, batch: tuple[Batch, Tensor]) -> Tensor:
    """Cross-entropy or squared error of the responses' pooled embeddings, as `RewardModel.score` pools them."""
    (ids, mask, prompt_mask), labels = batch
    pred = model.predict(ids.masked_fill(~mask, -1), mask & ~prompt_mask, prompt_mask)
    return model.loss(pred, labels)


def pair_loss(model: RewardModel, batch: tuple[Batch, Batch, Tensor]) -> Tensor:
    """Bradley-Terry loss of (chosen, rejected, margin)."""
    chosen, rejected, margin = batch
    sides = [(ids, prompt_mask, mask) for ids, mask, prompt_mask in (chosen, rejected)]
    return model.pair_loss(*sides, margin)


def score_all(model: RewardModel, rows: Sequence[Row], pad_id: int, batch_size: int = 64) -> Tensor:
    """`RewardModel.score` of encoded responses, in batches of similar length -> (len(rows),) on the CPU."""

    def score(some: list[Row]) -> Tensor:
        ids, mask, prompt_mask = (t.to(model.palm.device) for t in collate(some, pad_id))
        return model.score(ids, prompt_mask, mask)

    return by_length(rows, batch_size, score)


def ranks(values: Tensor) -> Tensor:
    """Ranks (n,) from 0, ties sharing their mean."""
    _, inverse, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts + 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of (n,) and (n,); NaN where there is nothing to order."""
    if len(a) < 2:
        return math.nan
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


def train_on_ratings(
    model: RewardModel,
    train: Sequence[Rating],
    held_out: Sequence[Rating],
    tokenizer: Tokenizer,
    scale: Scale | None,
    options: RatingOptions,
    fit_options: FitOptions,
    **fit_keywords: Any,
) -> list[dict[str, float]]:
    """Fit a reward model to ratings; `scale` is the one its bins were made with, None for a scalar."""
    rows = encode_ratings(train, tokenizer, options.max_len)
    ratings = [r.rating for r in train]
    labels = torch.tensor(ratings if scale is None else scale.labels(ratings))
    generator = torch.Generator().manual_seed(options.seed)

    def batches() -> Iterator[tuple[Batch, Tensor]]:
        for some in bucketed_rows([len(ids) for ids, _ in rows], options.batch_size, generator):
            kept = [drop_tokens(rows[i], options.token_dropout, generator) for i in some]
            yield collate(kept, tokenizer.pad_id), labels[some]

    held_rows = encode_ratings(held_out, tokenizer, options.max_len)
    held_ratings = torch.tensor([r.rating for r in held_out])

    def evaluate() -> dict[str, float]:
        scores = score_all(model, held_rows, tokenizer.pad_id)
        numbers = {
            "held_out_spearman": spearman(scores, held_ratings),
            "held_out_rmse": float((scores - held_ratings).square().mean().sqrt()),
        }
        if scale is not None:
            truth, guess = (torch.tensor(scale.labels(t.tolist())) for t in (held_ratings, scores))
            numbers["held_out_accuracy"] = float((truth == guess).float().mean())
        return numbers

    return fit(
        model,
        rating_loss,
        batches(),
        fit_options,
        parameters=model.finetune_parameters(),
        ragged=True,
        evaluate=evaluate if held_rows else None,
        description="reward model",
        **fit_keywords,
    )


def train_on_pairs(
    model: RewardModel,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    tokenizer: Tokenizer,
    options: RatingOptions,
    fit_options: FitOptions,
    **fit_keywords: Any,
) -> list[dict[str, float]]:
    """Fit a reward model to choices between two responses."""

    def encode(pairs: Sequence[Pair]) -> tuple[list, list]:
        rows = [encode_pair(tokenizer, pair.prompt, pair.chosen, pair.rejected, options.max_len) for pair in pairs]
        return [chosen for chosen, _ in rows], [rejected for _, rejected in rows]

    chosen, rejected = encode(train)
    margins = torch.tensor([pair.margin or 0.0 for pair in train])
    generator = torch.Generator().manual_seed(options.seed)

    def batches() -> Iterator[tuple[Batch, Batch, Tensor]]:
        lengths = [max(len(c), len(r)) for (c, _), (r, _) in zip(chosen, rejected, strict=True)]
        for some in bucketed_rows(lengths, options.batch_size, generator):
            sides = [
                collate([drop_tokens(side[i], options.token_dropout, generator) for i in some], tokenizer.pad_id)
                for side in (chosen, rejected)
            ]
            yield (*sides, margins[some])

    held_chosen, held_rejected = encode(held_out)

    def evaluate() -> dict[str, float]:
        gap = score_all(model, held_chosen, tokenizer.pad_id) - score_all(model, held_rejected, tokenizer.pad_id)
        return {"held_out_accuracy": float((gap > 0).float().mean()), "held_out_gap": float(gap.mean())}

    return fit(
        model,
        pair_loss,
        batches(),
        fit_options,
        parameters=model.finetune_parameters(),
        ragged=True,
        evaluate=evaluate if held_out else None,
        description="reward model",
        **fit_keywords,
    )


def new_reward_model(
    palm: PaLM, scale: Scale | None, dropout: float, lora: bool, lora_r: int, causal: bool = True
) -> RewardModel:
    """A reward model on a language model's weights; `causal=False` makes an encoder of them."""
    if not causal:
        palm = deepcopy(palm)
        palm.config["use_xpos"] = palm.rotary_emb.use_xpos  # the weights know the positions that they learned
        palm.set_causal(False)
    values = None if scale is None else list(scale.values)
    bins = 0 if scale is None else len(scale.values)
    return RewardModel(palm, dropout, bins, use_lora=lora, lora_r=lora_r, bin_values=values)
