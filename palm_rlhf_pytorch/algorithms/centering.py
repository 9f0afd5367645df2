"""What a sampler's choice of tokens adds to a score on average, over the vocabulary or its likeliest tokens.

Marek & Ryabinin, "Score Centering Stabilizes Off-policy Reinforcement Learning", 2609.20807, appendix A. Whole
distributions are there for a chunk's time only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palm_rlhf_pytorch.actor import Predictions
from palm_rlhf_pytorch.vocabulary import Gradients, all_log_probs, as_multiplied, chunk_log_probs, chunks, results

Weight = Callable[[Tensor], Tensor]  # f(p / q): 1 for none, min(r, 2) for truncated importance sampling, ...


def coefficients(
    log_probs: Tensor, q: Tensor, weight: Weight, ids: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """c_v, without gradient, and the log p_v that it belongs to: log_probs (..., v) -> (..., v), or with ids (..., k)
    both (..., k).

    q (..., v), or with ids the sampler's most likely tokens (..., k): the rest of q is taken to be the rest of p,
    scaled. c_v = q_v f(p_v / q_v); of a kept token it is q_v f(p_v / q_v) - a f(1 / a) p_v, a the rest of q over the
    rest of p: 2609.20807, appendix A, eq. 12 by the number that public code gives it (miles,
    score_centering/importance_sampling.py; the paper was not at hand). The clamp by `eps` is ours.
    """
    head = log_probs if ids is None else log_probs.gather(-1, ids)
    p = head.detach().exp()
    c = q * weight(p / q.clamp(min=eps))
    if ids is not None and ids.shape[-1] < log_probs.shape[-1]:
        rest_q, rest_p = ((1 - t.sum(dim=-1, keepdim=True)).clamp(min=eps) for t in (q, p))
        c = c - (rest_q / rest_p) * weight(rest_p / rest_q) * p
    return c, head


def centre(log_probs: Tensor, q: Tensor, weight: Weight, ids: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """sum_v c_v log p_v (...), whose gradient is the sampler's expected score: see `coefficients`."""
    c, head = coefficients(log_probs, q, weight, ids, eps)
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


def probs(embeds: Tensor, vocabulary: Tensor, scale: float) -> Tensor:
    return all_log_probs(embeds, vocabulary, scale).exp_()


class Centres(torch.autograd.Function):
    """`centre` at each place, a chunk at a time, and each made anew for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        embeds: Tensor,
        weight: Tensor,
        scale: float,
        rounded: bool,
        weight_fn: Weight,
        distribution: Callable[..., tuple],
        *sampler: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(embeds, weight, *sampler)
        ctx.scale, ctx.rounded, ctx.weight_fn, ctx.distribution = scale, rounded, weight_fn, distribution
        kind = embeds.device.type
        ctx.precision = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        found = results(embeds[:, 0])
        for to, e, *rows in chunks(weight, found, embeds, *sampler):
            q, ids = distribution(*rows)
            to.copy_(centre(chunk_log_probs(e, weight, scale, rounded), q, weight_fn, ids))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_centre: Tensor) -> tuple[Tensor | None, ...]:
        """By the logits: d/dz_j sum_v c_v log p_v = c_j - p_j sum_v c_v, times scale."""
        embeds, weight, *sampler = ctx.saved_tensors
        gradients = Gradients(embeds, weight, ctx.needs_input_grad[:2])
        with torch.autocast(*ctx.precision):  # as in the forward pass
            for g, e, *rows in chunks(weight, by_centre * ctx.scale, embeds, *sampler):
                q, ids = ctx.distribution(*rows)
                log_probs = chunk_log_probs(e, weight, ctx.scale, ctx.rounded)
                c = (coefficients(log_probs, q, ctx.weight_fn, ids)[0] * g[:, None]).to(log_probs.dtype)
                of_logits = log_probs.exp_().mul_(-c.sum(dim=-1, keepdim=True))
                of_logits = of_logits.add_(c) if ids is None else of_logits.scatter_add_(-1, ids, c)
                gradients.add(of_logits, e, weight)
                del q, ids, c, log_probs, of_logits  # or two chunks would be in memory
        return *gradients.pair(), *[None] * (4 + len(sampler))


def centres(places: Predictions, weight_fn: Weight, distribution: Callable[..., tuple], *sampler: Tensor) -> Tensor:
    """`centre` at each place (m,). `distribution` turns a chunk's rows of `sampler` into q and ids."""
    embeds, weight, rounded = as_multiplied(places.embeds, places.weight)
    return Centres.apply(embeds, weight, places.scale, rounded, weight_fn, distribution, *sampler)
