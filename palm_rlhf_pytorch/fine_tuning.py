"""What all training of a language model on given responses shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch.actor import adapt, made_causal, response_log_probs, trained
from palm_rlhf_pytorch.batches import Row, by_length, collate
from palm_rlhf_pytorch.cohere_config import refuse_what_is_in_the_way
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.precision import HALVES
from palm_rlhf_pytorch.supervised import FitOptions, Loss, fit

SCOPE = "policy"


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained"""

    lora: bool = option(True, "train adapters, which are merged into the weights in the end; not the whole model")
    lora_r: int = option(16, "rank of the adapters", least=1)
    lora_alpha: float | None = option(None, "adapters count alpha / rank times (default: the rank, so once)")
    rslora: bool = option(False, "adapters count alpha / sqrt(rank) times (rsLoRA)")
    lora_ff: bool = option(False, "adapters on the feedforward too, not on attention alone")
    gradient_checkpointing: bool = option(False, "save memory by computing layers twice")

    def ready(self, palm: PaLM) -> None:
        """Let `palm` be trained so, and adapters that it is given from now on be of this kind."""
        if not self.lora and palm.token_emb.weight.dtype in HALVES:
            raise ValueError("--no-lora trains the weights themselves, which needs them in float32: add --dtype fp32")
        palm.config.update(lora_alpha=self.lora_alpha, lora_rslora=self.rslora, lora_ff=self.lora_ff)
        palm.gradient_checkpointing = palm.gradient_checkpointing or self.gradient_checkpointing


@dataclass(frozen=True)
class TuningOptions(AdapterOptions):
    """What is trained, and on how much at once"""

    dropout: float = option(0.0, "dropout while training")
    max_len: int = option(512, "tokens of prompt and response together", least=2)
    batch_size: int = option(32, "rows of a batch (a pair is one)", least=1)
    seed: int = option(0, "seed of split and batches")


def fine_tune(
    palm: PaLM,
    loss_of: Callable[[PaLM, Any, str | None], Loss],
    batches: Iterator[Any],
    options: TuningOptions,
    fit_options: FitOptions,
    evaluate: Callable[[str | None], dict[str, float]] | None = None,
    adapter: Path | None = None,
    **fit_keywords: Any,
) -> list[dict[str, float]]:
    """Fit adapters of `palm`, or all of it; what comes out is a plain PaLM. loss_of(palm, batch, scope) and
    evaluate(scope) hear which adapters are in training. adapter: see `keep_adapter`. Keywords go to `fit`, whose
    history is returned.
    """
    made_causal(palm, "policy")
    options.ready(palm)
    scope = adapt(palm, options.lora, SCOPE, options.lora_r)
    palm.set_dropout(options.dropout)
    history = fit(
        palm,
        lambda palm, batch: loss_of(palm, batch, scope),
        batches,
        fit_options,
        parameters=trained(palm, scope),
        evaluate=None if evaluate is None else partial(evaluate, scope),
        **fit_keywords,
    )
    if scope is not None:
        keep_adapter(palm, scope, adapter)
        palm.merge_finetune_params(scope)
    palm.requires_grad_(True)
    return history


def keep_adapter(palm: PaLM, scope: str, directory: Path | None) -> None:
    """Write adapters as PEFT's to a directory, where one is given, and the model is one that PEFT knows."""
    if directory is not None and is_cohere(palm):
        palm.save_pretrained(directory, "huggingface", finetune_scope=scope, adapters="peft")


def is_cohere(palm: PaLM) -> bool:
    """Whether Hugging Face has a model of this kind."""
    try:
        refuse_what_is_in_the_way(palm)
    except ValueError:
        return False
    return True


def response_sums(palm: PaLM, ids: Tensor, response_mask: Tensor, scope: str | None = None) -> Tensor:
    """Log-probs of the responses in ids (b, n), each summed over its tokens (b,)."""
    return response_log_probs(palm, ids, response_mask, scope=scope).log_probs.sum(dim=-1)


@torch.no_grad()
def all_response_sums(
    palm: PaLM, rows: Sequence[Row], pad_id: int, batch_size: int, scope: str | None = None, said: str | None = None
) -> Tensor:
    """`response_sums` of encoded responses, in batches of like length -> (len(rows),) on the CPU; with a progress bar
    where `said` names it.
    """
    palm.eval()
    with tqdm(total=len(rows), desc=said, unit="response", disable=said is None) as bar:

        def sums(some: list[Row]) -> Tensor:
            ids, mask, prompt_mask = (t.to(palm.device) for t in collate(some, pad_id))
            bar.update(len(some))
            return response_sums(palm, ids, mask & ~prompt_mask, scope)

        return by_length(rows, batch_size, sums)
