"""Score centering: what the sampler's choice of tokens adds on average is taken out (Marek & Ryabinin, 2609.20807,
appendix A; `centering.centre` has the formula and its number).

With A the same for all tokens, steps on samples of another distribution q would still move the policy p, by
sum_v q_v grad log p_v; taken off every token's score, only what the advantages say is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.actor import Actor, PolicyOutput
from palm_rlhf_pytorch.algorithms.centering import Weight, centres, probs
from palm_rlhf_pytorch.algorithms.groups import GroupPolicyGradient, SampleOptions, centred
from palm_rlhf_pytorch.algorithms.policy_gradient import MeanOptions, PenaltyOptions
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import scatter_to_mask
from palm_rlhf_pytorch.vocabulary import all_log_probs, chunks


@dataclass(frozen=True)
class ScoreCenteringOptions(SampleOptions, PenaltyOptions, MeanOptions):
    """How score centering learns"""

    topk: int | None = option(None, "tokens of the sampler that are centred by (default: the vocabulary)", least=1)


class ScoreCentering(GroupPolicyGradient):
    """REINFORCE with centred rewards and centred scores. Nothing is clipped: `weight_fn` bounds ratios where it is to.
    Kept of the sampler are its `topk` at each token, or the embedding that its distribution is made of; a whole
    distribution is there for a chunk's time only.
    """

    Options = ScoreCenteringOptions
    defaults = {"normalization": "token"}
    advantage = staticmethod(centred)
    clips = False

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
        log_q = places.embeds.new_empty(len(places.embeds), k, dtype=torch.float32)
        ids = torch.empty_like(log_q, dtype=torch.long)
        for e, *found in chunks(places.weight, places.embeds, log_q, ids):
            torch.topk(all_log_probs(e, places.weight, places.scale), k, out=found)
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
