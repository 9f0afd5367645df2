"""palm-rlhf pretrain: text in, a language model out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from palm_rlhf_pytorch.cli.common import RunOptions
from palm_rlhf_pytorch.data import read_texts
from palm_rlhf_pytorch.devices import accelerator_on
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.language_modelling import CorpusOptions, build_corpus, split_texts, train_language_model
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PretrainOptions:
    """Text to learn from"""

    data: str = required("a .txt, .jsonl, .csv or .tsv file (each also .gz), or hf:NAME[:split]")
    out: str = option("runs/pretrain", "directory of the run")
    tokenizer: str = option("byte", "byte, bpe (trained on the corpus), or the path of a tokenizer")
    vocab_size: int = option(4096, "tokens of a new bpe")
    lowercase: bool = option(False, "lowercase text for a new bpe")
    lines: bool = option(False, "each line of a .txt file is a document of its own")


@dataclass(frozen=True)
class ModelOptions:
    """The model's sizes"""

    dim: int = option(256, "width")
    depth: int = option(4, "layers")
    heads: int = option(4, "query heads")
    dim_head: int = option(64, "width of a head")
    kv_heads: int = option(1, "key/value heads")
    ff_mult: float = option(4.0, "feedforward width over model width")
    attn_dropout: float = option(0.0, "dropout of attention weights")
    ff_dropout: float = option(0.0, "dropout inside the feedforward")
    rotary_theta: float = option(10000.0, "base of the rotary angles")
    gradient_checkpointing: bool = option(False, "save memory by computing layers twice")


def new_tokenizer(options: PretrainOptions, texts: list[str]) -> Tokenizer:
    if options.tokenizer == "byte":
        return ByteTokenizer()
    if options.tokenizer == "bpe":
        return BPETokenizer.train(texts, vocab_size=options.vocab_size, lowercase=options.lowercase)
    return load_tokenizer(options.tokenizer)


def run(
    options: PretrainOptions, model: ModelOptions, corpus_options: CorpusOptions, fit: FitOptions, where: RunOptions
) -> Path:
    device = where.start(corpus_options.seed)
    texts, held_out = split_texts(
        read_texts(options.data, lines=options.lines), corpus_options.held_out, corpus_options.seed
    )
    directory = RunDirectory(options.out)
    log = directory.start("pretrain", where.resume, options=options, model=model, corpus=corpus_options, fit=fit)
    tokenizer = directory.tokenizer() if where.resume else new_tokenizer(options, texts)
    tokenizer.save(directory.path)
    palm = PaLM(num_tokens=tokenizer.num_tokens, flash_attn=True, **asdict(model)).to(device)
    corpus = build_corpus(texts, held_out, tokenizer, corpus_options)
    print(f"{sum(p.numel() for p in palm.parameters()):,} parameters, {tokenizer.num_tokens:,} tokens, on {device}")
    train_language_model(
        palm,
        corpus,
        fit,
        corpus_options.batch_size,
        log=log,
        checkpoint=directory.state,
        resume=where.resume,
        accelerator=accelerator_on(device),
    )
    palm.save(directory.weights)
    directory.finish(log, "pretrain")
    return directory.path


OPTIONS = (PretrainOptions, ModelOptions, CorpusOptions, FitOptions, RunOptions)
