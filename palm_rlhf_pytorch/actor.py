"""The policy: a PaLM in training, and the frozen one that it started from."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.lora import LoRA
from palm_rlhf_pytorch.ops import scatter_to_mask
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.shared_prompts import predicting_embeds
from palm_rlhf_pytorch.vocabulary import linear_log_probs, target_log_probs


class Predictions(NamedTuple):
    """The m places that predict response tokens, in the order of the mask: softmax(scale * embeds @ weight^T)."""

    embeds: Tensor  # (m, d)
    weight: Tensor  # (v, d)
    targets: Tensor  # (m,) the tokens that came
    scale: float  # the model's, over the temperature


class PolicyOutput(NamedTuple):
    """log_probs and entropy (b, n): [:, t] belongs to token t; 0 outside the response. And what they were made of."""

    log_probs: Tensor
    entropy: Tensor
    predictions: Predictions


def predictions(
    palm: PaLM,
    sequence: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    scope: str | None = None,
    segment_ids: Tensor | None = None,
) -> Predictions:
    """The final embeddings of sequence (b, n) where response tokens are predicted. Padding is on the right; of packed
    rows segment_ids (b, n) tell the documents apart, each of which begins with what is no response.
    """
    embeds = predicting_embeds(palm, sequence, response_mask, scope, segment_ids)
    targets = sequence[:, 1:][response_mask[:, 1:]]  # place t predicts token t + 1
    return Predictions(embeds, palm.to_logits.weight, targets, palm.logit_scale / (temperature or 1.0))


def response_log_probs(
    palm: PaLM, sequence: Tensor, response_mask: Tensor, temperature: float = 1.0, scope: str | None = None
) -> PolicyOutput:
    """Log-prob of each response token of sequence (b, n), and the entropy of the distribution it came from.

    Only places that predict a response token meet the vocabulary. Padding is on the right.
    """
    places = predictions(palm, sequence, response_mask, temperature, scope)
    return PolicyOutput(*(scatter_to_mask(t, response_mask) for t in linear_log_probs(*places)), places)


class Actor(nn.Module):
    """A policy and its starting point, which LoRA keeps on the same frozen trunk: without adapters it is the start.
    Trained as a whole, the policy keeps a frozen copy of it.
    """

    def __init__(
        self,
        palm: PaLM,
        actor_lora: bool = True,
        actor_lora_r: int = 8,
        actor_lora_scope: str = "actor",
        actor_dropout: float = 0.0,
    ):
        super().__init__()
        made_causal(palm, "policy")
        self.actor_palm = palm
        # full fine-tuning moves the trunk, so the starting policy needs a copy of its own
        self._reference = [palm if actor_lora else deepcopy(palm).requires_grad_(False).eval()]
        self.actor_lora_scope = adapt(palm, actor_lora, actor_lora_scope, actor_lora_r)
        palm.set_dropout(actor_dropout)

    @property
    def reference_palm(self) -> PaLM:
        """The frozen starting policy: call it without a scope."""
        return self._reference[0]

    def _apply(self, fn, *args, **kwargs):
        self._reference[0]._apply(fn)  # not a submodule: it is neither trained nor saved with the policy
        return super()._apply(fn, *args, **kwargs)

    @property
    def frozen_palms(self) -> set[PaLM]:
        """Those whose weights training leaves as they are."""
        return {self.reference_palm}

    @contextmanager
    def first_layers_kept(self) -> Iterator[None]:
        """`PaLM.first_layer_kept` for all that are frozen."""
        with ExitStack() as stack:
            for palm in self.frozen_palms:
                stack.enter_context(palm.first_layer_kept())
            yield

    def actor_parameters(self) -> list[nn.Parameter]:
        """What training the policy changes."""
        return trained(self.actor_palm, self.actor_lora_scope)

    def predictions(self, sequence: Tensor, response_mask: Tensor, temperature: float = 1.0) -> Predictions:
        """The policy's. See `predictions`."""
        return predictions(self.actor_palm, sequence, response_mask, temperature, self.actor_lora_scope)

    def log_probs(self, sequence: Tensor, response_mask: Tensor, temperature: float = 1.0) -> PolicyOutput:
        """The policy's log-probs of the response tokens. See `response_log_probs`."""
        return response_log_probs(self.actor_palm, sequence, response_mask, temperature, self.actor_lora_scope)

    @torch.no_grad()
    def reference_log_probs(self, sequence: Tensor, response_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """The same (b, n) under the starting policy."""
        places = predictions(self.reference_palm, sequence, response_mask, temperature)
        return scatter_to_mask(target_log_probs(*places), response_mask)


def made_causal(palm: PaLM, role: str) -> PaLM:
    """`palm`, which may not see the future in that role."""
    if not palm.causal:
        warnings.warn(
            f"the {role}'s PaLM has causal=False, but a {role} may not see the future: it is made causal",
            stacklevel=4,
        )
        palm.set_causal(True)
    return palm


def adapt(palm: PaLM, lora: bool, scope: str, r: int) -> str | None:
    """Ready a PaLM for training: new adapters on a frozen trunk, or the whole. Returns the scope, None for the whole.

    Raises ValueError where the scope has adapters already that were trained, or of another kind: they are no start to
    measure from. Untrained ones, as a trainer leaves that refused another keyword, are taken over.
    """
    if not lora:
        palm.requires_grad_(True)
        return None
    there = scope in palm.finetune_modules
    if there and not (palm.lora_options[scope] == replace(palm.lora_defaults, r=r) and untrained(palm, scope)):
        raise ValueError(
            f"the palm has adapters {scope!r} of an earlier training: palm.merge_finetune_params({scope!r}) goes on "
            f"from there, palm.remove_finetune_params({scope!r}) starts again"
        )
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(False)
    if not there:
        palm.add_finetune_params(scope, r)
    return scope


def untrained(palm: PaLM, scope: str) -> bool:
    """Whether the adapters of a scope still add nothing."""
    return not any(lora.B.any() for lora in palm.finetune_modules[scope].modules() if isinstance(lora, LoRA))


def trained(palm: PaLM, scope: str | None) -> list[nn.Parameter]:
    """What training changes of a PaLM readied by `adapt`."""
    return palm.palm_parameters() if scope is None else palm.finetune_parameters(scope)
