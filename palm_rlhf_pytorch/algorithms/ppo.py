"""PPO: clipped policy gradient, generalised advantages, a critic.

Schulman et al., 1707.06347; for language models with a KL penalty in the reward, Ziegler et al., 1909.08593.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.algorithm import Losses
from palm_rlhf_pytorch.algorithms.policy_gradient import PolicyGradient, PolicyGradientOptions
from palm_rlhf_pytorch.algorithms.returns import generalized_advantages, token_rewards
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.flags import option
from palm_rlhf_pytorch.ops import scatter_to_mask, whiten
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss, ValueOptions


@dataclass(frozen=True)
class PPOOptions(ValueOptions, PolicyGradientOptions):
    """How PPO learns"""

    gamma: float = option(1.0, "discount", least=0)
    gae_lambda: float = option(0.95, "lambda of the generalised advantages", least=0)
    whiten_advantages: bool = option(True, "scale advantages to mean 0, variance 1 over the whole batch")


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
        """The head's output for the prefix before each response token, (b, n) or (b, n, bins): V_t never sees token t.
        At other tokens it is 0.
        """
        mask = experience.response_mask
        before = F.pad(mask[:, 1:], (0, 1))
        return actor_critic.values(experience.sequence, mask, before).roll(1, dims=1)  # what lands at 0 is 0

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
