"""What each token was worth: rewards laid on tokens, and advantages over a critic's values."""

from __future__ import annotations

import torch
from torch import Tensor

from palm_rlhf_pytorch.experience import Experience


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
