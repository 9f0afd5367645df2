"""Pretraining: a PaLM learns to predict the next token of a corpus."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.batches import (
    best_fit,
    encode_prompt,
    next_token_batches,
    pack_documents,
    packed_batches,
    pad_sequences,
    spans,
)
from palm_rlhf_pytorch.data import split_holdout
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.supervised import FitOptions, fit
from palm_rlhf_pytorch.tokenizer import Tokenizer
from palm_rlhf_pytorch.vocabulary import linear_cross_entropy

logger = logging.getLogger(__name__)

PAD = -1  # no token of any tokenizer: some pad with their eos, which is to be learned


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus becomes batches. Short documents are packed into rows, long ones joined and cropped at random."""

    seq_len: int = option(256, "tokens of a row", least=1)
    batch_size: int = option(32, "rows of a batch", least=1)
    held_out: float = option(0.1, "share of the corpus kept for evaluation (the end of a single text)")
    seed: int = option(0, "seed of weights, split and batches")


@dataclass(frozen=True)
class Corpus:
    """Training batches, held-out sequences, and how many characters those stand for. A batch is ids (b, n + 1), or
    those of packed rows with their segment ids.
    """

    batches: Iterator[Tensor | tuple[Tensor, Tensor]]
    held_out: list[list[int]]
    held_out_characters: int


def split_texts(texts: Sequence[str], held_out: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, held out): by document, or where there is only one, its end."""
    if len(texts) > 1 or held_out == 0:
        return split_holdout(texts, held_out, seed)
    if not 0 <= held_out < 1:
        raise ValueError(f"the share held out must be at least 0 and less than 1, got {held_out}")
    cut = len(texts[0]) - max(1, round(len(texts[0]) * held_out))
    return [texts[0][:cut]], [texts[0][cut:]]


def build_corpus(texts: Sequence[str], held_out: Sequence[str], tokenizer: Tokenizer, options: CorpusOptions) -> Corpus:
    """Encode texts, each with bos and eos, and batch them: packed where they fit into rows on average."""
    documents, held_documents = (
        [[*encode_prompt(tokenizer, text), tokenizer.eos_id] for text in part] for part in (texts, held_out)
    )
    generator = torch.Generator().manual_seed(options.seed)
    if sum(map(len, documents)) <= len(documents) * (options.seq_len + 1):
        say_packing([len(document) for document in documents], options.seq_len + 1)
        batches = packed_batches(documents, options.seq_len, options.batch_size, PAD, generator)
    else:
        stream = pack_documents(documents)
        batches = next_token_batches(stream, options.seq_len, options.batch_size, generator)
    windows = [ids[start:stop] for ids in held_documents for start, stop in spans(len(ids), options.seq_len)]
    return Corpus(batches, windows, sum(map(len, held_out)))


def say_packing(lengths: Sequence[int], room: int, sample: int = 4096) -> None:
    """Log how well documents share rows of `room` tokens, told by some of them."""
    room = min(room, sum(lengths))
    some = [min(length, room) for length in lengths[:: 1 + len(lengths) // sample]]
    rows = len(best_fit(some, room))
    logger.info(
        "packing: %.1f documents to a row of %d tokens, %.1f %% padding (with a row each, %.1f %%)",
        len(some) / rows,
        room,
        100 * (1 - sum(some) / (rows * room)),
        100 * (1 - sum(some) / (len(some) * room)),
    )


@torch.no_grad()
def held_out_loss(palm: PaLM, corpus: Corpus, batch_size: int) -> dict[str, float]:
    """Mean next-token loss in nats on the held-out sequences, by token and by character."""
    total, count = 0.0, 0
    ordered = sorted(corpus.held_out, key=len)
    for start in range(0, len(ordered), batch_size):
        ids = pad_sequences(ordered[start : start + batch_size], PAD)[0].to(palm.device)
        embeds, labels = palm(ids[:, :-1], return_only_embedding=True), ids[:, 1:]
        weight, tokens = palm.to_logits.weight, int((labels != PAD).sum())
        mean = linear_cross_entropy(embeds.flatten(0, 1), weight, labels.flatten(), palm.logit_scale, PAD)
        total, count = total + float(mean) * tokens, count + tokens
    loss = total / count
    return {
        "held_out_loss": loss,
        "perplexity": math.exp(min(loss, 50.0)),
        "nats_per_character": total / corpus.held_out_characters,
    }


def next_token_loss(palm: PaLM, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The mean over the tokens of a `Corpus`'s batch."""
    ids, segment_ids = batch if isinstance(batch, tuple) else (batch, None)
    return palm(ids, return_loss=True, segment_ids=segment_ids)


def train_language_model(
    palm: PaLM, corpus: Corpus, fit_options: FitOptions, batch_size: int, **fit_keywords: Any
) -> list[dict[str, float]]:
    """Fit `palm` to a corpus. Keywords go to `fit`."""
    ignored = palm.cross_entropy_ignore_index
    palm.cross_entropy_ignore_index = PAD
    try:
        return fit(
            palm,
            next_token_loss,
            corpus.batches,
            fit_options,
            evaluate=(lambda: held_out_loss(palm, corpus, batch_size)) if corpus.held_out else None,
            description="pretraining",
            **fit_keywords,
        )
    finally:
        palm.cross_entropy_ignore_index = ignored
