"""Compiling what is trained, where that pays."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.devices import on_tensors

BACKEND = "inductor"
LONG = 300.0  # seconds that a run has to go on for: compiling takes about one of five minutes

logger = logging.getLogger(__name__)


class CompiledModule:
    """Calls `module`, compiled where `wanted`: True at once, False never, None when a run turns out to be long.

    The module itself stays as it is, the names of its weights too. What cannot be compiled is run plainly. ragged:
    batches differ in their shapes.
    """

    def __init__(self, module: nn.Module, wanted: bool | None = False, ragged: bool = False):
        self.module, self.wanted, self.looked = module, wanted, False
        self.dynamic = True if ragged else None  # for all shapes at once, or for the one there is
        self.call: Callable[..., Any] = module
        self.new = False  # compiled, but not yet called
        if wanted:
            self._compile()

    def _compile(self) -> None:
        self.call = torch.compile(self.module, backend=BACKEND, dynamic=self.dynamic)
        self.new, self.wanted = True, False

    def look(self, steps_left: int, steps_per_second: float) -> None:
        """Tell the pace, for it to be decided by. The first time it is only noted that steps have become regular."""
        if self.wanted is None and self.looked and steps_left / steps_per_second > LONG:
            self._compile()
        self.looked = True

    def backward(self, batch: object, backward: Callable[[Any], None]) -> Any:
        """What the module makes of a batch (a loss, or a dict with one), without its graph; its gradients, which
        `backward` makes, are added to the weights'.
        """
        if not self.new:
            made = self.call(batch)
            backward(made)
            return on_tensors(made, Tensor.detach)
        self.new, started = False, time.perf_counter()
        try:
            made = self.backward(batch, backward)
        except Exception as error:  # whatever the compiler chokes on: the plain module gives the same
            logger.warning("the step could not be compiled (%s); training goes on plainly", type(error).__name__)
            self.call = self.module
            self.module.zero_grad()
            return self.backward(batch, backward)
        logger.info("compiled the training step in %.1f s", time.perf_counter() - started)
        return made
