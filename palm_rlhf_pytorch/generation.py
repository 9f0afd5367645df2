"""Sampling from a causal PaLM: ragged prompts prefilled together, cached decoding, finished rows leave the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch import native_draw, utils
from palm_rlhf_pytorch.decoder import CachedModel, Decoder, decoder
from palm_rlhf_pytorch.native_draw import Kept
from palm_rlhf_pytorch.ops import groups_of_like_length, lengths_to_mask
from palm_rlhf_pytorch.utils import gumbel_sample, inverse_cdf_sample, keep_largest, nucleus, uniform_numbers
from palm_rlhf_pytorch.vocabulary import log_softmax, tempered

PREFILL_TOKENS = 2**14  # prompt tokens read at once
WRITE_EVERY = 256  # times that tokens come before they are laid into their sequences together
PAUSE = 0.05  # seconds that a call of several steps takes, about: until progress is seen, and Ctrl-C heard
MOST_AHEAD = 256  # steps of one call


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from.

    filter_logits sees the raw logits (the reference's order); temperature, top_k (a count) and top_p (a mass kept)
    then follow in the usual order. Temperature 0 takes the likeliest token.
    """

    temperature: float = 1.0
    filter_logits: Callable[[Tensor], Tensor] | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k counts the tokens to keep and must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is the probability mass to keep, above 0 and at most 1, got {self.top_p}")

    def shape(self, logits: Tensor) -> Tensor:
        """Logits (b, v) -> float32 logits whose softmax is the distribution sampled from."""
        if self.filter_logits is not None:
            logits = self.filter_logits(logits)
        logits = tempered(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_largest(logits, self.top_k)
        return logits if self.top_p is None else nucleus(logits, self.top_p)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Logits (b, v) -> tokens (b,), and their log-probs (b,) in the distribution that they were drawn from (of the
        likeliest tokens at temperature 0: the model's).
        """
        kept = self.kept(logits.shape[-1]) if native_draw.fits(logits) else None
        if kept is not None:
            uniform = uniform_numbers(len(logits), logits.device, generator) if self.temperature else None
            return native_draw.drawn(logits, uniform, kept)
        logits = self.shape(logits)
        log_probs = log_softmax(logits)
        if self.temperature == 0:
            tokens = logits.argmax(dim=-1)
        else:
            sample = gumbel_sample if log_probs.is_cuda else inverse_cdf_sample
            tokens = sample(log_probs, generator=generator)
        return tokens, log_probs.gather(-1, tokens[:, None]).squeeze(-1)

    def kept(self, vocabulary: int) -> Kept | None:
        """What `shape` keeps of so many logits, for C++ to draw from; None where it does otherwise."""
        own, temperature = self.filter_logits, self.temperature
        count, mass = min(self.top_k or vocabulary, vocabulary), 1.0 if self.top_p is None else self.top_p
        if own is None:
            return Kept(temperature, count, mass, temperature or 1.0)
        if not isinstance(own, partial) or own.args or own.keywords.keys() != {"thres"}:
            return None
        thres = own.keywords["thres"]
        if own.func is utils.top_k:
            return Kept(temperature, min(count, utils.count_of(thres, vocabulary)), mass, temperature or 1.0)
        if own.func is utils.top_p and self.top_k is self.top_p is None:
            return Kept(temperature, vocabulary, 1 - thres)
        return None


@dataclass
class Step:
    """One token for each of m rows of the batch: rows, positions, tokens, log_probs, all (m,). Or n of each row, taken
    together: (n * m,), one step after the other.

    alive (m,) is False where a row had ended before: on a GPU such rows go on until the loop looks at them, and what
    is drawn for them means nothing.
    """

    rows: Tensor
    positions: Tensor
    tokens: Tensor
    log_probs: Tensor | None
    alive: Tensor
    ended: int  # rows that have left so far


@dataclass
class Generation:
    """Prompts and what was drawn after them, right padded. Every field (b, n); log_probs only on request.

    response_mask holds the tokens drawn, the first EOS included; log_probs[:, t] is of token t, 0 outside the mask.
    """

    sequence: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    log_probs: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.prompt_mask | self.response_mask

    def responses(self, pad_value: int) -> Tensor:
        """The drawn tokens alone, left aligned and right padded: (b, longest response)."""
        n = int(self.response_mask.sum(dim=-1).max())
        out = self.sequence.new_full((self.sequence.shape[0], n), pad_value)
        return out.masked_scatter(lengths_to_mask(self.response_mask.sum(dim=-1), n), self.sequence[self.response_mask])


def check_integers(ids: Tensor, what: str) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got {ids.dtype}")


def check_token_ids(ids: Tensor, num_tokens: int, what: str = "token ids") -> None:
    """Refuse ids outside the vocabulary; costs a device sync, so it is called at the doors only."""
    check_integers(ids, what)
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < num_tokens):
        low, high = int(ids.min()), int(ids.max())
        raise ValueError(f"{what} run from {low} to {high}, but the vocabulary has ids 0 to {num_tokens - 1}")


def check_prompts(prompts: Tensor, lengths: Tensor, num_tokens: int) -> None:
    """Refuse prompts (b, n) that no answer can be drawn for."""
    if prompts.ndim != 2 or lengths.shape != prompts.shape[:1] or lengths.is_floating_point():
        got = f"shapes {tuple(prompts.shape)} and {tuple(lengths.shape)} of {lengths.dtype}"
        raise ValueError(f"prompts (b, n) and their integer lengths (b,) are needed, got {got}")
    if prompts.numel() == 0 or int(lengths.min()) < 1:
        raise ValueError("every prompt needs at least one token; start an empty one with a begin-of-text token")
    if int(lengths.max()) > prompts.shape[1]:
        raise ValueError(f"a prompt length is {int(lengths.max())}, but prompts have {prompts.shape[1]} positions")
    check_token_ids(prompts[lengths_to_mask(lengths, prompts.shape[1])], num_tokens, "prompt ids")


def eos_tensor(eos_token: int | Sequence[int] | None, device: torch.device) -> Tensor | None:
    """One EOS id, several or none -> (k,) or None."""
    return None if eos_token is None else torch.as_tensor(eos_token, device=device).reshape(-1)


class Rows:
    """The rows at work, and the prompts that wait for a place among them.

    Prompts (p, n), lengths (p,), limits (p,): the longest come first, so that rows of like lengths work together.
    """

    def __init__(self, model: CachedModel, decoder: Decoder, prompts: Tensor, lengths: Tensor, limits: Tensor):
        self.model, self.decoder = model, decoder
        self.prompts, self.lengths, self.limits = prompts, lengths, limits
        self.waiting = lengths.argsort(descending=True, stable=True)
        self.rows = self.waiting[:0]
        self.last = limits[:0]  # positions that the rows at work may fill
        self.tokens = prompts.new_empty(0)
        self.alive = torch.empty(0, dtype=torch.bool, device=prompts.device)
        self.ended = 0  # rows that have left

    def look(self, batch: int, **forward_kwargs) -> bool:
        """Let rows that have ended go and others come; whether any is left. Waits for the device."""
        if (self.rows.numel() == batch or not self.waiting.numel()) and self.alive.all():
            return self.rows.numel() > 0
        alive = self.alive.nonzero().squeeze(-1)
        free = batch - alive.numel()
        come = min(free, self.waiting.numel()) if free >= max(1, batch // 4) or alive.numel() == 0 else 0
        size = self.decoder.size_for(alive.numel() + come) if alive.numel() + come else 0
        ended = (~self.alive).nonzero().squeeze(-1)[: max(0, size - alive.numel() - come)]  # only fill up a fixed size
        stay = torch.cat((alive, ended)).sort().values
        self.ended += self.rows.numel() - stay.numel()
        if stay.numel() < self.rows.numel():
            order = self.decoder.cache.keep(stay)
            kept = (t[order] for t in (self.rows, self.last, self.tokens, self.alive))
            self.rows, self.last, self.tokens, self.alive = kept
        if ended.numel():
            self.decoder.cache.restart(~self.alive)  # or they would run out of room
        if come:
            self._come(self.waiting[:come], **forward_kwargs)
            self.waiting = self.waiting[come:]
        return self.rows.numel() > 0

    def _come(self, rows: Tensor, **forward_kwargs) -> None:
        """Read all but the last token of these prompts, those of like lengths together and copies once; the last one is
        a step's.
        """
        cache, lengths = self.decoder.cache, self.lengths[rows] - 1
        groups = groups_of_like_length(lengths, PREFILL_TOKENS)  # in the order of `rows`, which are sorted
        for group in groups:
            n = int(lengths[group[0]])
            part = cache.admit(len(group), n)
            if n > 0:
                real = lengths_to_mask(lengths[group], n)
                ids = self.prompts[rows[group], :n].masked_fill(~real, -1)
                first, copy_of = first_of_copies(ids)
                once = part if len(first) == len(group) else cache.admit(len(first), n)
                ids, real = ids[first].clamp(min=0), real[first]
                if not self.decoder.read(ids, real, once):
                    wanted = {"return_only_embedding": True, "places": torch.zeros_like(real)}  # the cache alone
                    self.model(ids, mask=real, cache=once, **wanted, **forward_kwargs)
                part.repeat(once, copy_of)
            cache.join(part)
        self.rows, self.last = torch.cat((self.rows, rows)), torch.cat((self.last, self.limits[rows] - 1))
        self.tokens = torch.cat((self.tokens, self.prompts[rows, lengths]))
        self.alive = torch.cat((self.alive, torch.ones_like(rows, dtype=torch.bool)))


class Drawing:
    """Tokens drawn for the rows at work from a step of the decoder, or, `together`, from as many as one call of C++ may
    take without a row's ending within. These draw the same tokens from the same numbers.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampling: Sampling,
        eos: Tensor | None,
        generator: torch.Generator | None,
        together: bool = False,
    ):
        self.decoder, self.sampling, self.eos, self.generator = decoder, sampling, eos, generator
        self.together = together and decoder.ahead is not None
        self.kept: Kept | None = None
        self.first, self.pace = True, 1

    def __call__(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, tokens and log-probs (n * m,) of n steps of the m rows, step by step."""
        left = int((rows.last - self.decoder.cache.lengths).min()) if self.pace > 1 else 1
        steps, started = min(self.pace, left), time.perf_counter()
        found = self._several(rows, steps) if steps > 1 else self._one(rows)
        if self.kept is not None:
            each = (time.perf_counter() - started) * len(rows.tokens) / len(found[0])
            self.pace = max(1, min(MOST_AHEAD, int(PAUSE / max(each, 1e-9))))
        return found

    def _one(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.decoder(rows.tokens)
        if self.first:
            if not logits.isfinite().all():
                raise ValueError("the model gives values that are not finite for these prompts; its weights are broken")
            if self.together and native_draw.fits(logits):
                self.kept = self.sampling.kept(logits.shape[-1])
            self.first = False
        return self.decoder.cache.lengths, *self.sampling.draw(logits, self.generator)

    def _several(self, rows: Rows, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        many, before, uniform = len(rows.tokens), self.decoder.cache.lengths, None
        source = self.generator or torch.default_generator
        if self.sampling.temperature:
            state = source.get_state()
            uniform = uniform_numbers(steps * many, before.device, source)
            behind = source.get_state()
        tokens, log_probs = self.decoder.draw_ahead(rows.tokens, steps, self.kept, uniform, self.eos)
        # the numbers that were not used are the next ones again, unless another thread has drawn meanwhile
        if uniform is not None and len(tokens) < steps and source.get_state().equal(behind):
            source.set_state(state)
            uniform_numbers(tokens.numel(), before.device, source)
        positions = before + torch.arange(1, len(tokens) + 1, device=before.device)[:, None]
        return positions.flatten(), tokens.flatten(), log_probs.flatten()


@torch.no_grad()
def decode(
    model: CachedModel,
    prompts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    sampling: Sampling,
    eos_token: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    return_log_probs: bool = False,
    max_batch: int | None = None,
    how: str = "auto",
    together: bool = False,
    **forward_kwargs,
) -> Iterator[Step]:
    """Draw tokens step by step, or, `together`, several steps at a time where that is faster (`Drawing`). A row ends
    with its EOS, or when prompt and response fill limits (b,).

    prompts (b, n) right padded, lengths (b,): at least one token is drawn for every row. Prompts are read together;
    from then on each step is one token a row, and rows that ended are computed no more (on a GPU, from the next look
    on). With more than `max_batch` prompts, the others wait and take the places of those that end. `how`: see
    `decoder.choose`.
    """
    eos = eos_tensor(eos_token, prompts.device)
    batch = min(max_batch or len(prompts), len(prompts))
    longest = max(int(limits.max()), prompts.shape[1] + 1)
    with decoder(model, batch, longest, longest - int(lengths.min()), how, **forward_kwargs) as step:
        rows, taken = Rows(model, step, prompts, lengths, limits), 0
        draw = Drawing(step, sampling, eos, generator, together)
        while taken % step.look_every or rows.look(batch, **forward_kwargs):
            positions, tokens, log_probs = draw(rows)
            many = len(rows.tokens)
            steps = len(tokens) // many
            if taken % step.look_every == 0 and not log_probs.isfinite().all():
                broken = taken + 1 + int(log_probs.isfinite().logical_not().nonzero()[0]) // many
                raise ValueError(
                    f"token {broken} is drawn from logits that are not finite, or all -inf: is the model broken?"
                )
            at_work, alive = rows.rows, rows.alive
            last, rows.tokens, taken = positions, tokens, taken + steps
            if steps > 1:
                at_work, alive = (t.expand(steps, many).flatten() for t in (at_work, alive))
                last, rows.tokens = (t[-many:] for t in (positions, tokens))
            yield Step(at_work, positions, tokens, log_probs if return_log_probs else None, alive, rows.ended)
            rows.alive = rows.alive & (last < rows.last)
            if eos is not None:
                rows.alive = rows.alive & ~torch.isin(rows.tokens, eos)


def generate(
    model: CachedModel,
    prompts: Tensor,
    lengths: Tensor,
    max_len: int,
    sampling: Sampling,
    pad_value: int = 0,
    use_tqdm: bool = False,
    on_ended: Callable[[int], None] | None = None,
    **decode_kwargs,
) -> Generation:
    """Prompts (b, n) of given lengths (b,) -> sequences of at most max_len tokens, at least one of them new.

    `on_ended` hears of rows that have ended, how many since the last time.
    """
    check_prompts(prompts, lengths, model.num_tokens)
    limits = lengths.new_full(lengths.shape, max_len)
    answers, heard = Answers(prompts, lengths, max_len, pad_value), 0
    with tqdm(total=int((limits - lengths).clamp(min=1).sum()), unit="token", disable=not use_tqdm) as bar:
        for step in decode(model, prompts, lengths, limits, sampling, together=True, **decode_kwargs):
            answers.add(step)
            bar.update(step.rows.numel())
            if on_ended is not None and step.ended > heard:
                on_ended(step.ended - heard)
                heard = step.ended
    if on_ended is not None:
        on_ended(len(prompts) - heard)
    return answers.whole(decode_kwargs.get("return_log_probs", False))


class Answers:
    """Prompts (b, n) of given lengths (b,), right padded, and the places behind them that steps are laid into: many at
    once, for each write costs as much as a small part of the model.
    """

    def __init__(self, prompts: Tensor, lengths: Tensor, max_len: int, pad_value: int):
        batch, n = prompts.shape
        self.prompt_mask = lengths_to_mask(lengths, max(max_len, n + 1))
        self.sequence = prompts.new_full(self.prompt_mask.shape, pad_value)
        self.sequence[:, :n] = prompts.masked_fill(~self.prompt_mask[:, :n], pad_value)
        self.response_mask = torch.zeros_like(self.prompt_mask)
        self.log_probs = torch.zeros(self.prompt_mask.shape, device=prompts.device)
        self.steps: list[Step] = []

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if len(self.steps) == WRITE_EVERY:
            self.write()

    def write(self) -> None:
        """Lay out what was added since the last time; what was drawn for rows that had ended is left out."""
        if not self.steps:
            return
        alive = torch.cat([step.alive for step in self.steps])
        rows, positions, tokens = (
            torch.cat([getattr(step, name) for step in self.steps])[alive] for name in ("rows", "positions", "tokens")
        )
        self.sequence[rows, positions] = tokens
        self.response_mask[rows, positions] = True
        if self.steps[0].log_probs is not None:
            self.log_probs[rows, positions] = torch.cat([step.log_probs for step in self.steps])[alive]
        self.steps.clear()

    def whole(self, log_probs: bool) -> Generation:
        """All of it, as wide as the longest."""
        self.write()
        end = int((self.prompt_mask | self.response_mask).sum(dim=-1).max())
        fields = self.sequence, self.prompt_mask, self.response_mask, self.log_probs if log_probs else None
        return Generation(*(None if t is None else t[:, :end] for t in fields))


def stream(
    model: CachedModel, prompts: Tensor, lengths: Tensor, max_len: int, sampling: Sampling, pad_value: int = 0, **kwargs
) -> Iterator[Tensor]:
    """The tokens as they come: (b,) a step, `pad_value` for rows that have ended."""
    check_prompts(prompts, lengths, model.num_tokens)
    limits = lengths.new_full(lengths.shape, max_len)
    for step in decode(model, prompts, lengths, limits, sampling, **kwargs):
        if not step.alive.any():  # on a GPU: all have ended since the last look
            return
        tokens = prompts.new_full(lengths.shape, pad_value)
        tokens[step.rows] = step.tokens.masked_fill(~step.alive, pad_value)
        yield tokens


def as_batch(prompt: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A prompt (..., n) -> (b, n) and its leading shape."""
    if prompt.ndim == 0 or prompt.numel() == 0:
        shape = tuple(prompt.shape)
        raise ValueError(f"a prompt is (n,) or (..., n) token ids, at least one of them, got shape {shape}")
    return prompt.reshape(-1, prompt.shape[-1]), tuple(prompt.shape[:-1])


def best_of(scores: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """The sequence with the highest score among one prompt's samples, padding trimmed -> (n,), score ()."""
    best = int(scores.argmax())
    return generation.sequence[best][generation.mask[best]], scores[best]


def first_of_copies(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (b, n), copies side by side -> the first of each (u,), and for every row which of these it is (b,)."""
    new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    new[1:] = (rows[1:] != rows[:-1]).any(dim=-1)
    return new.nonzero().squeeze(-1), new.cumsum(dim=0) - 1


def repeat_prompts(prompts: Tensor, lengths: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Each prompt (b, n) `times` over, copies side by side: (b * times, n), (b * times,)."""
    return (
        rearrange(prompts[:, None].expand(-1, times, -1), "b g n -> (b g) n"),
        lengths.repeat_interleave(times),
    )
