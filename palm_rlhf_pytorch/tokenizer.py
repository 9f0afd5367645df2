"""Text to token ids and back: bytes, byte-level BPE, or any transformers tokenizer.

Axes: b texts, n tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import atomic_path, write_json

SPECIALS = ("<pad>", "<bos>", "<eos>")
CONFIG_FILE = "tokenizer_config.json"
BPE_FILE = "tokenizer.json"

# What published tokenizer.json files call their special tokens, looked up in this order.
PAD_NAMES = ("<pad>", "[PAD]", "<|padding|>", "<|pad|>")
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")


class Tokenizer(ABC):
    """What every tokenizer offers; a subclass supplies `encode`, `_decode` and `save`.

    `num_tokens` is one more than the largest id: the size of the embedding a model needs.
    """

    num_tokens: int
    pad_id: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one text, without special tokens; "<eos>" in a text is five ordinary characters."""

    def encode_start(self, text: str) -> list[int]:
        """Ids of a text that nothing stands before; most tokenizers make no difference."""
        return self.encode(text)

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of ids that are all in the vocabulary and are not pad, bos or eos."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer(directory)` reads, each file atomically."""

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of ids (n,). Special tokens are dropped and end nothing.

        Ids outside the vocabulary are dropped too: -1 pads encoders, and a model whose embedding was
        rounded up can sample ids that no text has.
        """
        if isinstance(ids, Tensor):
            if ids.ndim != 1:
                raise ValueError(f"decode takes the ids of one text, (n,), got {tuple(ids.shape)}.")
            ids = ids.tolist()
        dropped = {self.pad_id, self.bos_id, self.eos_id}
        return self._decode([i for i in ids if 0 <= i < self.num_tokens and i not in dropped])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """texts -> ids (b, n), long, right padded with `pad_id`."""
        _refuse_bare_string(texts)
        rows = [self.encode(text) for text in texts]
        if not rows:
            raise ValueError("got no texts to tokenize: pass at least one.")
        if [] in rows:
            raise ValueError(f"texts[{rows.index([])}] is empty: every text needs at least one token.")
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=self.pad_id)

    def _config(self, kind: str) -> dict[str, Any]:
        ids = {name: getattr(self, name) for name in ("num_tokens", "pad_id", "bos_id", "eos_id")}
        return {"kind": kind, **ids}


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, after the three special tokens."""

    num_tokens = len(SPECIALS) + 256
    pad_id, bos_id, eos_id = range(len(SPECIALS))

    def encode(self, text: str) -> list[int]:
        return [byte + len(SPECIALS) for byte in text.encode("utf-8")]

    def _decode(self, ids: list[int]) -> str:
        # A model can sample bytes that are not UTF-8; they show as U+FFFD.
        return bytes(i - len(SPECIALS) for i in ids).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        write_json(Path(directory) / CONFIG_FILE, self._config("byte"))


class BPETokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`: a byte-level BPE of our own (`train`), or any tokenizer.json (`from_file`).

    Special ids not given are looked up by their usual names; bos and pad fall back to eos.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        pad_id: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        space_first: bool = False,
    ):
        self.space_first = space_first
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        eos_id = _first_known(vocab, EOS_NAMES) if eos_id is None else eos_id
        if eos_id is None:
            raise ValueError(f"the tokenizer has none of the tokens {', '.join(EOS_NAMES)}: pass eos_id.")
        bos_id = _first_known(vocab, BOS_NAMES, eos_id) if bos_id is None else bos_id
        pad_id = _first_known(vocab, PAD_NAMES, eos_id) if pad_id is None else pad_id
        self.num_tokens = max(vocab.values()) + 1
        self.pad_id, self.bos_id, self.eos_id = pad_id, bos_id, eos_id
        # A file can carry these settings; we pad and truncate ourselves, and text never makes a special.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int, lowercase: bool = False) -> BPETokenizer:
        """Learn at most `vocab_size` tokens: three specials, the 256 bytes, then merges.

        Every string round-trips, except that `lowercase` folds case. A word is the same token at the start of a text
        as behind a space.
        """
        _refuse_bare_string(texts)
        if vocab_size < ByteTokenizer.num_tokens:
            raise ValueError(
                f"vocab_size must be at least {ByteTokenizer.num_tokens} "
                f"(three special tokens and 256 bytes), got {vocab_size}."
            )
        lib = require("tokenizers", "hf")
        tokenizer = lib.Tokenizer(lib.models.BPE())
        tokenizer.pre_tokenizer = lib.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = lib.decoders.ByteLevel()
        if lowercase:
            tokenizer.normalizer = lib.normalizers.Lowercase()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_space_first, texts), trainer=trainer)
        return cls(tokenizer, space_first=True)

    @classmethod
    def from_file(cls, path: str | Path, **settings: Any) -> BPETokenizer:
        """Read a tokenizer.json; `pad_id`, `bos_id`, `eos_id` override the ids found by name."""
        lib = require("tokenizers", "hf")
        try:
            tokenizer = lib.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error}).") from error
        return cls(tokenizer, **settings)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_start(self, text: str) -> list[int]:
        return self.encode(_space_first(text) if self.space_first else text)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        with atomic_path(Path(directory) / BPE_FILE) as temporary:
            self.tokenizer.save(os.fspath(temporary))
        write_json(Path(directory) / CONFIG_FILE, {**self._config("bpe"), "space_first": self.space_first})


class HFTokenizer(Tokenizer):
    """A transformers tokenizer. It must know an eos; bos and pad fall back to eos."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise ValueError("the transformers tokenizer has no eos token: set its eos_token first.")
        self.eos_id = tokenizer.eos_token_id
        self.bos_id = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str) -> HFTokenizer:
        """A directory written by `save_pretrained`, or the name of a tokenizer on the hub."""
        transformers = require("transformers", "hf")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"no tokenizer at {name}: expected a directory saved by this library or by transformers, "
                f"a tokenizer.json file, or the name of a tokenizer on the hub ({reason})."
            ) from error
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as staging:
            self.tokenizer.save_pretrained(staging)
            for file in Path(staging).iterdir():
                os.replace(file, directory / file.name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read what `save` wrote, a bare tokenizer.json file, or a transformers tokenizer by path or name."""
    path = Path(path)
    if path.is_file():
        return BPETokenizer.from_file(path)
    if (path / BPE_FILE).is_file() and not (path / CONFIG_FILE).is_file():
        return BPETokenizer.from_file(path / BPE_FILE)
    config = _read_config(path / CONFIG_FILE)
    kind = config.get("kind")
    if kind is None:  # transformers keeps a file of the same name, without a kind
        return HFTokenizer.load(os.fspath(path))
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        settings = {name: config.get(name) for name in ("pad_id", "bos_id", "eos_id")}
        return BPETokenizer.from_file(path / BPE_FILE, **settings, space_first=config.get("space_first", False))
    raise ValueError(f"{path / CONFIG_FILE} names the kind {kind!r}: expected byte or bpe.")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def _first_known(vocab: dict[str, int], names: Sequence[str], default: int | None = None) -> int | None:
    return next((vocab[name] for name in names if name in vocab), default)


def _space_first(text: str) -> str:
    """Words in a text follow a space; with this its first one does too."""
    return text if not text or text[0].isspace() else " " + text


def _refuse_bare_string(texts: Iterable[str]) -> None:
    """A str is an iterable of its characters, so it would pass for a list of texts."""
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one str: wrap it in a list.")
