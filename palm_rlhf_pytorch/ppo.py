"""Proximal policy optimisation (Schulman et al., 1707.06347) as used for RLHF (Ziegler et al., 1909.08593)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from palm_rlhf_pytorch.actor_critic import ActorCritic, PolicyOutput, PPOActionCriticReturn
from palm_rlhf_pytorch.deprecation import moved
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.extras import require
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
from palm_rlhf_pytorch.ops import masked_mean, whiten
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.rollout import Reward
from palm_rlhf_pytorch.trainer import LearnOptions, OnPolicyTrainer
from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss

__all__ = ["PPO", "ActorCritic", "PPOActionCriticReturn", "PPOOptions", "RLHFTrainer"]


@dataclass(frozen=True)
class PPOOptions:
    """PPO's own numbers. kl_div_loss_weight is the beta of the per-token KL penalty in the reward."""

    eps_clip: float = 0.2
    beta_s: float = 0.01  # entropy bonus
    kl_div_loss_weight: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True


def token_rewards(experience: Experience, beta: float) -> Tensor:
    """r_t = -beta (log p - log p_ref) + [t is the response's last token] score -> (b, n)."""
    places = torch.arange(experience.sequence.shape[1], device=experience.sequence.device)
    last = places == (places * experience.response_mask).amax(dim=-1, keepdim=True)
    rewards = last * experience.scores[:, None]
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


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, eps: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) by token. 1707.06347, eq. 7."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - eps, 1 + eps))


