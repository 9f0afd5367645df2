"""Actor and critic on one trunk: the same frozen PaLM under two sets of adapters, and none for the reference."""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf_pytorch.actor import Actor, adapt, made_causal, trained
from palm_rlhf_pytorch.deprecation import moved
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM
from palm_rlhf_pytorch.ops import scatter_to_mask
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.precision import UnroundedLinear
from palm_rlhf_pytorch.utils import eval_decorator


class PPOActionCriticReturn(NamedTuple):
    """actions (b, m); sequence, mask (real tokens), prompt_mask (b, n); action_logits (b, n, v); values."""

    actions: Tensor
    sequence: Tensor
    mask: Tensor
    prompt_mask: Tensor
    action_logits: Tensor
    values: Tensor | None


class ActorCritic(Actor):
    """A policy and its value function.

    With LoRA on both (and no `critic` of its own) they share one frozen trunk, and the starting policy is that trunk
    without adapters. Values have `critic_dim_out` outputs a position: 1 a scalar, more the bins of `HLGauss`.
    pooled_values judges the mean of the embeddings so far instead of the last one. A critic that is an `ImplicitPRM`
    values a prefix by the sum of its rewards (2412.01981, proposition 3.1), a scalar.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        critic: PaLM | ImplicitPRM | None = None,
        pooled_values: bool = False,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        actor_lora_scope: str = "actor",
        critic_lora_scope: str = "critic",
        actor_dropout: int | float = 0.0,
        critic_dropout: int | float = 0.0,
        critic_dim_out: int = 6,
        *,
        critic_palm: PaLM | None = None,
    ):
        critic = moved("critic_palm", critic_palm, "critic", critic, stacklevel=4)  # one frame is beartype's
        made_causal(palm, "policy")
        if critic is None or critic is palm:
            share = actor_lora and critic_lora and actor_dropout == critic_dropout
            critic = palm if share else deepcopy(palm)
        elif isinstance(critic, ImplicitPRM) and (critic.model is palm or critic.ref_model is palm):
            critic = deepcopy(critic)  # it is trained as a whole, and the policy's trunk must not move with it
        implicit = critic if isinstance(critic, ImplicitPRM) else None
        critic_palm = made_causal(critic if implicit is None else critic.model, "critic")
        if critic_palm is palm and actor_lora_scope == critic_lora_scope:
            raise ValueError(f"on one trunk actor and critic need scopes of their own, both are {actor_lora_scope!r}")
        if critic_palm.num_tokens < palm.num_tokens:
            sizes = f"{critic_palm.num_tokens} tokens, the policy {palm.num_tokens}"
            raise ValueError(f"the critic must know the policy's vocabulary, but it has {sizes}")
        super().__init__(palm, actor_lora, actor_lora_r, actor_lora_scope, actor_dropout)

        self.implicit_critic, self.critic_palm = implicit, critic_palm
        self.pooled_values = pooled_values
        critic_lora = critic_lora and self.implicit_critic is None
        self.critic_lora_scope = adapt(self.critic_palm, critic_lora, critic_lora_scope, critic_lora_r)
        self.critic_palm.set_dropout(critic_dropout)

        self.value_dim = 1 if self.implicit_critic is not None else critic_dim_out
        self.value_head = None
        if self.implicit_critic is None:
            self.value_head = UnroundedLinear(self.critic_palm.dim, critic_dim_out)
            nn.init.zeros_(self.value_head.weight)  # every value starts at 0 (or mid-range, in bins)
            nn.init.zeros_(self.value_head.bias)
            self.value_head.to(self.critic_palm.token_emb.weight)  # its device, and its dtype where that is no half

    @property
    def frozen_palms(self) -> set[PaLM]:
        critic = set() if self.critic_lora_scope is None else {self.critic_palm}
        return super().frozen_palms | critic

    def critic_parameters(self) -> list[nn.Parameter]:
        """What training the critic changes, its head included."""
        head = [] if self.value_head is None else list(self.value_head.parameters())
        return [*trained(self.critic_palm, self.critic_lora_scope), *head]

    def values(self, sequence: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Values of the prefixes sequence[:, : t + 1] at [:, t]: (b, n), or (b, n, bins) with several outputs.

        mask (b, n): the positions that pooled values average, or that an implicit critic adds up. A value never
        sees what comes after its position. places (b, n): those whose values are wanted; at others there is 0.
        """
        if self.implicit_critic is not None:
            rewards = F.pad(self.implicit_critic(sequence), (1, 0))
            values = (rewards if mask is None else rewards * mask).cumsum(dim=-1)
            return values if places is None else values.masked_fill(~places, 0.0)
        values = self.value_head(self._judged(sequence, mask, places))
        values = values if places is None else scatter_to_mask(values, places)
        return values.squeeze(-1) if self.value_dim == 1 else values

    def _judged(self, sequence: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
        """What the value head reads off, (b, n, d), or at m places (m, d)."""
        keywords = {"return_only_embedding": True, "finetune_scope": self.critic_lora_scope}
        if not self.pooled_values:
            return self.critic_palm(sequence, places=places, **keywords)
        if places is None:
            return running_mean(self.critic_palm(sequence, **keywords), mask)
        ahead = places.flip(-1).cumsum(dim=-1).flip(-1) > 0  # what a wanted mean is of lies before it
        needed = places | (ahead if mask is None else ahead & mask)
        embeds = scatter_to_mask(self.critic_palm(sequence, places=needed, **keywords), needed)
        return running_mean(embeds, mask)[places]

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_values: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Ids (b, n) -> action logits (b, n, v) and values, both at [:, t] for what follows token t."""
        logits = self.actor_palm(x, finetune_scope=self.actor_lora_scope)
        return logits, self.values(x, mask) if return_values else None

    @torch.no_grad()
    @eval_decorator
    def generate(
        self,
        state: Tensor,
        max_seq_len: int,
        eos_token: int | None = None,
        return_values: bool = False,
        **kwargs,
    ) -> PPOActionCriticReturn:
        """Answer the prompts state (n,) or (b, n) with the policy's own distribution, unless a filter is asked for."""
        kwargs = {"filter_logits_fn": None, "pad_value": 0, **kwargs}
        out = self.actor_palm.generate(
            max_seq_len,
            prompt=state if state.ndim == 2 else state[None],
            eos_token=eos_token,
            finetune_scope=self.actor_lora_scope,
            return_log_probs=True,
            **kwargs,
        )
        logits, values = self(out.sequence, mask=out.response_mask, return_values=return_values)
        actions = out.responses(int(kwargs["pad_value"]))
        return PPOActionCriticReturn(actions, out.sequence, out.mask, out.prompt_mask, logits, values)


def running_mean(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """embeds (b, n, d) -> at each position the mean of those up to it that mask (b, n) holds; itself before any."""
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    count = mask.cumsum(dim=-1)[..., None]
    mean = (embeds.float() * mask[..., None]).cumsum(dim=1) / count.clamp(min=1)
    return torch.where(count > 0, mean.to(embeds.dtype), embeds)
