"""Implicit process reward: a language model's log-likelihood ratio is a reward for every token.

Yuan et al., "Free Process Rewards without Process Labels", 2412.01981.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.ops import has_token_after_padding, scatter_to_mask
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.vocabulary import linear_log_probs


def outcome_loss(totals: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of sigmoid(totals), both (b,), labels in {0, 1}: 2412.01981, eq. 5, with the minus it lacks."""
    return F.binary_cross_entropy_with_logits(totals, labels.to(totals.dtype))


class ImplicitPRM(nn.Module):
    """r_t = beta (log p_model(y_t) - log p_ref(y_t)), eq. 3. Without `ref_model` a frozen copy of `model` is kept."""

    def __init__(self, model: PaLM, ref_model: PaLM | None = None, beta: float = 0.1):
        super().__init__()
        if not model.causal or (ref_model is not None and not ref_model.causal):
            raise ValueError("an implicit reward is a likelihood ratio and needs causal models, got an encoder")
        self.model = model
        self.ref_model = deepcopy(model) if ref_model is None else ref_model
        self.ref_model.requires_grad_(False).eval()
        self.beta = beta

    def train(self, mode: bool = True) -> ImplicitPRM:
        super().train(mode)
        self.ref_model.eval()  # a reference with dropout would be no reference
        return self

    def forward(self, seq: Tensor, labels: Tensor | None = None, prompt_mask: Tensor | None = None) -> Tensor:
        """Ids (b, n), below 0 padding -> rewards (b, n - 1), those of seq[:, 1:], 0 at padding.

        With labels (b,) in {0, 1} the loss instead: binary cross-entropy of sigmoid(sum of the response's rewards),
        eq. 5. prompt_mask (b, n) says which tokens are no response (None: the first token only).
        """
        if labels is None:
            return self.beta * (self._log_probs(self.model, seq) - self._reference(seq))
        return outcome_loss(self.totals(seq, prompt_mask), labels)

    def totals(self, seq: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """The sum (b,) of each response's rewards: the logit of its being right."""
        rewards = self(seq)
        return (rewards if prompt_mask is None else rewards.masked_fill(prompt_mask[:, 1:], 0.0)).sum(dim=-1)

    def _log_probs(self, palm: PaLM, seq: Tensor) -> Tensor:
        real = seq >= 0
        valid = real[:, 1:] & real[:, :-1]
        mask = real if has_token_after_padding(real) else None
        embeds = palm(seq, mask=mask, return_only_embedding=True, places=F.pad(valid, (0, 1)))
        log_probs, _ = linear_log_probs(embeds, palm.to_logits.weight, seq[:, 1:][valid], palm.logit_scale)
        return scatter_to_mask(log_probs, valid)

    @torch.no_grad()
    def _reference(self, seq: Tensor) -> Tensor:
        return self._log_probs(self.ref_model, seq)
