"""How one token a row is computed: plainly, from packed weights (CPU), or compiled and replayed (CUDA)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from shutil import which
from types import FunctionType
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.kv_cache import KVCache
from palm_rlhf_pytorch.native_step import packed_step
from palm_rlhf_pytorch.packed_step import can_pack, hooked

DECODERS = ("auto", "plain", "packed", "compiled")
FEW = {"packed": 8, "compiled": 64}  # steps up to which getting ready would not pay
FIRST_LENGTH = 4096  # positions laid out at first, where a caller allows more
LONGEST = 2**14  # positions up to which 'auto' lays out a static cache: it does not grow, and every step sees all
LOOK_EVERY = 16  # steps between looks at a GPU's results: each look waits for it
LENGTHS = 256  # static caches come in multiples of it, so that calls of like lengths share their graphs

logger = logging.getLogger(__name__)


class CachedModel(Protocol):
    """What can be decoded from; PaLM is one. Prompts are read with `return_only_embedding=True` and `places`, all
    False, for keys and values are all that is wanted of them: others may take both and do as they like. (A PaLM
    with packed weights has its step read short ones.)
    """

    num_tokens: int

    def new_cache(self, batch: int, max_len: int, static: bool = False) -> KVCache: ...

    def next_logits(self, tokens: Tensor, cache: KVCache, **kwargs: Any) -> Tensor: ...

    def __call__(self, x: Tensor, *, mask: Tensor | None = None, cache: KVCache, **kwargs: Any) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@dataclass
class Decoder:
    """A cache without rows, and the step that goes with it.

    step: tokens (m,), cache -> logits (m, v), of rows whose tokens are then counted. look_every: steps after which to
    ask the device which rows have ended. fixed_sizes: a batch is the largest one, or a half, a quarter ... of it. read:
    see `PackedStep.read`. ahead: see `NativeStep.ahead`, if there is such a thing.
    """

    cache: KVCache
    step: Callable[[Tensor, KVCache], Tensor]
    look_every: int = 1
    fixed_sizes: bool = False
    batch: int = 1
    read: Callable[[Tensor, Tensor, KVCache], bool] = lambda *_: False
    ahead: Callable[..., tuple[Tensor, Tensor]] | None = None

    def size_for(self, rows: int) -> int:
        """The batch in which so many rows are computed."""
        size = self.batch
        while self.fixed_sizes and rows <= size // 2:
            size //= 2
        return size if self.fixed_sizes else rows

    def __call__(self, tokens: Tensor) -> Tensor:
        self.cache.reserve(1)
        logits = self.step(tokens, self.cache)
        self.cache.advance(1, 1)
        return logits

    def draw_ahead(self, tokens: Tensor, steps: int, *how: Any) -> tuple[Tensor, Tensor]:
        """Several steps in one call, and what was drawn from them."""
        self.cache.reserve(steps)
        drawn, log_probs = self.ahead(tokens, self.cache, steps, *how)
        self.cache.advance(len(drawn), len(drawn))
        return drawn, log_probs


def choose(model: CachedModel, steps: int, how: str = "auto", adapters: bool = False) -> str:
    """'auto' takes packed weights on a CPU and graphs on a GPU, where the machine has what they need and there are
    steps enough to pay for getting ready. Packed weights have no adapters beside them (merge those).
    """
    if how not in DECODERS:
        raise ValueError(f"decoder is one of {', '.join(DECODERS)}, got {how!r}")
    weight = next(model.parameters())
    best = "compiled" if weight.is_cuda else "packed"
    wanted = best if how == "auto" else how
    possible = {
        "plain": True,
        "packed": can_pack(model) and not adapters,
        "compiled": can_compile(weight.device) and not hooked(model),
    }[wanted]
    if not possible and how != "auto":
        logger.warning("decoder=%r is not to be had here (%s, %s): plain steps", how, weight.device, weight.dtype)
    return wanted if possible and (how != "auto" or steps > FEW[best]) else "plain"


@contextmanager
def decoder(model: CachedModel, batch: int, max_len: int, steps: int, how: str = "auto", **kwargs) -> Iterator[Decoder]:
    """A decoder of at most `batch` rows at once, each of at most max_len tokens. kwargs go to `next_logits`."""
    chosen = choose(model, steps, how, bool(kwargs.get("finetune_scope")))
    if chosen == "compiled" and (how != "auto" or max_len <= LONGEST):
        with replayed(model, batch, max_len, **kwargs) as ready:
            yield ready
        return
    cache = model.new_cache(batch, min(max_len, FIRST_LENGTH))
    cache.clear()
    if chosen != "packed":
        yield Decoder(cache, partial(model.next_logits, **kwargs), LOOK_EVERY if cache.lengths.is_cuda else 1)
        return
    with closing(packed_step(model, batch, steps)) as step:
        yield Decoder(cache, step, read=step.read, ahead=getattr(step, "ahead", None))


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it makes its code with."""
    return find_spec("triton") is not None if device.type == "cuda" else any(map(which, ("g++", "clang++", "c++")))


