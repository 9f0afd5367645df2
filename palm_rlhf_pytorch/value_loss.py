"""Two ways to learn a value: clipped regression, and classification over bins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.flags import option


@dataclass(frozen=True)
class ClippedRegression:
    """Half the squared error, with the value held within `clip` of the old one: max of both losses.

    Not in PPO's paper but in its code (openai/baselines, ppo2/model.py at ea25b9e8, lines 68 to 75, the half included);
    described by Engstrom et al., 2005.12729, section 3.
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
    """Cross-entropy against a Gaussian around the target, cut into bins (Farebrother et al., 2403.03950, eq. 3.3).

    The first and last bin are worth min_value and max_value, so that both can be predicted; returns beyond are learned
    as these ends, so choose a range that holds them. sigma is the Gaussian's width, by default in widths of a bin.
    """

    num_bins: int
    min_value: float = 0.0
    max_value: float = 5.0
    sigma: float | None = None
    sigma_to_bin_ratio: float = 0.75  # the paper's choice
    min_max_value_on_bin_center: bool = True  # the reference's names of what happens here anyway
    clamp_to_range: bool = True

    def __post_init__(self):
        if self.num_bins < 2:
            raise ValueError(f"a histogram needs 2 bins or more, got {self.num_bins}")
        if not self.min_value < self.max_value:
            raise ValueError(f"the value range needs min < max, got [{self.min_value}, {self.max_value}]")
        if not (self.min_max_value_on_bin_center and self.clamp_to_range):
            raise ValueError("min_max_value_on_bin_center and clamp_to_range can only be True, as in the reference")

    @property
    def width(self) -> float:
        return (self.max_value - self.min_value) / (self.num_bins - 1)

    def decode(self, logits: Tensor) -> Tensor:
        """Bin logits (..., bins) -> expected value (...,)."""
        centres = torch.linspace(self.min_value, self.max_value, self.num_bins, device=logits.device)
        return (logits.float().softmax(dim=-1) * centres).sum(dim=-1)  # autocast would round a matrix product

    def probabilities(self, target: Tensor) -> Tensor:
        """Target (...,) -> the mass of each bin (..., bins)."""
        half, bins = self.width / 2, self.num_bins
        edges = torch.linspace(self.min_value - half, self.max_value + half, bins + 1, device=target.device)
        sigma = self.sigma_to_bin_ratio * self.width if self.sigma is None else self.sigma
        target = target.clamp(self.min_value, self.max_value)
        below = torch.erf((edges - target[..., None]) / (sigma * 2**0.5))
        return (below[..., 1:] - below[..., :-1]) / (below[..., -1:] - below[..., :1])

    def __call__(self, logits: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        """logits (..., bins), returns (...,) -> loss (...,)."""
        return -(self.probabilities(returns) * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)


@dataclass(frozen=True)
class ValueOptions:
    """How values are learned"""

    value_clip: float = option(0.4, "clip range of values, where the critic predicts a number", least=0)
    value_bins: int = option(0, "bins of a histogram (HL-Gauss) that it predicts instead; 0: a number", least=0)
    value_min: float = option(0.0, "value of the first bin")
    value_max: float = option(5.0, "value of the last bin")

    @property
    def value_loss(self) -> ClippedRegression | HLGauss:
        if self.value_bins == 0:
            return ClippedRegression(self.value_clip)
        return HLGauss(self.value_bins, self.value_min, self.value_max)
