"""Training a policy on choices (DPO) or labelled responses (KTO); the reference reads them once, before."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.actor import made_causal
from palm_rlhf_pytorch.batches import Row, bucketed_rows, collate
from palm_rlhf_pytorch.checkpoint import read_weights, save_weights
from palm_rlhf_pytorch.fine_tuning import TuningOptions, all_response_sums, fine_tune, response_sums
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.state import fingerprint
from palm_rlhf_pytorch.supervised import FitOptions, finite_means
from palm_rlhf_pytorch.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# ids (2b, n) and response mask (2b, n) of first and second answers, reference log-probs (2, b), labels (b,) or None
Batch = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Objective(Protocol):
    """What an algorithm says: which two answers an item brings, and what they lose. `algorithms.dpo`, `.kto`."""

    needs_reference: bool
    both_learn: bool

    def answers(
        self, items: Sequence[Any], tokenizer: Tokenizer, max_len: int
    ) -> tuple[list[Row], list[Row], Tensor | None]:
        """-> first and second answers, encoded, and labels (items,) or None."""

    def __call__(
        self, log_probs: Tensor, reference: Tensor, lengths: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed log-probs and token counts (2, b), labels (b,) -> losses (b,), and numbers to log."""


def train_on_answers(
    palm: PaLM,
    train: Sequence[Any],
    held_out: Sequence[Any],
    tokenizer: Tokenizer,
    options: TuningOptions,
    fit_options: FitOptions,
    *,
    objective: Objective,
    cache: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **fit_keywords: Any,
) -> list[dict[str, float]]:
    """Fit `palm` to pairs or labelled responses, starting from itself as the reference. cache: a file that keeps the
    reference's log-probs. Keywords go to `fit`.
    """
    accelerator = accelerator or Accelerator()
    made_causal(palm, "policy").to(accelerator.device)
    first, second, labels = objective.answers([*train, *held_out], tokenizer, options.max_len)
    rows, count = [*first, *second], len(first)
    reference = torch.zeros(2, count)
    if objective.needs_reference:
        with accelerator.autocast():  # as the policy's will be, or they would differ from the start
            found = reference_log_probs(palm, rows, tokenizer.pad_id, options.batch_size, cache)
        reference = found.view(2, count)
    lengths = torch.tensor([len(ids) - prompt for ids, prompt in rows]).view(2, count)
    generator = torch.Generator().manual_seed(options.seed)
    longest = [max(len(a), len(b)) for (a, _), (b, _) in zip(first, second, strict=True)]

    def batches() -> Iterator[Batch]:
        for some in bucketed_rows(longest[: len(train)], options.batch_size, generator):
            ids, mask, prompt_mask = collate([side[i] for side in (first, second) for i in some], tokenizer.pad_id)
            yield ids, mask & ~prompt_mask, reference[:, some], None if labels is None else labels[some]

    def loss_of(palm: PaLM, batch: Batch, scope: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        return answers_loss(palm, objective, batch, scope)

    def evaluate(scope: str | None) -> dict[str, float]:
        held = slice(len(train), count)
        sums = all_response_sums(palm, [*first[held], *second[held]], tokenizer.pad_id, options.batch_size, scope)
        of_held = None if labels is None else labels[held]
        losses, numbers = objective(sums.view(2, -1), reference[:, held], lengths[:, held], of_held)
        return {f"held_out_{name}": mean for name, mean in finite_means({"loss": losses, **numbers}).items()}

    return fine_tune(
        palm,
        loss_of,
        batches(),
        options,
        fit_options,
        evaluate if held_out else None,
        ragged=True,
        accelerator=accelerator,
        description=type(objective).__name__,
        **fit_keywords,
    )


def answers_loss(
    palm: PaLM, objective: Objective, batch: Batch, scope: str | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of an objective's losses, and its numbers. First and second answers go through the model together,
    where both are learned from.
    """
    ids, response_mask, reference, labels = batch
    if objective.both_learn:
        log_probs = response_sums(palm, ids, response_mask, scope).view(2, -1)
    else:
        (ids, others), (mask, others_mask) = ids.chunk(2), response_mask.chunk(2)
        with torch.no_grad():
            measured = response_sums(palm, others, others_mask, scope)
        log_probs = torch.stack((response_sums(palm, ids, mask, scope), measured))
    losses, numbers = objective(log_probs, reference, response_mask.sum(dim=-1).view(2, -1), labels)
    return losses.mean(), numbers


def reference_log_probs(
    palm: PaLM, rows: Sequence[Row], pad_id: int, batch_size: int, cache: str | Path | None = None
) -> Tensor:
    """Summed log-probs of responses under `palm` without adapters (len(rows),): those in the file `cache` where it is
    of the same weights, rows and precision, else computed, and kept there.
    """
    key = None if cache is None else reference_key(palm, rows)
    if cache is not None and Path(cache).is_file():
        try:
            state, config = read_weights(cache)
            if config == key:
                return state["log_probs"]
            why = "it is of another model, data or precision"
        except ValueError as error:
            why = str(error)
        logger.info("the reference's log-probs in %s are computed again: %s", cache, why)
    log_probs = all_response_sums(palm, rows, pad_id, batch_size, said="reference")
    if cache is not None:
        save_weights(cache, {"log_probs": log_probs}, key)
    return log_probs


def reference_key(palm: PaLM, rows: Sequence[Row]) -> dict[str, Any]:
    """What the reference's log-probs follow from."""
    numbers = torch.tensor([number for ids, prompt in rows for number in (len(ids), prompt, *ids)])
    kind, dtype = palm.device.type, palm.token_emb.weight.dtype
    return {
        "weights": fingerprint(palm.palm_parameters()),
        "model": palm.config,
        "rows": fingerprint([numbers]),
        "precision": str(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype),
    }
