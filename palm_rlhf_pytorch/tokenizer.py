"""Text to token ids and back: bytes, byte-level BPE, or any transformers tokenizer with its chat template.

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

from palm_rlhf_pytorch.conversation import Message
from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.files import atomic_path, write_json

SPECIALS = ("<pad>", "<bos>", "<eos>")
CONFIG_FILE = "tokenizer_config.json"
BPE_FILE = "tokenizer.json"
# where models on the hub say which ids end an answer, and which pad and begin it: of pad and bos
# the first file that says it counts, ends are those of both
ID_FILES = ("generation_config.json", "config.json")
ID_NAMES = ("eos_token_id", "pad_token_id", "bos_token_id")

# What published tokenizer.json files call their special tokens, looked up in this order.
PAD_NAMES = ("<pad>", "[PAD]", "<|padding|>", "<|pad|>")
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]")
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]")


class Tokenizer(ABC):
    """What every tokenizer offers; a subclass supplies `encode`, `_decode` and `save`.

    `num_tokens` is one more than the largest id: the size of the embedding a model needs. `eos_id` is what ends the
    answers that are learned; drawn ones end with any of `eos_ids`, of which it is the first.
    """

    num_tokens: int
    pad_id: int
    bos_id: int
    eos_id: int
    has_chat: bool = False  # whether there is a chat template

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return (self.eos_id,)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one text, without special tokens; "<eos>" in a text is five ordinary characters."""

    def encode_start(self, text: str) -> list[int]:
        """Ids of a text that nothing stands before; most tokenizers make no difference."""
        return self.encode(text)

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The ids of messages with roles by the tokenizer's chat template, which also says whether bos comes first;
        in the end those that open the assistant's turn. Text that looks like a special token is one here.
        """
        raise ValueError(
            "the tokenizer has no chat template for messages with roles: take a model whose tokenizer has one, or say "
            "--no-chat (chat=False) to have them as plain text"
        )

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
        dropped = {self.pad_id, self.bos_id, *self.eos_ids}
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
    """A transformers tokenizer. It must know an eos, or be told one; bos and pad fall back to those given, then to eos.

    eos_ids: the ids that end an answer of the model, where they are more than the tokenizer's own eos.
    """

    def __init__(
        self, tokenizer: Any, eos_ids: Sequence[int] = (), *, pad_id: int | None = None, bos_id: int | None = None
    ):
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._eos_ids = tuple(dict.fromkeys((*own, *eos_ids)))
        if not self._eos_ids:
            raise ValueError("the transformers tokenizer has no eos token: set its eos_token first.")
        self.num_tokens = max(tokenizer.get_vocab().values()) + 1
        self.eos_id = self._eos_ids[0]
        self.bos_id, self.pad_id = (
            next(i for i in (one, other, self.eos_id) if i is not None)
            for one, other in ((tokenizer.bos_token_id, bos_id), (tokenizer.pad_token_id, pad_id))
        )
        self.tokenizer = tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def has_chat(self) -> bool:
        return bool(self.tokenizer.chat_template)

    @classmethod
    def load(cls, name: str) -> HFTokenizer:
        """A directory written by `save_pretrained`, with what its model's files say of special ids, or the name of a
        tokenizer on the hub.
        """
        transformers = require("transformers", "hf")
        ours = {"command", "palm"} & set(_read_config(Path(name) / "config.json"))  # not one to look a model up in
        keywords = {"config": transformers.PretrainedConfig()} if ours else {}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, **keywords)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"no tokenizer at {name}: expected a directory saved by this library or by transformers, "
                f"a tokenizer.json file, or the name of a tokenizer on the hub ({reason})."
            ) from error
        return cls(tokenizer, **model_ids(name))

    def encode_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        if not self.has_chat:
            return super().encode_chat(messages, add_generation_prompt)
        try:
            text = self.tokenizer.apply_chat_template(
                [message._asdict() for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the tokenizer's chat template does not take these messages: {error}") from error
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False, verbose=False)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as staging:
            self.tokenizer.save_pretrained(staging)
            for file in (path for path in Path(staging).rglob("*") if path.is_file()):
                place = directory / file.relative_to(staging)  # templates by name lie in a directory of their own
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
        ids = {"eos_token_id": list(self.eos_ids), "pad_token_id": self.pad_id, "bos_token_id": self.bos_id}
        write_json(directory / ID_FILES[0], ids)


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


def model_ids(directory: str | Path) -> dict[str, Any]:
    """What the files of a model in a directory say of special ids: the keywords of `HFTokenizer`."""
    said = {name: [] for name in ID_NAMES}
    for file in ID_FILES:
        config = _read_config(Path(directory) / file)
        for name in ID_NAMES:
            value = config.get(name)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(i, int) for i in ids):
                raise ValueError(f"{Path(directory) / file} says {name}={value!r}: expected a whole number or several.")
            said[name] += ids
    eos, pad, bos = said.values()
    return {"eos_ids": eos, "pad_id": next(iter(pad), None), "bos_id": next(iter(bos), None)}


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