class Compiled:
    """`next_logits` compiled, with CUDA graphs where there is CUDA; a model that cannot be compiled is run plainly.

    `key` says what else but the number of rows its code depends on. Knows the model weakly: what is kept for a model
    must not keep it.
    """

    def __init__(self, model: CachedModel, key: tuple, **kwargs: Any):
        self.model, self.key, self.kwargs, self.works = ref(model), key, kwargs, True
        self.mode = "reduce-overhead" if next(model.parameters()).is_cuda else "default"
        self.ready = functions.setdefault(model, {})

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        model = self.model()
        if not self.works:
            return next_logits(model, tokens, cache, self.kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        if (len(tokens), self.key) in self.ready:
            return self.ready[len(tokens), self.key](model, tokens, cache, self.kwargs)
        return self._first(model, tokens, cache)

    def _first(self, model: CachedModel, tokens: Tensor, cache: KVCache) -> Tensor:
        started = time.perf_counter()
        # torch keeps what it compiles with a function's code, and refuses the ninth time: each has code of its own
        own = FunctionType(next_logits.__code__.replace(), next_logits.__globals__)
        try:
            compiled = torch.compile(own, mode=self.mode, fullgraph=True, dynamic=False)
            logits = compiled(model, tokens, cache, self.kwargs)
        except Exception as error:  # whatever the compiler chokes on: the plain step gives the same
            logger.warning("the decode step could not be compiled (%s); decoding goes on plainly", type(error).__name__)
            self.works = False
            return next_logits(model, tokens, cache, self.kwargs)
        self.ready[len(tokens), self.key] = compiled
        seconds = time.perf_counter() - started
        logger.info(
            "compiled the decode step for %d rows of %d tokens in %.1f s", *tokens.shape, cache.max_len, seconds
        )
        return logits


def next_logits(model: CachedModel, tokens: Tensor, cache: KVCache, kwargs: dict[str, Any]) -> Tensor:
    return model.next_logits(tokens, cache, **kwargs)


functions: WeakKeyDictionary[CachedModel, dict[tuple, Callable]] = WeakKeyDictionary()  # each model's, compiled
spare: WeakKeyDictionary[CachedModel, tuple[tuple, Decoder]] = WeakKeyDictionary()  # the last one of each model


@contextmanager
def replayed(model: CachedModel, batch: int, max_len: int, **kwargs: Any) -> Iterator[Decoder]:
    """A compiled decoder. It is kept, its cache too, for the next call of the same size: nothing is compiled or laid
    out again. Of other sizes what was compiled is kept.
    """
    max_len = -(-(max_len + LOOK_EVERY) // LENGTHS) * LENGTHS  # rows that have ended go on until somebody looks
    weight = next(model.parameters())
    modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(weight.device.type)
    key = (max_len, weight.dtype, weight.device, tuple(kwargs.items()), *modes)
    known, ready = spare.pop(model, (None, None))
    if known != (batch, key):
        ready = None  # its memory goes before there is more
        cache = model.new_cache(batch, max_len, static=True)
        torch._dynamo.mark_static_address(cache.memory)  # written in place within the graph
        ready = Decoder(cache, Compiled(model, key, **kwargs), LOOK_EVERY, fixed_sizes=True, batch=batch)
    ready.cache.clear()
    ready.cache.memory.zero_()  # every step sees all of it, and what broken weights left would spread: 0 * NaN
    try:
        yield ready
    finally:
        spare[model] = ((batch, key), ready)
