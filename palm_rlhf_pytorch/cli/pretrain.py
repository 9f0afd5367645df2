"""palm-rlhf pretrain: text in, a language model out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import ComputeOptions, ModelOptions, RunOptions, TokenizerOptions
from palm_rlhf_pytorch.data import read_texts
from palm_rlhf_pytorch.devices import choose_precision
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, split_texts, train_language_model
from palm_rlhf_pytorch.supervised import FitOptions


@dataclass(frozen=True)
class PretrainOptions:
    """Text to learn from"""

    data: str = required("a .txt, .jsonl, .csv or .tsv file (each also .gz), or hf:NAME[:split]")
    out: str = option("runs/pretrain", "directory of the run")
    lines: bool = option(False, "each line of a .txt file is a document of its own")
    gradient_checkpointing: bool = option(False, "save memory by computing layers twice")


def run(
    options: PretrainOptions,
    words: TokenizerOptions,
    model: ModelOptions,
    corpus_options: CorpusOptions,
    fit: FitOptions,
    compute: ComputeOptions,
    where: RunOptions,
) -> Path:
    directory, device = where.start(options.out, corpus_options.seed)
    keywords = compute.keywords(device)
    texts, held_out = split_texts(
        read_texts(options.data, lines=options.lines), corpus_options.held_out, corpus_options.seed
    )
    tokenizer = directory.tokenizer() if where.resume else words.new(texts)
    palm = model.new(tokenizer, gradient_checkpointing=options.gradient_checkpointing).to(device)
    corpus = build_corpus(texts, held_out, tokenizer, corpus_options)
    given = {"options": options, "words": words, "model": model, "corpus": corpus_options, "fit": fit}
    log = directory.start("pretrain", where.resume, tokenizer, **given, compute=compute)
    parameters = sum(p.numel() for p in palm.parameters())
    precision = choose_precision(compute.precision, device)
    print(f"{parameters:,} parameters, {tokenizer.num_tokens:,} tokens, on {device} in {precision}")
    train_language_model(
        palm,
        corpus,
        fit,
        corpus_options.batch_size,
        log=log,
        checkpoint=directory.state,
        resume=where.resume and directory.has_state(),
        **keywords,
    )
    palm.save(directory.weights)
    directory.finish(log, "pretrain")
    return directory.path


OPTIONS = (PretrainOptions, TokenizerOptions, ModelOptions, CorpusOptions, FitOptions, ComputeOptions, RunOptions)
