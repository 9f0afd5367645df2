"""The helpers that users of the reference import from `palm_rlhf_pytorch.utils`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from palm_rlhf_pytorch.ops import masked_mean

__all__ = ["eval_decorator", "gumbel_noise", "gumbel_sample", "masked_mean", "nucleus", "top_k", "top_p"]


def eval_decorator(fn: Callable) -> Callable:
    """Run a module's method in eval mode and put the mode back, also when it raises."""

    @wraps(fn)
    def inner(self, *args, **kwargs):
        was_training = self.training
        self.eval()
        try:
            return fn(self, *args, **kwargs)
        finally:
            self.train(was_training)

    return inner


def gumbel_noise(t: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise in the shape of `t`, float32."""
    exponential = torch.empty(t.shape, device=t.device, dtype=torch.float32).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(torch.float32).tiny).log()


def gumbel_sample(
    t: Tensor, temperature: float = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """Draw from softmax(t / temperature) along `dim`; temperature 0 is the argmax."""
    if temperature == 0:
        return t.argmax(dim=dim)
    return (t.float() / temperature + gumbel_noise(t, generator)).argmax(dim=dim)


def inverse_cdf_sample(log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw from log_probs (b, v) along the last axis -> (b,): where their running sum first passes a uniform number.

    One random number a row where `gumbel_sample` takes v: on a CPU those cost more than the model. Summed in float64;
    what has no probability is never drawn: a number that is below 1 by 2^-53 or more stays below the sum, rounded too.
    """
    cdf = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
    total = cdf[:, -1:]
    uniform = uniform_numbers(len(cdf), cdf.device, generator)[:, None]
    found = torch.searchsorted(cdf, uniform * total, right=True).squeeze(-1)
    return found.clamp(max=cdf.shape[-1] - 1)  # of what is no number too


def uniform_numbers(count: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Numbers (count,) from 0 to below 1, in float64."""
    return torch.rand((count,), dtype=torch.float64, device=device, generator=generator)


def keep_largest(logits: Tensor, count: int) -> Tensor:
    """Logits (..., v) with all but the `count` largest at -inf."""
    values, indices = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def nucleus(logits: Tensor, mass: float) -> Tensor:
    """Logits (..., v) with all at -inf but the smallest set of tokens whose probability exceeds `mass`.

    Nucleus sampling, Holtzman et al., 1904.09751, eq. 2. The likeliest token always stays.
    """
    if mass >= 1:  # all stay, also where the sum is rounded above 1
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    mass_before = ordered.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1).roll(1, dims=-1)
    mass_before[..., 0] = 0.0
    ordered = ordered.masked_fill(mass_before > mass, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered)


def top_k(logits: Tensor, thres: float = 0.9) -> Tensor:
    """The reference's convention: keep the ceil((1 - thres) * v) largest of logits (..., v)."""
    return keep_largest(logits, count_of(thres, logits.shape[-1]))


def count_of(thres: float, vocabulary: int) -> int:
    """How many tokens the reference's top_k keeps."""
    return max(1, math.ceil((1 - thres) * vocabulary))


def top_p(logits: Tensor, thres: float = 0.9) -> Tensor:
    """The reference's convention: keep a mass above 1 - thres, so 0.9 keeps 10 %. See `nucleus` for the usual one."""
    return nucleus(logits, 1 - thres)
