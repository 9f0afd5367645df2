"""PPO: clipped policy gradient, generalised advantages, a critic.

Schulman et al., 1707.06347; for language models with a KL penalty in the reward, Ziegler et al., 1909.08593.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.algorithm import Losses
from palm_rlhf_pytorch.algorithms.policy_gradient import PolicyGradient, PolicyGradientOptions
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import scatter_to_mask, whiten
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss


@dataclass(frozen=True)
class PPOOptions(PolicyGradientOptions):
    """How PPO learns"""

    gamma: float = option(1.0, "discount", least=0)
    gae_lambda: float = option(0.95, "lambda of the generalised advantages", least=0)
    whiten_advantages: bool = option(True, "scale advantages to mean 0, variance 1 over the whole batch")
    value_clip: float = option(0.4, "clip range of values, where the critic predicts a number", least=0)
    value_bins: int = option(0, "bins of a histogram (HL-Gauss) that it predicts instead; 0: a number", least=0)
    value_min: float = option(0.0, "value of the first bin")
    value_max: float = option(5.0, "value of the last bin")

    @property
    def value_loss(self) -> ClippedRegression | HLGauss:
        """How the critic learns."""
        if self.value_bins == 0:
            return ClippedRegression(self.value_clip)
        return HLGauss(self.value_bins, self.value_min, self.value_max)


def token_rewards(experience: Experience, beta: float) -> Tensor:
    """r_t = -beta (log p - log p_ref) + [t is the response's last token] score + process reward -> (b, n). Without the
    latter, and summed over a response: Ziegler et al., 1909.08593, eq. 2.
    """
    places = torch.arange(experience.sequence.shape[1], device=experience.sequence.device)
    last = places == (places * experience.response_mask).amax(dim=-1, keepdim=True)
    rewards = last * experience.scores[:, None]
    if experience.token_rewards is not None:
        rewards = rewards + experience.token_rewards
    if beta != 0:
        rewards = rewards - beta * (experience.log_probs - experience.ref_log_probs)
    return rewards.masked_fill(~experience.response_mask, 0.0)


def generalized_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = sum_k (gamma lambda)^k delta_(t+k) over response tokens; all (b, n). 1506.02438, eq. 16."""
    values = values.masked_fill(~mask, 0.0)  # after the end there is nothing to come
    advantages = torch.zeros_like(rewards)
    later = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        # delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lambda A_(t+1)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t], next_value = later, values[:, t]
    return advantages


class PPO(PolicyGradient):
    """The critic is the `ActorCritic`'s; `value_loss` says what its outputs mean and how they are learned, by default
    what the options of its name do.
    """

    Options = PPOOptions
    defaults = {"kl": 0.1, "kl_in": "reward", "normalization": "token"}

    def __init__(
        self,
        value_loss: ClippedRegression | HLGauss | None = None,
        actor_optim: dict[str, Any] | None = None,
        own_optim: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(actor_optim, own_optim, **options)
        self.value_loss = value_loss or self.options.value_loss

    def new_actor(self, palm: PaLM, actor_lora: bool = True, **keywords: Any) -> ActorCritic:
        """With a critic of the same kind as the actor."""
        critic = {"critic_lora": actor_lora, "critic_lora_r": keywords.get("actor_lora_r", 8)}
        bins = self.value_loss.num_bins if isinstance(self.value_loss, HLGauss) else 1
        return ActorCritic(palm, actor_lora=actor_lora, critic_dim_out=bins, **critic, **keywords)

    def parameter_groups(self, actor: ActorCritic) -> list[dict[str, Any]]:
        critic = {"name": "critic", "params": actor.critic_parameters(), **self.own_optim}
        return [*super().parameter_groups(actor), critic]

    def prefix_values(self, actor_critic: ActorCritic, experience: Experience) -> Tensor:
        """The head's output for the prefix before each token, (b, n) or (b, n, bins): V_t never sees token t."""
        values = actor_critic.values(experience.sequence, experience.response_mask)
        return values.roll(1, dims=1)  # what lands at 0 is never in a response

    def judge(self, actor_critic: ActorCritic, experience: Experience, temperature: float = 1.0) -> Experience:
        values = self.value_loss.decode(self.prefix_values(actor_critic, experience)).float()
        return replace(experience, values=values.masked_fill(~experience.response_mask, 0.0))

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        """Advantages and returns; returns are made before advantages are whitened over the whole batch."""
        options, mask = self.options, experience.response_mask
        rewards = token_rewards(experience, self.kl_in_reward)
        advantages = generalized_advantages(rewards, experience.values, mask, options.gamma, options.gae_lambda)
        returns = advantages + experience.values
        self._warn_out_of_range(returns[mask])
        if options.whiten_advantages:
            advantages = whiten(advantages, mask)
        return replace(experience, advantages=advantages, returns=returns)

    def _warn_out_of_range(self, returns: Tensor) -> None:
        if not isinstance(self.value_loss, HLGauss):
            return
        low, high = self.value_loss.min_value, self.value_loss.max_value
        outside = ((returns < low) | (returns > high)).float().mean()
        if outside > 0.5:
            warnings.warn(
                f"{outside:.0%} of returns (from {returns.min():.3g} to {returns.max():.3g}) lie outside the critic's "
                f"bins [{low}, {high}]: set hl_gauss_loss_kwargs' min_value and max_value, or critic_num_pred_bins=1",
                stacklevel=2,
            )

    def critic_loss(self, actor_critic: ActorCritic, experience: Experience) -> Losses:
        mask = experience.response_mask
        predicted = self.prefix_values(actor_critic, experience)[mask]
        losses = self.value_loss(predicted, experience.values[mask], experience.returns[mask])
        losses = scatter_to_mask(losses, mask)
        return losses, {"value_loss": losses}