class PPO(nn.Module):
    """Clipped policy gradient, generalised advantages, a critic, an entropy bonus."""

    samples_per_prompt = 1

    def __init__(
        self,
        options: PPOOptions,
        value_loss: ClippedRegression | HLGauss,
        actor_optim: dict[str, Any] | None = None,
        critic_optim: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.options, self.value_loss = options, value_loss
        self.actor_optim, self.critic_optim = actor_optim or {}, critic_optim or {}

    @property
    def needs_reference(self) -> bool:
        return self.options.kl_div_loss_weight != 0

    def parameter_groups(self, actor_critic: ActorCritic) -> list[dict[str, Any]]:
        actor, critic = actor_critic.actor_parameters(), actor_critic.critic_parameters()
        return [
            {"name": "actor", "params": actor, **self.actor_optim},
            {"name": "critic", "params": critic, **self.critic_optim},
        ]

    def prefix_values(self, actor_critic: ActorCritic, experience: Experience) -> Tensor:
        """The head's output for the prefix before each token, (b, n) or (b, n, bins): V_t never sees token t."""
        values = actor_critic.values(experience.sequence, experience.response_mask)
        return values.roll(1, dims=1)  # what lands at 0 is never in a response

    def judge(self, actor_critic: ActorCritic, experience: Experience) -> Experience:
        values = self.value_loss.decode(self.prefix_values(actor_critic, experience)).float()
        return replace(experience, values=values.masked_fill(~experience.response_mask, 0.0))

    @torch.no_grad()
    def target(self, experience: Experience) -> Experience:
        """Advantages and returns; returns are made before advantages are whitened over the whole batch."""
        options, mask = self.options, experience.response_mask
        rewards = token_rewards(experience, options.kl_div_loss_weight)
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

    def loss(
        self, actor_critic: ActorCritic, policy: PolicyOutput, experience: Experience
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, eps = experience.response_mask, self.options.eps_clip
        log_ratio = policy.log_probs - experience.log_probs
        policy_loss = masked_mean(clipped_policy_loss(log_ratio, experience.advantages, eps), mask, dim=None)
        entropy = masked_mean(policy.entropy, mask, dim=None)
        loss = policy_loss - self.options.beta_s * entropy

        with torch.no_grad():
            ratio = log_ratio.exp()
            numbers = {
                "policy_loss": policy_loss,
                "entropy": entropy,
                "clip_fraction": masked_mean(((ratio - 1).abs() > eps).float(), mask, dim=None),
                # E[rho - 1 - log rho], the k3 estimate of KL(old || new): never negative
                "approx_kl": masked_mean(ratio - 1 - log_ratio, mask, dim=None),
            }
        return loss, {name: value.detach() for name, value in numbers.items()}

    def critic_loss(self, actor_critic: ActorCritic, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        mask = experience.response_mask
        predicted = self.prefix_values(actor_critic, experience)[mask]
        loss = self.value_loss(predicted, experience.values[mask], experience.returns[mask]).mean()
        return loss, {"value_loss": loss.detach()}


class RLHFTrainer(OnPolicyTrainer):
    """PPO on a PaLM with a reward: a `RewardModel`, or any function (prompts, responses) -> scores.

    The keywords up to `hl_gauss_loss_kwargs` are the reference's. Beyond it: gamma and gae_lambda; actor_eps and
    critic_eps (Adam); optimizer_class; micro_batch_size (sequences computed at once); normalize_reward and
    missing_eos_penalty; kl_stop; reward_over ('text' or 'tokens'); seed; metrics_path (a metrics.jsonl).
    """

    def __init__(
        self,
        *,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        prompt_token_ids: Tensor | None = None,
        tokenizer: Any = None,
        palm: PaLM,
        reward_model: Reward,
        critic: PaLM | ImplicitPRM | None = None,
        actor_critic: ActorCritic | None = None,
        actor_lr: float = 1e-4,
        critic_lr: float = 1e-4,
        actor_wd: float = 0.0,
        critic_wd: float = 0.0,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        critic_pooled_values: bool = True,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_norm: float | None = None,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        beta_s: float = 0.01,
        pad_value: int | float = 0,
        minibatch_size: int = 16,
        epochs: int = 1,
        kl_div_loss_weight: float = 0.1,
        accelerate_kwargs: dict[str, Any] | None = None,
        critic_num_pred_bins: int = 6,
        hl_gauss_loss_kwargs: dict[str, Any] | None = None,
        critic_palm: PaLM | None = None,
        actor_adam_eps: float | None = None,
        critic_adam_eps: float | None = None,
        use_lion: bool | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        actor_eps: float = 1e-8,
        critic_eps: float = 1e-8,
        optimizer_class: Callable[..., Optimizer] = AdamW,
        micro_batch_size: int | None = None,
        normalize_reward: bool = False,
        missing_eos_penalty: float = 0.0,
        kl_stop: float | None = None,
        reward_over: str | None = None,
        seed: int | None = None,
        metrics_path: str | Path | None = None,
    ):
        critic = moved("critic_palm", critic_palm, "critic", critic)
        actor_eps = moved("actor_adam_eps", actor_adam_eps, "actor_eps", actor_eps)
        critic_eps = moved("critic_adam_eps", critic_adam_eps, "critic_eps", critic_eps)
        if moved("use_lion", use_lion, "optimizer_class"):
            optimizer_class = require("lion_pytorch", "lion").Lion
        if actor_critic is None:
            actor_critic = ActorCritic(
                palm,
                critic,
                pooled_values=critic_pooled_values,
                actor_lora=actor_lora,
                critic_lora=critic_lora,
                actor_lora_r=actor_lora_r,
                critic_lora_r=critic_lora_r,
                actor_dropout=actor_dropout,
                critic_dropout=critic_dropout,
                critic_dim_out=critic_num_pred_bins,
            )
        bins = actor_critic.value_dim
        value_loss = ClippedRegression(value_clip) if bins == 1 else HLGauss(bins, **(hl_gauss_loss_kwargs or {}))
        algorithm = PPO(
            PPOOptions(eps_clip, beta_s, kl_div_loss_weight, gamma, gae_lambda),
            value_loss,
            accepted(optimizer_class, lr=actor_lr, weight_decay=actor_wd, betas=betas, eps=actor_eps),
            accepted(optimizer_class, lr=critic_lr, weight_decay=critic_wd, betas=betas, eps=critic_eps),
        )
        super().__init__(
            actor_critic,
            algorithm,
            reward_model,
            Prompts.gather(prompts, prompts_path, prompt_token_ids, tokenizer, int(pad_value)),
            tokenizer=tokenizer,
            reward_over=reward_over,
            learn_options=LearnOptions(minibatch_size, micro_batch_size, epochs, max_norm, normalize_reward, kl_stop),
            missing_eos_penalty=missing_eos_penalty,
            optimizer_class=optimizer_class,
            seed=seed,
            metrics_path=metrics_path,
            accelerate_kwargs=accelerate_kwargs,
        )


def accepted(optimizer_class: Callable[..., Optimizer], **keywords: Any) -> dict[str, Any]:
    """The keywords that an optimiser knows (Lion has no eps)."""
    known = inspect.signature(optimizer_class).parameters
    return {name: value for name, value in keywords.items() if name in known}
