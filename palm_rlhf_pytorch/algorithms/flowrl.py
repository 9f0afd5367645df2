"""FlowRL: each answer as often as its reward deserves, not only the best (Zhu et al., 2509.15207)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.actor import Actor, PolicyOutput
from palm_rlhf_pytorch.algorithm import Algorithm, Losses, less_entropy
from palm_rlhf_pytorch.algorithms.groups import standardised
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import from_groups, masked_mean, to_groups
from palm_rlhf_pytorch.palm import PaLM


@dataclass(frozen=True)
class FlowRLOptions:
    """How FlowRL learns"""

    samples_per_prompt: int = option(8, "answers to each prompt", least=2)
    beta: float = option(15.0, "how sharply the target follows rewards", least=0)
    eps_clip: float = option(0.2, "clip range of a response's importance weight", least=0)
    entropy: float = option(0.0, "weight of the entropy bonus")
    z_hidden: int = option(768, "width of the partition function", least=1)


class PartitionFunction(nn.Module):
    """log Z of a prompt from the mean of its final embeddings (..., dim) -> (...). It starts at 0."""

    def __init__(self, hidden_dim: int = 768, num_layers: int = 3, dim: int | None = None):
        super().__init__()
        widths = [dim or hidden_dim, *[hidden_dim] * (num_layers - 1)]
        hidden = [
            part
            for a, b in zip(widths, widths[1:], strict=False)
            for part in (nn.LayerNorm(a), nn.Linear(a, b), nn.GELU())
        ]
        last = nn.Linear(widths[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, prompt_embeddings: Tensor) -> Tensor:
        return self.layers(prompt_embeddings).squeeze(-1)


class FlowRL(Algorithm):
    """w (log Z(x) + l - beta R - l_ref)^2, l the mean log-prob of a response's tokens, R its score in its group's
    standard deviations: eq. 6; w the response's clipped ratio to the policy that sampled it, without gradient: eq. 7.
    """

    Options = FlowRLOptions
    normalization = "sequence"
    needs_reference = True

    def __init__(
        self,
        dim: int,
        actor_optim: dict[str, Any] | None = None,
        own_optim: dict[str, Any] | None = None,
        **options: Any,
    ):
        """dim: the policy's width."""
        super().__init__(actor_optim, own_optim, **options)
        self.partition_function = PartitionFunction(self.options.z_hidden, dim=dim)

    @classmethod
    def for_policy(cls, palm: PaLM, **options: Any) -> FlowRL:
        return cls(palm.dim, **options)

    def judge(self, actor: Actor, experience: Experience, temperature: float = 1.0) -> Experience:
        """The mean of each prompt's final embeddings, (b, 1, d). Log Z learns, and what it reads does not."""
        n = int(experience.prompt_mask.sum(dim=-1).amax())
        prompts = experience.sequence[:, :n]
        embeds = actor.actor_palm(prompts, return_only_embedding=True, finetune_scope=actor.actor_lora_scope)
        means = masked_mean(embeds.float(), experience.prompt_mask[:, :n], dim=1, keepdim=True)
        return experience.with_extra(prompt_state=means)

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        rewards = to_groups(experience.total_scores, experience.group_ids)
        normed = from_groups(standardised(rewards, 1e-6), experience.group_ids)
        return experience.with_extra(flow_reward=normed)

    def loss(self, policy: PolicyOutput, experience: Experience) -> Losses:
        mask, eps = experience.response_mask, self.options.eps_clip
        log_probs, ref_log_probs = (masked_mean(t, mask) for t in (policy.log_probs, experience.ref_log_probs))
        log_z = self.partition_function(experience.extra["prompt_state"].squeeze(1))
        residual = log_z + log_probs - self.options.beta * experience.extra["flow_reward"] - ref_log_probs
        ratio = (policy.log_probs.detach() - experience.log_probs).sum(dim=-1).exp()
        policy_loss = ratio.clamp(1 - eps, 1 + eps) * residual**2
        numbers = {"policy_loss": policy_loss, "log_z": log_z, "entropy": policy.entropy}
        return less_entropy(policy_loss, policy, self.options.entropy), numbers
