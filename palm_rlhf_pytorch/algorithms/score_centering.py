"""Score centering: what the sampler's choice of tokens adds on average is taken out (Marek & Ryabinin, 2609.20807).

With A the same for all tokens, steps on samples of another distribution q would still move the policy p, by
sum_v q_v grad log p_v; taken off every token's score, only what the advantages say is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from palm_rlhf_pytorch.actor import Actor, PolicyOutput, Predictions
from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, SampleOptions, centred
from palm_rlhf_pytorch.algorithms.policy_gradient import MeanOptions, PenaltyOptions
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import scatter_to_mask
from palm_rlhf_pytorch.vocabulary import all_log_probs, chunks

Weight = Callable[[Tensor], Tensor]  # f(p / q): 1 for none, min(r, 2) for truncated importance sampling, ...


@dataclass(frozen=True)
class ScoreCenteringOptions(SampleOptions, PenaltyOptions, MeanOptions):
    """How score centering learns"""

    topk: int | None = option(None, "tokens of the sampler that are centred by (default: the vocabulary)", least=1)


def centre(log_probs: Tensor, q: Tensor, weight: Weight, ids: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """sum_v c_v log p_v, whose gradient is the sampler's expected score: log_probs (..., v) -> (...).

    q (..., v), or with ids (..., k) the sampler's most likely tokens (..., k): the rest of q is taken to be the rest of
    p, scaled. c_v = q_v f(p_v / q_v) has no gradient.
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
    """-A (f(p / q) log p - sum_v c_v log p_v) by token (b, n): the reference's function, over whole distributions.

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


class ScoreCentering(GroupPolicyGradient):
    """REINFORCE with centred rewards and centred scores. Kept of the sampler are its `topk` at each token, or the
    embedding that its distribution is made of; a whole distribution is there for a chunk's time only.
    """

    Options = ScoreCenteringOptions
    defaults = {"normalization": "token"}
    advantage = staticmethod(centred)

    def __init__(
        self,
        actor_optim: dict[str, Any] | None = None,
        own_optim: dict[str, Any] | None = None,
        weight_fn: Weight = torch.ones_like,
        **options: Any,
    ):
        super().__init__(actor_optim, own_optim, **options)
        self.weight_fn = weight_fn
        self._vocabulary: Tensor | None = None  # that sampled
        self._learned = False  # since

    def judge(self, actor: Actor, experience: Experience, temperature: float = 1.0) -> Experience:
        mask, k = experience.response_mask, self.options.topk
        places = actor.predictions(experience.sequence, mask, temperature)
        if k is None or k >= len(places.weight):
            self._remember(places.weight)
            return experience.with_extra(sampler_embeds=scatter_to_mask(places.embeds, mask))
        parts = (all_log_probs(e, places.weight, places.scale) for (e,) in chunks(places.weight, places.embeds))
        log_q, ids = (torch.cat(column) for column in zip(*(part.topk(k) for part in parts), strict=True))
        return experience.with_extra(
            sampler_probs=scatter_to_mask(log_q.exp(), mask), sampler_ids=scatter_to_mask(ids, mask)
        )

    def _remember(self, weight: Tensor) -> None:
        """Once a rollout: where the policy is trained as a whole, the vocabulary is too."""
        if self._vocabulary is None or self._learned:
            self._vocabulary = weight.detach().clone() if weight.requires_grad else weight.detach()
            self._learned = False

    def target(self, experience: Experience) -> Experience:
        self._learned = True  # from here on
        return super().target(experience)

    def out_of_range(self, log_ratio: Tensor) -> dict[str, Tensor]:
        """Nothing is clipped."""
        return {}

    def policy_loss(
        self, policy: PolicyOutput, log_ratio: Tensor, advantages: Tensor, experience: Experience
    ) -> Tensor:
        mask, places = experience.response_mask, policy.predictions
        if "sampler_ids" in experience.extra:
            kept = [experience.extra[name][mask] for name in ("sampler_probs", "sampler_ids")]
            means = centres(places, self.weight_fn, lambda q, ids: (q, ids), *kept)
        else:
            embeds = experience.extra["sampler_embeds"][mask]
            means = centres(places, self.weight_fn, lambda e: (probs(e, self._vocabulary, places.scale), None), embeds)
        weight = self.weight_fn(log_ratio.detach().exp())
        return -advantages * (weight * policy.log_probs - scatter_to_mask(means, mask))
