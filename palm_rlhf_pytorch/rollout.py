"""Prompts in, scored experience out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch import generation
from palm_rlhf_pytorch.actor_critic import ActorCritic
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.reward import RewardModel

Reward = RewardModel | Callable[[list, list], Any]


@dataclass(frozen=True)
class RolloutOptions:
    """How answers are drawn. eos_token: an id, several, or None; max_seq_len counts prompt and response."""

    max_seq_len: int = 2048
    eos_token: int | tuple[int, ...] | None = None
    temperature: float = 1.0
    pad_value: int = 0
    missing_eos_penalty: float = 0.0  # taken from the score of an unfinished response


class Scorer:
    """Turns any reward into a function of a `Generation`.

    A RewardModel scores response tokens. A callable gets (prompts, responses): lists of text where `tokenizer` has a
    `decode` and `over` is not 'tokens', else lists of 1-D id tensors; it returns one number for each.
    """

    def __init__(self, reward: Reward, tokenizer: Any = None, over: str | None = None):
        if not callable(reward):
            raise TypeError(f"the reward must be a RewardModel or a function, got {type(reward).__name__}")
        can_decode = hasattr(tokenizer, "decode")
        over = ("text" if can_decode else "tokens") if over is None else over
        if over not in ("text", "tokens"):
            raise ValueError(f"reward_over is 'text', 'tokens' or None to choose, got {over!r}")
        if over == "text" and not can_decode:
            raise ValueError("a reward over text needs a tokenizer with a decode method")
        self.reward, self.tokenizer, self.over = reward, tokenizer, over

    def check(self, num_tokens: int) -> None:
        """Refuse a reward model that does not know all of the policy's tokens."""
        if isinstance(self.reward, RewardModel) and self.reward.palm.num_tokens < num_tokens:
            known = self.reward.palm.num_tokens
            raise ValueError(f"the reward model knows {known} tokens, but the policy writes {num_tokens}")

    def __call__(self, generated: generation.Generation) -> Tensor:
        """-> scores (b,) float32 on the sequence's device, all finite."""
        device, batch = generated.sequence.device, generated.sequence.shape[0]
        if isinstance(self.reward, RewardModel):
            own = next(self.reward.parameters()).device
            inputs = (generated.sequence, generated.prompt_mask, generated.mask)
            scores = self.reward.score(*(t.to(own) for t in inputs))
        else:
            scores = self.reward(
                self._pieces(generated, generated.prompt_mask),
                self._pieces(generated, generated.response_mask),
            )
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32, device=device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(scores).__name__
            raise TypeError(f"the reward must return one number for each of {batch} responses, got a {kind}") from error
        if scores.shape != (batch,):
            raise ValueError(
                f"the reward must return one number for each of {batch} responses, got shape {tuple(scores.shape)}"
            )
        if not scores.isfinite().all():
            raise ValueError("the reward returned a value that is not finite (NaN or infinite)")
        return scores

    def _pieces(self, generated: generation.Generation, mask: Tensor) -> list:
        ids = [row[keep] for row, keep in zip(generated.sequence, mask, strict=True)]
        return [self.tokenizer.decode(row.tolist()) for row in ids] if self.over == "text" else ids


@torch.no_grad()
def roll_out(
    actor_critic: ActorCritic,
    scorer: Scorer,
    prompts: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    options: RolloutOptions,
    generator: torch.Generator | None = None,
) -> Experience:
    """Answer prompts (b, n) of lengths (b,) together, score the answers, and judge every token.

    Samples from softmax(logits / temperature), unfiltered: the distribution that the log-probs are of.
    """
    actor_critic.eval()
    palm = actor_critic.actor_palm
    with palm.merged(actor_critic.actor_lora_scope):
        generated = generation.generate(
            palm,
            prompts,
            lengths,
            options.max_seq_len,
            generation.Sampling(options.temperature),
            options.pad_value,
            eos_token=options.eos_token,
            generator=generator,
        )
    sequence, response_mask = generated.sequence, generated.response_mask
    finished = ends_with_eos(sequence, generated.mask, options.eos_token)
    judged = (sequence, response_mask, options.temperature)
    return Experience(
        sequence=sequence,
        prompt_mask=generated.prompt_mask,
        response_mask=response_mask,
        log_probs=actor_critic.log_probs(*judged).log_probs,
        ref_log_probs=actor_critic.reference_log_probs(*judged),
        scores=scorer(generated) - options.missing_eos_penalty * ~finished,
        finished=finished,
        group_ids=group_ids,
    )


def ends_with_eos(sequence: Tensor, mask: Tensor, eos_token: int | tuple[int, ...] | None) -> Tensor:
    """Whether the last real token of each row (b, n) is an EOS -> (b,) bool."""
    eos = generation.eos_tensor(eos_token, sequence.device)
    if eos is None:
        return torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    last = sequence.gather(-1, mask.sum(dim=-1, keepdim=True) - 1).squeeze(-1)
    return torch.isin(last, eos)
