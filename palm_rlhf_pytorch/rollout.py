"""Prompts in, scored experience out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch import generation
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.ops import groups_of_like_length
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
    max_batch: int | None = None  # sequences sampled at once
    rows_at_once: int | None = None  # judged at once: as many tokens as this many of the longest sequences have
    reference: bool = True  # whether log-probs of the starting policy are wanted


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

    def __call__(
        self, answers: Experience | generation.Generation, max_tokens: int | None = None, max_batch: int | None = None
    ) -> Tensor:
        """-> scores (b,) float32 on the sequence's device, all finite. A reward model reads at most max_tokens at
        once, a function gets at most max_batch responses.
        """
        batch = answers.sequence.shape[0]
        if isinstance(self.reward, RewardModel):
            groups = groups_of_like_length(answers.mask.sum(dim=-1), max_tokens)
            scores = torch.cat([self._rate(answers, rows) for rows in groups])
            return self._checked(scores, batch, answers.sequence.device)[torch.cat(groups).argsort()]
        prompts, responses = (self._pieces(answers, mask) for mask in (answers.prompt_mask, answers.response_mask))
        size = max_batch or batch
        parts = [
            self._checked(self.reward(prompts[i : i + size], responses[i : i + size]), len(prompts[i : i + size]))
            for i in range(0, batch, size)
        ]
        return torch.cat(parts).to(answers.sequence.device)

    def _rate(self, answers: Experience | generation.Generation, rows: Tensor) -> Tensor:
        """The reward model's scores of some rows."""
        own, n = next(self.reward.parameters()).device, int(answers.mask[rows].sum(dim=-1).amax())
        inputs = (answers.sequence, answers.prompt_mask, answers.mask)
        return self.reward.score(*(t[rows, :n].to(own) for t in inputs))

    def _checked(self, scores: Any, batch: int, device: torch.device | None = None) -> Tensor:
        """What a reward returned, as a tensor (batch,), or refused."""
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

    def _pieces(self, answers: Experience | generation.Generation, mask: Tensor) -> list:
        ids = [row[keep] for row, keep in zip(answers.sequence, mask, strict=True)]
        return [self.tokenizer.decode(row.tolist()) for row in ids] if self.over == "text" else ids


@torch.no_grad()
def roll_out(
    actor_critic: Actor,
    scorer: Scorer,
    prompts: Tensor,
    lengths: Tensor,
    group_ids: Tensor,
    options: RolloutOptions,
    generator: torch.Generator | None = None,
    judge: Callable[[Experience], Experience] = lambda experience: experience,
    on_ended: Callable[[int], None] | None = None,
) -> Experience:
    """Answer prompts (b, n) of lengths (b,), `max_batch` at once, score the answers, and judge every token.

    Samples from softmax(logits / temperature), unfiltered: the distribution that the log-probs are of, so those of
    sampling are kept. In reduced precision they are computed again, as learning will: rounding differs from one
    token at a time to all at once.
    """
    actor_critic.eval()
    palm = actor_critic.actor_palm
    exact = palm.token_emb.weight.dtype == torch.float32 and not torch.is_autocast_enabled(palm.device.type)
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
            return_log_probs=exact,
            max_batch=options.max_batch,
            on_ended=on_ended,
        )
    finished = ends_with_eos(generated.sequence, generated.mask, options.eos_token)

    def with_log_probs(part: Experience) -> Experience:
        judged = (part.sequence, part.response_mask, options.temperature)
        if not exact:
            part = replace(part, log_probs=actor_critic.log_probs(*judged).log_probs)
        if options.reference:
            part = replace(part, ref_log_probs=actor_critic.reference_log_probs(*judged))
        return judge(part)

    experience = Experience(
        sequence=generated.sequence,
        prompt_mask=generated.prompt_mask,
        response_mask=generated.response_mask,
        log_probs=generated.log_probs if exact else torch.zeros_like(generated.sequence, dtype=torch.float32),
        scores=torch.zeros(len(prompts), device=prompts.device),
        finished=finished,
        group_ids=group_ids,
    )
    tokens = None if options.rows_at_once is None else options.rows_at_once * experience.sequence.shape[1]
    experience = experience.by_length(with_log_probs, tokens)
    scores = scorer(experience, tokens, options.max_batch)
    return replace(experience, scores=scores - options.missing_eos_penalty * ~finished)


def ends_with_eos(sequence: Tensor, mask: Tensor, eos_token: int | tuple[int, ...] | None) -> Tensor:
    """Whether the last real token of each row (b, n) is an EOS -> (b,) bool."""
    eos = generation.eos_tensor(eos_token, sequence.device)
    if eos is None:
        return torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    last = sequence.gather(-1, mask.sum(dim=-1, keepdim=True) - 1).squeeze(-1)
    return torch.isin(last, eos)
