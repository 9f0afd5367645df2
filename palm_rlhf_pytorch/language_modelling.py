"""Pretraining: a PaLM learns to predict the next token of a corpus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.batches import (
    document_batches,
    encode_prompt,
    next_token_batches,
    pack_documents,
    pad_sequences,
)
from palm_rlhf_pytorch.data import split_holdout
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.supervised import FitOptions, fit
from palm_rlhf_pytorch.tokenizer import Tokenizer

PAD = -1  # no token of any tokenizer: some pad with their eos, which is to be learned


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus becomes batches. Short documents are kept whole, longer ones joined and cropped at random."""

    seq_len: int = option(256, "tokens of a training sequence", least=1)
    batch_size: int = option(32, "sequences of a batch", least=1)
    held_out: float = option(0.1, "share of the corpus kept for evaluation (the end of a single text)")
    seed: int = option(0, "seed of weights, split and batches")


@dataclass(frozen=True)
class Corpus:
    """Training batches of ids (b, n + 1), held-out sequences, and how many characters those stand for."""

    batches: Iterator[Tensor]
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
    """Encode texts, each with bos and eos, and batch them."""
    documents = [[*encode_prompt(tokenizer, text), tokenizer.eos_id] for text in texts]
    generator = torch.Generator().manual_seed(options.seed)
    if max(map(len, documents)) <= options.seq_len + 1:
        batches = document_batches(documents, options.batch_size, PAD, generator)
    else:
        stream = pack_documents(documents)
        batches = next_token_batches(stream, options.seq_len, options.batch_size, generator)
    characters = sum(map(len, held_out))
    windows = [
        ids[start : start + options.seq_len + 1]
        for ids in ([*encode_prompt(tokenizer, text), tokenizer.eos_id] for text in held_out)
        for start in range(0, len(ids) - 1, options.seq_len)
    ]
    return Corpus(batches, windows, characters)


@torch.no_grad()
def held_out_loss(palm: PaLM, corpus: Corpus, batch_size: int) -> dict[str, float]:
    """Mean next-token loss in nats on the held-out sequences, by token and by character."""
    total, count = 0.0, 0
    ordered = sorted(corpus.held_out, key=len)
    for start in range(0, len(ordered), batch_size):
        ids = pad_sequences(ordered[start : start + batch_size], PAD)[0].to(palm.device)
        logits, labels = palm(ids[:, :-1]).float(), ids[:, 1:]
        total += float(F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PAD, reduction="sum"))
        count += int((labels != PAD).sum())
    loss = total / count
    return {
        "held_out_loss": loss,
        "perplexity": math.exp(min(loss, 50.0)),
        "nats_per_character": total / corpus.held_out_characters,
    }


def train_language_model(
    palm: PaLM, corpus: Corpus, fit_options: FitOptions, batch_size: int, **fit_keywords: Any
) -> list[dict[str, float]]:
    """Fit `palm` to a corpus. Keywords go to `fit`."""
    ignored = palm.cross_entropy_ignore_index
    palm.cross_entropy_ignore_index = PAD
    try:
        return fit(
            palm,
            lambda model, ids: model(ids, return_loss=True),
            corpus.batches,
            fit_options,
            evaluate=(lambda: held_out_loss(palm, corpus, batch_size)) if corpus.held_out else None,
            description="pretraining",
            **fit_keywords,
        )
    finally:
        palm.cross_entropy_ignore_index = ignored
