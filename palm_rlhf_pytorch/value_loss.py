"""Two ways to learn a value: clipped regression, and classification over bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ClippedRegression:
    """Half the squared error, with the value held within `clip` of the old one: max of both losses.

    Schulman et al., 1707.06347 (as in its published code); Ziegler et al., 1909.08593.
    """

    clip: float = 0.4

    def decode(self, values: Tensor) -> Tensor:
        return values

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        """values, old_values, returns (...,) -> loss (...,)."""
        clipped = old_values + (values - old_values).clamp(-self.clip, self.clip)
        return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass(frozen=True)
class HLGauss:
    """Cross-entropy against a Gaussian around the target, cut into bins (Farebrother et al., 2403.03950, eq. 3.4).

    Returns beyond [min_value, max_value] are learned as its ends, so choose a range that holds them.
    """

    num_bins: int
    min_value: float = 0.0
    max_value: float = 5.0
    sigma: float | None = None  # None: 0.75 of a bin's width, the paper's choice

    def __post_init__(self):
        if not self.min_value < self.max_value:
            raise ValueError(f"the value range needs min < max, got [{self.min_value}, {self.max_value}]")

    def edges(self, like: Tensor) -> Tensor:
        return torch.linspace(self.min_value, self.max_value, self.num_bins + 1, device=like.device)

    def decode(self, logits: Tensor) -> Tensor:
        """Bin logits (..., bins) -> expected value (...,)."""
        edges = self.edges(logits)
        return logits.float().softmax(dim=-1) @ ((edges[1:] + edges[:-1]) / 2)

    def probabilities(self, target: Tensor) -> Tensor:
        """Target (...,) -> the mass of each bin (..., bins)."""
        width = (self.max_value - self.min_value) / self.num_bins
        sigma = 0.75 * width if self.sigma is None else self.sigma
        target = target.clamp(self.min_value, self.max_value)
        below = torch.erf((self.edges(target) - target[..., None]) / (sigma * 2**0.5))
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])

    def __call__(self, logits: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        """logits (..., bins), returns (...,) -> loss (...,)."""
        return -(self.probabilities(returns) * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)
