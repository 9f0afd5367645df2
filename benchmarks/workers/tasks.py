"""What every language model is asked to do, whoever wrote it, so that all are timed at the same work."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch
from serving import serve
from torch import Tensor, nn
from torch.optim import AdamW

CHECKED = (2, 48)  # batch and length of the ids whose logits are compared


def prime() -> None:
    """One step of a one-weight model: what torch imports at the first step counts as import, not as a step."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = AdamW([weight], fused=True)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()


class Task(ABC):
    """One language model. Subclasses say how it is loaded and called; how it is timed is the same for all."""

    functions = ("build", "step", "sample", "at_position")

    @abstractmethod
    def load(self, path: str, **switches: Any) -> nn.Module:
        """The model with the weights that ours wrote to `path`, in float32 on the CPU."""

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """(b, n) -> (b, n, v)."""

    @abstractmethod
    def loss(self, ids: Tensor) -> Tensor:
        """The mean next-token loss of ids (b, n), n - 1 of which are predicted."""

    @abstractmethod
    def draw(self, ids: Tensor, length: int, **how: Any) -> Tensor:
        """Prompts (b, n) and what follows: (b, length), drawn from the softmax of the logits, unfiltered."""

    def clock(self, ids: Tensor, length: int) -> list[float]:
        """The times at which the new tokens of `draw` came."""
        raise NotImplementedError(f"{type(self).__name__} does not hand over its tokens one by one")

    # requests

    def build(
        self,
        path: str,
        vocabulary: int,
        device: str = "cpu",
        dtype: str = "float32",
        autocast: bool = False,
        compile: bool = False,
        **switches: Any,
    ) -> dict[str, float]:
        """Load the weights, and tell how far the logits are from those that ours wrote beside them (float32)."""
        self.vocabulary, self.device, self.autocast, self.optimizer = vocabulary, device, autocast, None
        self.model = self.load(path, **switches).to(device).eval()
        theirs = torch.load(f"{path}.logits", map_location=device)
        with torch.no_grad():
            difference = float((self.logits(self.ids(*CHECKED)) - theirs).abs().max())
        self.model = self.model.to(getattr(torch, dtype))
        self.forward = torch.compile(self.model) if compile else self.model
        weights = list(self.model.parameters())
        return {
            "difference": difference,
            "logits_std": float(theirs.std()),
            "parameters": sum(p.numel() for p in weights),
            "weight_bytes": sum(p.nbytes for p in weights),
        }

    def known_bytes(self, batch: int, steps: int) -> int:
        """Of weights that steps do not read, for their products with each token were made beforehand."""
        return 0

    def ids(self, batch: int, length: int, seed: int = 0) -> Tensor:
        return random_ids(self.vocabulary, batch, length, seed).to(self.device)

    def step(self, batch: int, length: int, seed: int = 0) -> dict[str, float]:
        """One optimiser's step: forward, backward, fused AdamW."""
        if self.optimizer is None:
            self.model.train()
            self.optimizer = AdamW(self.model.parameters(), lr=1e-4, fused=True)
        ids = self.ids(batch, length, seed)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": float(loss)}

    def sample(self, batch: int, prompt: int, length: int, **how: Any) -> None:
        """Prompts of `prompt` tokens, generated up to `length`."""
        torch.manual_seed(0)
        shape = tuple(self.draw(self.ids(batch, prompt), length, **how).shape)
        if shape != (batch, length):
            raise RuntimeError(f"{(batch, length)} tokens were wanted, got {shape}")

    def at_position(self, batch: int, position: int, window: int = 64) -> dict[str, float]:
        """Seconds a token over a window of positions; its middle is `position`, what is before it is the prompt."""
        prompt = position - window // 2
        times = self.clock(self.ids(batch, prompt), prompt + window + 1)  # the first token comes with the prompt
        return {
            "seconds": (times[-1] - times[0]) / (len(times) - 1),
            "known_bytes": self.known_bytes(batch, len(times)),
        }

    def serve(self) -> None:
        prime()
        serve({name: getattr(self, name) for name in self.functions})


def random_ids(vocabulary: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """The same on every side; without id 0, which PaLM's loss leaves out."""
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def now(device: str) -> float:
    """The time once the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
