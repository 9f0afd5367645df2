"""Supervised fine-tuning: a language model learns the responses to prompts, not the prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Generator, Tensor

from palm_rlhf_pytorch.actor import predictions
from palm_rlhf_pytorch.batches import Row, encode_response, packed_batches
from palm_rlhf_pytorch.data import Demonstration
from palm_rlhf_pytorch.fine_tuning import TuningOptions, all_response_sums, fine_tune
from palm_rlhf_pytorch.language_modelling import say_packing
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import Tokenizer
from palm_rlhf_pytorch.vocabulary import linear_cross_entropy

Batch = tuple[Tensor, Tensor, Tensor]  # ids (b, n), response mask (b, n), segment ids (b, n)


def response_batches(rows: Sequence[Row], batch_size: int, generator: Generator) -> Iterator[Batch]:
    """Demonstrations packed into rows as long as the longest of them, forever. See `packed_batches`."""
    # what is not to be learned travels as ~id, which is below 0; so is padding, ~0
    marked = [[*(~i for i in ids[:prompt]), *ids[prompt:]] for ids, prompt in rows]
    longest = max(map(len, marked))
    for ids, segment_ids in packed_batches(marked, longest - 1, batch_size, ~0, generator):
        learned = ids >= 0
        yield ids.where(learned, ~ids), learned, segment_ids


def response_loss(palm: PaLM, batch: Batch, scope: str | None = None) -> Tensor:
    """Next-token loss, the mean over the response tokens of a batch. Only places that predict one meet the vocabulary;
    a response always has a token of its own prompt before it.
    """
    ids, response_mask, segment_ids = batch
    return linear_cross_entropy(*predictions(palm, ids, response_mask, scope=scope, segment_ids=segment_ids))


def train_on_demonstrations(
    palm: PaLM,
    train: Sequence[Demonstration],
    held_out: Sequence[Demonstration],
    tokenizer: Tokenizer,
    options: TuningOptions,
    fit_options: FitOptions,
    **fit_keywords: Any,
) -> list[dict[str, float]]:
    """Fit `palm` to responses. Keywords go to `fit`."""
    rows, held_rows = (
        [encode_response(tokenizer, d.prompt, d.response, options.max_len) for d in part] for part in (train, held_out)
    )
    say_packing([len(ids) for ids, _ in rows], max(len(ids) for ids, _ in rows))
    tokens = sum(len(ids) - prompt for ids, prompt in held_rows)

    def evaluate(scope: str | None) -> dict[str, float]:
        sums = all_response_sums(palm, held_rows, tokenizer.pad_id, options.batch_size, scope)
        loss = -float(sums.double().sum()) / tokens
        return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 50.0))}

    batches = response_batches(rows, options.batch_size, Generator().manual_seed(options.seed))
    return fine_tune(
        palm,
        response_loss,
        batches,
        options,
        fit_options,
        evaluate if held_rows else None,
        ragged=True,  # as many places predict a response as chance packs together
        description="SFT",
        **fit_keywords,
    )
