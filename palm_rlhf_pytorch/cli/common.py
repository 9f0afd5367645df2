"""What the training commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from palm_rlhf_pytorch.conversation import Conversation, as_chat
from palm_rlhf_pytorch.data import split_holdout
from palm_rlhf_pytorch.decoder import can_compile
from palm_rlhf_pytorch.devices import DEVICES, PRECISIONS, accelerator_on, choose_device
from palm_rlhf_pytorch.fine_tuning import TuningOptions
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.hub import located
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.run_directory import RunDirectory
from palm_rlhf_pytorch.supervised import FitOptions
from palm_rlhf_pytorch.text_reward import TextReward
from palm_rlhf_pytorch.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

T = TypeVar("T")

MODEL = (
    "directory of a run that trained a language model (pretrain, sft, ppo, ...), of a model that was exported, or of a "
    "Cohere or Cohere2 model from Hugging Face; or the name of such a repository on the hub (owner/name)"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run"""

    resume: bool = option(False, "go on with the run in --out from its last checkpoint")
    device: str = option("auto", "where to compute; auto takes a GPU where there is one", choices=DEVICES)

    def start(self, out: str, seed: int) -> tuple[RunDirectory, torch.device]:
        """The run's directory, which is free or to be gone on with, and the device; everything random is seeded."""
        directory = RunDirectory(out)
        directory.claim(self.resume)
        torch.manual_seed(seed)
        return directory, choose_device(self.device)


@dataclass(frozen=True)
class PrecisionOptions:
    """How exactly to compute"""

    precision: str = option(
        "auto", "fp32, or bf16 by autocast; auto takes bf16 on a GPU that computes in it", choices=PRECISIONS
    )


@dataclass(frozen=True)
class ComputeOptions(PrecisionOptions):
    """How to compute"""

    compile: bool | None = option(
        None, "compile the training step (default: on a GPU with triton, when a run takes longer than five minutes)"
    )

    def keywords(self, device: torch.device) -> dict[str, Any]:
        """For `supervised.fit` on that device."""
        possible = can_compile(device)
        if self.compile and not possible:
            missing = "triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
            raise ValueError(f"--compile needs {missing}, which is not here; leave it out")
        unsaid = None if possible and device.type == "cuda" else False  # on a CPU it gains nothing
        compile = unsaid if self.compile is None else self.compile
        return {"compile": compile, "accelerator": accelerator_on(device, self.precision)}


@dataclass(frozen=True)
class TokenizerOptions:
    """How text becomes tokens, for a new model"""

    tokenizer: str = option("byte", "byte, bpe (trained on the data), or the path of a tokenizer")
    vocab_size: int = option(4096, "tokens of a new bpe", least=259)
    lowercase: bool = option(False, "lowercase text for a new bpe")

    def new(self, texts: Sequence[str]) -> Tokenizer:
        if self.tokenizer == "byte":
            return ByteTokenizer()
        if self.tokenizer == "bpe":
            return BPETokenizer.train(texts, vocab_size=self.vocab_size, lowercase=self.lowercase)
        return load_tokenizer(self.tokenizer)


@dataclass(frozen=True)
class ModelOptions:
    """The model's sizes"""

    dim: int = option(256, "width", least=1)
    depth: int = option(4, "layers", least=1)
    heads: int = option(4, "query heads", least=1)
    dim_head: int = option(64, "width of a head", least=1)
    kv_heads: int = option(1, "key/value heads", least=1)
    ff_mult: float = option(4.0, "feedforward width over model width")
    attn_dropout: float = option(0.0, "dropout of attention weights")
    ff_dropout: float = option(0.0, "dropout inside the feedforward")
    rotary_theta: float = option(10000.0, "base of the rotary angles")

    def new(self, tokenizer: Tokenizer, **keywords: Any) -> PaLM:
        return PaLM(num_tokens=tokenizer.num_tokens, flash_attn=True, **asdict(self), **keywords)


@dataclass(frozen=True)
class ModelUse:
    """How a model from elsewhere is taken"""

    dtype: str = option(
        "auto",
        "what weights are kept in; adapters are float32 (auto: fp32, or bf16 for an imported model on a GPU)",
        choices=("auto", *DTYPES),
    )
    chat: bool | None = option(
        None,
        "a prompt of plain text is a user's message to the model's chat template; --no-chat: messages with roles are "
        "plain text (default: each is what it is)",
    )


@dataclass(frozen=True, kw_only=True)
class StartOptions(ModelUse):
    """What model is to learn"""

    model: str = required(MODEL)
    out: str = option("runs/tuned", "directory of the run")
    held_out: float = option(0.1, "share of the data kept for evaluation")


