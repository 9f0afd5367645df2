"""The clipped policy gradient that PPO, GRPO and their kin share: they differ in how they come by advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch.actor import PolicyOutput
from palm_rlhf_pytorch.algorithm import Algorithm, Losses, less_entropy
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import k3


@dataclass(frozen=True)
class PenaltyOptions:
    """How far the policy may go"""

    kl: float = option(0.0, "weight of the KL to the starting policy", least=0)
    kl_in: str = option(
        "loss",
        "where it counts: k3 in the loss (reinforce_pp_baseline: k2), or k1 in the reward",
        choices=("loss", "reward"),
    )
    entropy: float = option(0.0, "weight of the entropy bonus")
    entropy_advantage: float = option(0.0, "entropy's weight in advantages (the paper: 0.4, for PPO 0.1)", least=0)
    entropy_kappa: float = option(2.0, "entropy adds at most the advantage's size over this", least=1)


@dataclass(frozen=True)
class ClipOptions:
    """How far one batch may move it"""

    eps_clip: float = option(0.2, "clip range of the policy ratio", least=0)
    eps_clip_high: float | None = option(None, "clip range above 1, where it is another (DAPO)", least=0)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Below and above 1."""
        return self.eps_clip, self.eps_clip if self.eps_clip_high is None else self.eps_clip_high


@dataclass(frozen=True)
class MeanOptions:
    """What the loss is a mean over"""

    normalization: str = option("sequence", "what counts the same in the loss", choices=("sequence", "token"))


@dataclass(frozen=True)
class PolicyGradientOptions(ClipOptions, PenaltyOptions, MeanOptions):
    """How advantages are learned from"""


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)). PPO, 1707.06347, eq. 7; two ranges: DAPO, 2503.14476, eq. 10."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def of_token(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Every token has a ratio of its own."""
    return log_ratio


def shared(value: Tensor, log_ratio: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The same log-ratio, value (b, 1), at each token, and a gradient of its own, weight * grad log_ratio (b, n).
    Summed over a response this is the gradient of `value` where advantages are the same for all its tokens; where they
    differ, each token keeps its own. GSPO-token, 2507.18071, section 4.3, eq. 13 and 14.
    """
    return value.detach() + weight * (log_ratio - log_ratio.detach())


def entropy_shaped(advantages: Tensor, entropy: Tensor, scale: float, kappa: float) -> Tensor:
    """A + min(scale H, |A| / kappa), H without gradient: uncertain tokens count for more, and no sign turns.
    "Reasoning with Exploration: An Entropy Perspective", 2506.14758, eq. 5 and 6.
    """
    return advantages + torch.minimum(scale * entropy.detach(), advantages.abs() / kappa)


class PolicyGradient(Algorithm):
    """A subclass says by `target` what advantages are. The functions are there to be replaced."""

    Options = PolicyGradientOptions
    surrogate: Callable[[Tensor, Tensor, float, float], Tensor] = staticmethod(clipped)
    clips: bool = True  # whether ratios are clipped, and how often is logged
    log_ratio: Callable[[Tensor, Tensor], Tensor] = staticmethod(of_token)  # (b, n), mask -> (b, n)
    kl_loss: Callable[[Tensor, Tensor], Tensor] = staticmethod(k3)  # log_probs, ref_log_probs -> (b, n)

    @property
    def needs_reference(self) -> bool:
        return self.options.kl != 0

    @property
    def kl_in_reward(self) -> float:
        """The weight of k1 = log p - log p_ref in the reward."""
        return self.options.kl if self.options.kl_in == "reward" else 0.0

    def loss(self, policy: PolicyOutput, experience: Experience) -> Losses:
        options, advantages = self.options, experience.advantages
        if options.entropy_advantage:
            advantages = entropy_shaped(advantages, policy.entropy, options.entropy_advantage, options.entropy_kappa)
        log_ratio = self.log_ratio(policy.log_probs - experience.log_probs, experience.response_mask)
        policy_loss = self.policy_loss(policy, log_ratio, advantages, experience)
        losses = less_entropy(policy_loss, policy, options.entropy)
        numbers = {"policy_loss": policy_loss, "entropy": policy.entropy, **self.out_of_range(log_ratio.detach())}
        if options.kl and options.kl_in == "loss":
            numbers["kl_loss"] = self.kl_loss(policy.log_probs, experience.ref_log_probs)
            losses = losses + options.kl * numbers["kl_loss"]
        return losses, numbers

    def policy_loss(
        self, policy: PolicyOutput, log_ratio: Tensor, advantages: Tensor, experience: Experience
    ) -> Tensor:
        """By token (b, n)."""
        return self.surrogate(log_ratio.exp(), advantages, *self.options.clip_range)

    def out_of_range(self, log_ratio: Tensor) -> dict[str, Tensor]:
        """Where the ratio is clipped, if anything is."""
        if not self.clips:
            return {}
        ratio, (low, high) = log_ratio.exp(), self.options.clip_range
        return {"clip_fraction": ((ratio < 1 - low) | (ratio > 1 + high)).float()}
