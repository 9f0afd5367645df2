"""Prompts in, scored experience out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch import generation
from palm_rlhf_pytorch.actor import Actor
from palm_rlhf_pytorch.experience import Experience
from palm_rlhf_pytorch.ops import groups_of_like_length
from palm_rlhf_pytorch.reward import RewardModel

OneReward = RewardModel | Callable[[list, list], Any]
Reward = OneReward | Mapping[str, OneReward | tuple[OneReward, float]]
REWARD = "reward/"  # begins the names in Experience.extra of what several rewards gave


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
    overlong_buffer: int = 0  # tokens before the limit in which a penalty of length grows; 0: none
    overlong_penalty: float = 1.0  # what it is at the limit

    def __post_init__(self):
        if self.overlong_buffer < 0:
            raise ValueError(f"overlong_buffer is a number of tokens, 0 for no penalty, got {self.overlong_buffer}")

    @property
    def penalises(self) -> bool:
        """Whether anything is taken from a score."""
        return self.missing_eos_penalty != 0 or self.overlong_buffer > 0


class Scorer:
    """Turns any reward into a function of a `Generation`.

    A RewardModel scores response tokens. A callable gets (prompts, responses): lists of text where `tokenizer` has a
    `decode` and `over` is not 'tokens', else lists of 1-D id tensors; it returns one number for each. Several by name,
    {name: reward} or {name: (reward, weight)}, add up, each times its weight; `over` may then be one for all, or
    {name: 'text' or 'tokens'} for those that are not to have the default.
    """

    def __init__(self, reward: Reward, tokenizer: Any = None, over: str | Mapping[str, str] | None = None):
        self.named = isinstance(reward, Mapping)
        self.rewards = weighted(reward) if self.named else {"": (reward, 1.0)}
        for name, (one, _) in self.rewards.items():
            if not callable(one):
                raise TypeError(f"{the(name)} must be a RewardModel or a function, got {type(one).__name__}")
        functions = {name: one for name, one in self.rewards.items() if not isinstance(one[0], RewardModel)}
        self.tokenizer, self.over = tokenizer, read_over(over, functions, hasattr(tokenizer, "decode"))

    @property
    def models(self) -> list[nn.Module]:
        """The rewards that are modules."""
        return [reward for reward, _ in self.rewards.values() if isinstance(reward, nn.Module)]

    def check(self, num_tokens: int) -> None:
        """Refuse a reward model that does not know all of the policy's tokens."""
        for model in self.models:
            if isinstance(model, RewardModel) and model.palm.num_tokens < num_tokens:
                known = model.palm.num_tokens
                raise ValueError(f"the reward model knows {known} tokens, but the policy writes {num_tokens}")

    def __call__(
        self, answers: Experience | generation.Generation, max_tokens: int | None = None, max_batch: int | None = None
    ) -> Tensor:
        """-> scores (b,) float32 on the sequence's device, all finite. A reward model reads at most max_tokens at
        once, a function gets at most max_batch responses.
        """
        return self.total(self.components(answers, max_tokens, max_batch))

    def total(self, components: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what `components` gave."""
        return sum(weight * components[name] for name, (_, weight) in self.rewards.items())

    def components(
        self, answers: Experience | generation.Generation, max_tokens: int | None = None, max_batch: int | None = None
    ) -> dict[str, Tensor]:
        """What each reward gives by itself, without its weight; bounds as in a call."""
        found, device = {}, answers.sequence.device
        pieces: dict[str, list[list]] = {}  # ids or texts, made once for all functions
        for name, (reward, _) in self.rewards.items():
            if isinstance(reward, RewardModel):
                groups = groups_of_like_length(answers.mask.sum(dim=-1), max_tokens)
                scores = torch.cat([self._rate(reward, answers, rows) for rows in groups])
                found[name] = self._checked(name, scores, len(scores), device)[torch.cat(groups).argsort()]
            else:
                over = self.over[name]
                if over not in pieces:
                    masks = (answers.prompt_mask, answers.response_mask)
                    pieces[over] = [self._pieces(answers.sequence, mask, over) for mask in masks]
                found[name] = self._call(name, reward, *pieces[over], max_batch).to(device)
        return found

    def _rate(self, model: RewardModel, answers: Experience | generation.Generation, rows: Tensor) -> Tensor:
        """A reward model's scores of some rows."""
        own, n = next(model.parameters()).device, int(answers.mask[rows].sum(dim=-1).amax())
        inputs = (answers.sequence, answers.prompt_mask, answers.mask)
        return model.score(*(t[rows, :n].to(own) for t in inputs))

    def _call(self, name: str, reward: Callable, prompts: list, responses: list, max_batch: int | None) -> Tensor:
        """A function's scores."""
        size = max_batch or len(prompts)
        spans = [slice(i, i + size) for i in range(0, len(prompts), size)]
        return torch.cat([self._checked(name, reward(prompts[s], responses[s]), len(prompts[s])) for s in spans])

    def _checked(self, name: str, scores: Any, batch: int, device: torch.device | None = None) -> Tensor:
        """What a reward returned, as a tensor (batch,), or refused."""
        try:
            scores = torch.as_tensor(scores, dtype=torch.float32, device=device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(scores).__name__
            raise TypeError(
                f"{the(name)} must return one number for each of {batch} responses, got a {kind}"
            ) from error
        if scores.shape != (batch,):
            raise ValueError(
                f"{the(name)} must return one number for each of {batch} responses, got shape {tuple(scores.shape)}"
            )
        if not scores.isfinite().all():
            raise ValueError(f"{the(name)} returned a value that is not finite (NaN or infinite)")
        return scores

    def _pieces(self, sequence: Tensor, mask: Tensor, over: str) -> list:
        """The tokens (b, n) under a mask, row by row, as ids or as text."""
        ids = sequence[mask].split(mask.sum(dim=-1).tolist())
        if over == "text":
            return [self.tokenizer.decode(row.tolist()) for row in ids]
        return [row.clone() for row in ids]  # a view would carry the whole batch with it, also to other processes


def read_over(over: str | Mapping[str, str] | None, rewards: Mapping[str, Any], can_decode: bool) -> dict[str, str]:
    """What each reward function is to be given, by name: 'text' or 'tokens'. `rewards` are the functions."""
    by_name = over if isinstance(over, Mapping) else dict.fromkeys(rewards, over)
    strangers = [name for name in by_name if name not in rewards]
    if strangers:
        there = "no names: give the rewards as {name: reward}" if "" in rewards else f"functions {sorted(rewards)}"
        raise ValueError(f"reward_over names {strangers}, but there are {there}")
    for kind in over.values() if isinstance(over, Mapping) else (over,):
        if kind not in ("text", "tokens", None):
            raise ValueError(f"reward_over is 'text', 'tokens' or None to choose, or a mapping to these, got {kind!r}")
    default = "text" if can_decode else "tokens"
    found = {name: default if by_name.get(name) is None else by_name[name] for name in rewards}
    if "text" in found.values() and not can_decode:
        raise ValueError("a reward over text needs a tokenizer with a decode method")
    return found


def the(name: str) -> str:
    return f"the reward {name!r}" if name else "the reward"


def weighted(rewards: Mapping[str, Any]) -> dict[str, tuple[Any, float]]:
    """Several rewards by name, each with its weight (1 where none is given)."""
    if not rewards:
        raise ValueError("a mapping of rewards by name must hold at least one, got none")
    found = {}
    for name, reward in rewards.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"rewards are named by text, got {name!r}")
        pair = reward if isinstance(reward, tuple) else (reward, 1.0)
        if len(pair) != 2:
            raise ValueError(f"{the(name)} is a reward or a pair (reward, weight), got {len(pair)} values")
        found[name] = (pair[0], checked_weight(pair[1], the(name)))
    return found


def checked_weight(weight: Any, owner: str) -> float:
    """A finite number, or refused."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise TypeError(f"the weight of {owner} must be a finite number, got {weight!r}")
    return float(weight)


def soft_overlong_punishment(lengths: Tensor, limits: Tensor, buffer: int) -> Tensor:
    """0 up to `buffer` tokens before a response's limit, then down to -1 at it; all (b,). DAPO, 2503.14476, eq. 13."""
    return ((limits - buffer - lengths) / buffer).clamp(-1.0, 0.0)


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
    components = scorer.components(experience, tokens, options.max_batch)
    raw = scorer.total(components)
    scores = raw - options.missing_eos_penalty * ~finished
    if options.overlong_buffer:
        limits = options.max_seq_len - experience.prompt_mask.sum(dim=-1)
        punishment = soft_overlong_punishment(experience.lengths, limits, options.overlong_buffer)
        scores = scores + options.overlong_penalty * punishment
    if scorer.named:
        experience = experience.with_extra(**{REWARD + name: t for name, t in components.items()})
    return replace(experience, scores=scores, raw_scores=raw if options.penalises else None)


def ends_with_eos(sequence: Tensor, mask: Tensor, eos_token: int | tuple[int, ...] | None) -> Tensor:
    """Whether the last real token of each row (b, n) is an EOS -> (b,) bool."""
    eos = generation.eos_tensor(eos_token, sequence.device)
    if eos is None:
        return torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    last = sequence.gather(-1, mask.sum(dim=-1, keepdim=True) - 1).squeeze(-1)
    return torch.isin(last, eos)