@dataclass(frozen=True)
class TuneFitOptions(FitOptions):
    """How the model is fitted. The learning rate warms up, then falls along a cosine to a tenth."""

    steps: int = option(500, "optimiser steps", least=1)
    lr: float = option(1e-4, "highest learning rate; less without --lora", least=0)
    warmup: int = option(20, "steps until the learning rate is reached", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices and embeddings", least=0)


class Tuning:
    """A command that goes on from a model: what it starts with, trains and writes."""

    def __init__(
        self,
        command: str,
        options: StartOptions,
        tuning: TuningOptions,
        fit: TuneFitOptions,
        compute: ComputeOptions,
        where: RunOptions,
    ):
        self.command, self.resume = command, where.resume
        self.given = {"options": options, "tuning": tuning, "fit": fit, "compute": compute}
        self.directory, self.device = where.start(options.out, tuning.seed)
        self.keywords = compute.keywords(self.device)
        self.palm, self.tokenizer = open_model(options.model, self.device, options.dtype)
        tuning.ready(self.palm)

    def with_roles(self, items: Sequence[T]) -> list[T]:
        """`with_roles` as --chat wants it."""
        return with_roles(items, self.given["options"].chat, self.tokenizer)

    def start(self, items: Sequence[Any], **options: Any) -> None:
        """From here on the directory is taken. As many items as these are to be trained on and held out."""
        tuning, held_out = self.given["tuning"], self.given["options"].held_out
        self.parts = split_holdout(range(len(items)), held_out, tuning.seed)
        self.log = self.directory.start(self.command, self.resume, self.tokenizer, **self.given, **options)
        self.directory.config |= self.palm.pretrained

    def train(self, train_on: Callable[..., list[dict[str, float]]], items: Sequence[Any], **keywords: Any) -> Path:
        """train_on(palm, train, held out, tokenizer, tuning, fit) the items, and write the model."""
        parts = ([items[i] for i in part] for part in self.parts)
        resume = self.resume and self.directory.has_state()
        keywords |= dict(self.keywords, log=self.log, checkpoint=self.directory.state, resume=resume)
        keywords["adapter"] = self.directory.adapter_of(self.given["options"].model)
        history = train_on(self.palm, *parts, self.tokenizer, self.given["tuning"], self.given["fit"], **keywords)
        self.palm.save(self.directory.weights)
        say_held_out(history[-1])
        self.directory.finish(self.log, self.command)
        return self.directory.path


def open_model(place: str, device: torch.device, dtype: str = "auto") -> tuple[PaLM, Tokenizer]:
    """The language model, and its tokenizer, of a run, a directory or a repository on the hub; see `MODEL`."""
    where = located(place)
    if where.is_file():
        raise ValueError(f"--model is a directory with a model and its tokenizer, but {place!r} is a file")
    wanted = DTYPES.get(dtype)
    if dtype == "auto" and device.type != "cuda":
        wanted = torch.float32
    elif dtype == "auto" and RunDirectory(where).is_imported():
        wanted = torch.bfloat16
    return PaLM.from_pretrained(place, dtype=wanted, device=device), load_tokenizer(where)


def with_roles(items: Sequence[T], chat: bool | None, tokenizer: Tokenizer) -> list[T]:
    """Prompts, or records that have one, as `--chat` wants them (see `as_chat`); a tokenizer without a template for
    roles is refused.
    """
    if items and isinstance(items[0], str):
        found = prompts = [as_chat(prompt, chat) for prompt in items]
    else:
        found = [item._replace(prompt=as_chat(item.prompt, chat)) for item in items]
        prompts = [item.prompt for item in found]
    talks = next((prompt for prompt in prompts if isinstance(prompt, Conversation)), None)
    if talks is not None:
        tokenizer.encode_chat(talks.messages)
    elif tokenizer.has_chat and chat is None and prompts:
        print("the model has a chat template: with --chat each prompt would be a user's message to it")
    return found


def say_held_out(row: dict[str, float]) -> None:
    for name, value in row.items():
        if name.startswith("held_out"):
            print(f"{name}: {value:.3f}")


def text_reward(directories: Sequence[str], device: torch.device, whole: bool | None, max_len: int) -> TextReward:
    """The reward of one or several reward runs, each with its own tokenizer. Those that learned from messages with
    roles see roles, to others a conversation is plain text.

    `whole` None: as they were trained, on whole texts or on responses to prompts.
    """
    runs = [RunDirectory(directory) for directory in directories]
    members = [(run.reward_model(device), run.tokenizer()) for run in runs]
    if whole is None:
        trained = {run.notes().get("whole_text", False) for run in runs}
        if len(trained) > 1:
            raise ValueError("some rewards were trained on whole texts, some on responses: say --[no-]whole-text")
        whole = trained.pop()
    # texts may take more tokens in a reward's vocabulary than in the policy's
    return TextReward(members, whole, 4 * max_len, [run.notes().get("chat", False) for run in runs])
