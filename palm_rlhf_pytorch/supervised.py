"""The one supervised training loop: pretraining and reward models differ only in their batches and loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from palm_rlhf_pytorch.compilation import CompiledModule
from palm_rlhf_pytorch.devices import fused, on_tensors, prepared, ready_for, to_device
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.interrupts import Interrupts
from palm_rlhf_pytorch.metrics import MetricsLog
from palm_rlhf_pytorch.optimizers import AdamW
from palm_rlhf_pytorch.prefetch import prefetched
from palm_rlhf_pytorch.state import (
    hyper_parameters,
    load_state,
    random_state,
    restore_optimizer,
    save_state,
    set_random_state,
)

KIND = "supervised"
ON_BAR = 6  # numbers beside the progress bar, at most

Numbers = dict[str, Tensor]
Loss = Tensor | tuple[Tensor, Numbers]  # alone, or with numbers to log


@dataclass(frozen=True)
class FitOptions:
    """How a model is fitted. The learning rate warms up, then falls along a cosine to a tenth."""

    steps: int = option(1000, "optimiser steps", least=1)
    lr: float = option(1e-3, "highest learning rate", least=0)
    warmup: int = option(50, "steps until the learning rate is reached", least=0)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and embeddings", least=0)
    max_norm: float = option(1.0, "gradient norm to clip at", least=1e-6)
    log_every: int = option(10, "steps between lines in metrics.jsonl", least=1)
    eval_every: int = option(200, "steps between evaluations on what is held out", least=1)
    save_every: int = option(500, "steps between checkpoints to resume from", least=1)


class LossModule(nn.Module):
    """A model and what makes a loss of its batches, behind one forward for accelerate to wrap."""

    def __init__(self, model: nn.Module, loss_of: Callable[[Any, Any], Loss]):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, batch: Any) -> Numbers:
        loss = self.loss_of(self.model, batch)
        loss, numbers = loss if isinstance(loss, tuple) else (loss, {})
        return {"loss": loss, **numbers}


def learning_rate(step: int, options: FitOptions) -> float:
    """The rate of a step, counted from 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    progress = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def decayed_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, gains and biases do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class Meter:
    """Losses, numbers and pace since the last line of metrics; evaluation does not count as time."""

    def __init__(self, step: int, numbers: list[Numbers]):
        self.since, self.numbers, self.clock = step, numbers, time.perf_counter()

    def line(self, step: int) -> dict[str, float]:
        """What to log after `step` steps; counting starts again. A number that some steps do not have is NaN there."""
        columns = {name: torch.stack([row[name] for row in self.numbers]) for name in self.numbers[0]}
        loss = float(columns.pop("loss").cpu().double().mean())
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {step}: a lower learning rate may help")
        now = time.perf_counter()
        row = {"loss": loss, **finite_means(columns), "steps_per_second": (step - self.since) / (now - self.clock)}
        self.since, self.numbers, self.clock = step, [], now
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.clock += time.perf_counter() - started


def finite_means(columns: Numbers) -> dict[str, float]:
    """The mean of each (m,) or () but its NaNs; what is NaN altogether is left out."""
    means = {name: float(values.cpu().double().nanmean()) for name, values in columns.items()}
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}


