"""What a sampler's choice of tokens adds to a score on average, over the vocabulary or its likeliest tokens.

Marek & Ryabinin, "Score Centering Stabilizes Off-policy Reinforcement Learning", 2609.20807, appendix A. Whole
distributions are there for a chunk's time only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palm_rlhf_pytorch.actor import Predictions
from palm_rlhf_pytorch.vocabulary import all_log_probs, chunks

Weight = Callable[[Tensor], Tensor]  # f(p / q): 1 for none, min(r, 2) for truncated importance sampling, ...


def centre(log_probs: Tensor, q: Tensor, weight: Weight, ids: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """sum_v c_v log p_v, whose gradient is the sampler's expected score: log_probs (..., v) -> (...).

    q (..., v), or with ids (..., k) the sampler's most likely tokens (..., k): the rest of q is taken to be the rest of
    p, scaled. c_v = q_v f(p_v / q_v) has no gradient; of a kept token it is q_v f(p_v / q_v) - a f(1 / a) p_v, a the
    rest of q over the rest of p: 2609.20807, appendix A, eq. 12 by the number that public code gives it (miles,
    score_centering/importance_sampling.py; the paper was not at hand). The clamp by `eps` is ours.
    """
    head = log_probs if ids is None else log_probs.gather(-1, ids)
    p = head.detach().exp()
    c = q * weight(p / q.clamp(min=eps))
    if ids is not None and ids.shape[-1] < log_probs.shape[-1]:
        rest_q, rest_p = ((1 - t.sum(dim=-1, keepdim=True)).clamp(min=eps) for t in (q, p))
        c = c - (rest_q / rest_p) * weight(rest_p / rest_q) * p
    return (c * head).sum(dim=-1)


def score_centering_loss(
    train_log_probs: Tensor,
    samp_probs: Tensor,
    actions: Tensor,
    advantages: Tensor,
    topk: int | None = None,
    weight_fn: Weight = torch.ones_like,
    eps: float = 1e-6,
) -> Tensor:
    """-A (f(p / q) log p - sum_v c_v log p_v) by token (b, n): the reference's function, over whole distributions,
    unnumbered there. 2609.20807: reward times centred score, where `centre` says.

    train_log_probs (b, n, v), samp_probs (b, n, v) of what the sampler drew from, actions (b, n) what it drew,
    advantages (b,) or (b, n).
    """
    q, ids = samp_probs.detach(), None
    log_p, q_of = (t.gather(-1, actions[..., None]).squeeze(-1) for t in (train_log_probs, q))
    if topk is not None and topk < q.shape[-1]:
        q, ids = q.topk(topk, dim=-1)
    weight = weight_fn(log_p.detach().exp() / q_of.clamp(min=eps))
    score = weight * log_p - centre(train_log_probs, q, weight_fn, ids, eps)
    return -(advantages if advantages.ndim == 2 else advantages[:, None]) * score


@torch.no_grad()
def probs(embeds: Tensor, vocabulary: Tensor, scale: float) -> Tensor:
    return all_log_probs(embeds, vocabulary, scale).exp()


def centres(places: Predictions, weight_fn: Weight, distribution: Callable[..., tuple], *sampler: Tensor) -> Tensor:
    """`centre` at each place (m,), a chunk at a time, and each made anew for its backward pass. `distribution` turns a
    chunk's rows of `sampler` into q and ids.
    """

    def chunk(embeds: Tensor, vocabulary: Tensor, *rows: Tensor) -> Tensor:
        q, ids = distribution(*rows)
        return centre(all_log_probs(embeds, vocabulary, places.scale), q, weight_fn, ids)

    parts = chunks(places.weight, places.embeds, *sampler)
    return torch.cat([checkpoint(chunk, e, places.weight, *rows, use_reentrant=False) for e, *rows in parts])
