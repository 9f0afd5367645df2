"""The reference's names for PPO."""

from __future__ import annotations

from functools import partial
from typing import Any

from palm_rlhf_pytorch.actor_critic import ActorCritic, PPOActionCriticReturn
from palm_rlhf_pytorch.algorithms.ppo import PPO, PPOOptions
from palm_rlhf_pytorch.deprecation import moved
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss

__all__ = ["PPO", "ActorCritic", "PPOActionCriticReturn", "PPOOptions", "RLHFTrainer"]


class RLHFTrainer(KeywordTrainer):
    """PPO on a PaLM. These keywords and those of `KeywordTrainer`; critic_eps (Adam), gamma and gae_lambda are ours,
    and critic_optim's other keywords are the actor's.
    """

    def __init__(
        self,
        *,
        palm: PaLM,
        critic: PaLM | ImplicitPRM | None = None,
        actor_critic: ActorCritic | None = None,
        critic_lr: float = 1e-4,
        critic_wd: float = 0.0,
        critic_lora: bool = True,
        critic_lora_r: int = 8,
        critic_pooled_values: bool = True,
        critic_dropout: float = 0.0,
        eps_clip: float = 0.2,
        value_clip: float = 0.4,
        beta_s: float = 0.01,
        kl_div_loss_weight: float = 0.1,
        critic_num_pred_bins: int = 6,
        hl_gauss_loss_kwargs: dict[str, Any] | None = None,
        critic_palm: PaLM | None = None,
        critic_adam_eps: float | None = None,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        critic_eps: float = 1e-8,
        **shared: Any,
    ):
        critic = moved("critic_palm", critic_palm, "critic", critic)
        critic_eps = moved("critic_adam_eps", critic_adam_eps, "critic_eps", critic_eps)
        make_actor = partial(
            ActorCritic,
            critic=critic,
            pooled_values=critic_pooled_values,
            critic_lora=critic_lora,
            critic_lora_r=critic_lora_r,
            critic_dropout=critic_dropout,
            critic_dim_out=critic_num_pred_bins,
        )
        if actor_critic is not None:

            def make_actor(palm: PaLM, **_: Any) -> ActorCritic:
                return actor_critic

            critic_num_pred_bins = actor_critic.value_dim
        elif isinstance(critic, ImplicitPRM):
            critic_num_pred_bins = 1
        bins = critic_num_pred_bins
        algorithm = PPO(
            ClippedRegression(value_clip) if bins == 1 else HLGauss(bins, **(hl_gauss_loss_kwargs or {})),
            own_optim={"lr": critic_lr, "weight_decay": critic_wd, "eps": critic_eps},
            eps_clip=eps_clip,
            entropy=beta_s,
            kl=kl_div_loss_weight,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        super().__init__(algorithm, palm=palm, make_actor=make_actor, **shared)