def fit(
    model: nn.Module,
    loss_of: Callable[[Any, Any], Loss],
    batches: Iterator[Any],
    options: FitOptions,
    *,
    parameters: list[nn.Parameter] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    log: MetricsLog | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    accelerator: Accelerator | None = None,
    compile: bool | None = False,
    ragged: bool = False,
    description: str = "training",
) -> list[dict[str, float]]:
    """Minimise loss_of(model, batch) over `batches`, and return the history of metrics.

    batches must come in the same order when made again: a resumed run passes over those already seen and takes the
    same next step. They are made ahead by a thread, so they may draw from generators of their own only. Batches are
    tensors, or tuples of them, and are moved to the accelerator's device. compile, ragged: see `CompiledModule`. Ctrl-C
    lets the step under way end and writes the checkpoint. Losses in the history, and numbers that come with them, are
    means over the steps since the last line.
    """
    accelerator = accelerator or Accelerator()
    log = log or MetricsLog()
    module = LossModule(model, loss_of).to(accelerator.device)
    groups = decayed_groups(list(model.parameters()) if parameters is None else parameters, options.weight_decay)
    optimizer = AdamW(groups, lr=options.lr, betas=(0.9, 0.95), **fused(AdamW, accelerator.device))
    module, optimizer = prepared(accelerator, module, optimizer)
    start, numbers = 0, []
    if resume and checkpoint is not None and Path(checkpoint).is_file():
        start, numbers = _restore(checkpoint, model, optimizer, log)

    module, meter, shown = CompiledModule(module, compile, ragged), Meter(start, numbers), {}
    quiet = not accelerator.is_local_main_process
    bar = tqdm(total=options.steps, initial=start, desc=description, unit="step", disable=quiet)
    to_come = islice(batches, start, options.steps) if start < options.steps else ()
    ready = partial(ready_for, device=accelerator.device)
    with Interrupts() as interrupts, bar, prefetched(to_come, ready) as made:
        for step in range(start, options.steps):
            batch = to_device(next(made), accelerator.device)
            rate = learning_rate(step, options)
            meter.numbers.append(_take_step(module, batch, optimizer, accelerator, rate, options.max_norm))

            done, row = step + 1, {}
            last = done == options.steps
            if done % options.log_every == 0 or last:
                row = {**meter.line(done), "lr": rate}
                module.look(options.steps - done, row["steps_per_second"])
            if evaluate is not None and (done % options.eval_every == 0 or last):
                model.eval()
                with meter.paused(), accelerator.autocast():
                    row.update(evaluate())
            if row:
                log.append({"step": done, **row})
                shown.update({k: f"{v:.3g}" for k, v in row.items() if k not in ("lr", "steps_per_second")})
                bar.set_postfix(dict(islice(shown.items(), ON_BAR)), refresh=False)
            bar.update()
            if checkpoint is not None and (interrupts.asked or done % options.save_every == 0 or last):
                _save(checkpoint, done, meter.numbers, model, optimizer, log)
            if interrupts.asked:
                kept = "" if checkpoint is None else f"; {str(checkpoint)!r} holds it, --resume goes on from there"
                raise KeyboardInterrupt(f"stopped after step {done}{kept}")
    model.eval()
    return log.history


def _take_step(
    compiled: CompiledModule, batch: Any, optimizer: Any, accelerator: Accelerator, rate: float, max_norm: float
) -> Numbers:
    """One optimiser step; the loss and its numbers, without their graph."""
    compiled.module.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    numbers = compiled.backward(batch, lambda made: accelerator.backward(made["loss"]))
    accelerator.clip_grad_norm_(compiled.module.parameters(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return numbers


def _save(
    path: str | Path, step: int, numbers: list[Numbers], model: nn.Module, optimizer: Any, log: MetricsLog
) -> None:
    state = {
        "kind": KIND,
        "step": step,
        "numbers": [on_tensors(row, Tensor.cpu) for row in numbers],
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_state(),
        "history": log.history,
    }
    save_state(path, state)


def _restore(path: str | Path, model: nn.Module, optimizer: Any, log: MetricsLog) -> tuple[int, list[Numbers]]:
    """-> steps done, and numbers not yet logged."""
    state = load_state(path, KIND)
    try:
        model.load_state_dict(state["weights"])
        restore_optimizer(optimizer, state["optimizer"], hyper_parameters(optimizer))
    except (RuntimeError, ValueError):
        raise ValueError(
            f"{str(path)!r} is of another model: resume with the sizes that the run started with"
        ) from None
    set_random_state(state["random"])
    log.restore(state["history"])
    return state["step"], state.get("numbers", [])  # earlier versions kept losses alone
