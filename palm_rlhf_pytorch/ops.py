"""Small tensor functions that everything above stands on. Torch only; each is defined once in the project.

Axes, here and everywhere: b sequences, g samples of one prompt, n positions, d features, h heads, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

LEAST_TOKENS = {"cpu": 128}  # that a pass should have; other devices want thousands


def masked_mean(
    seq: Tensor, mask: Tensor | None = None, dim: int | tuple[int, ...] | None = 1, keepdim: bool = False
) -> Tensor:
    """Mean of `seq` over `dim` (None: all) where `mask` is True; 0 where the mask holds nothing.

    seq (b, n) or (b, n, d), mask (b, n) bool, broadcast over the features.
    """
    if mask is None:
        return seq.mean() if dim is None else seq.mean(dim=dim, keepdim=keepdim)
    mask = mask.reshape(*mask.shape, *(1,) * (seq.ndim - mask.ndim)).expand_as(seq)
    dims = tuple(range(seq.ndim)) if dim is None else dim
    total = seq.masked_fill(~mask, 0.0).sum(dim=dims, keepdim=keepdim)
    return total / mask.sum(dim=dims, keepdim=keepdim).clamp(min=1)


def sum_over_processes(t: Tensor) -> Tensor:
    """The sum of a tensor over all processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        t = t.clone()
        distributed.all_reduce(t)
    return t


def whiten(t: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """`t` (b, n) scaled to variance 1 over the whole masked batch, that of all processes, mean 0 where `shift_mean`; 0
    outside.
    """
    count = sum_over_processes(mask.sum()).clamp(min=1)
    mean = sum_over_processes(t.masked_fill(~mask, 0.0).sum()) / count
    variance = sum_over_processes(((t - mean) ** 2).masked_fill(~mask, 0.0).sum()) / count
    whitened = (t - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def k3(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """e^d - d - 1, d = log p_ref - log p: a KL estimate that is never negative. GRPO, 2402.03300, eq. 4."""
    d = ref_log_probs - log_probs
    return torch.expm1(d) - d


def token_shares(mask: Tensor, normalization: str | int = "token") -> Tensor:
    """What each True place of mask (b, n) counts for in a batch's loss -> (b, n) float32, 0 elsewhere.

    'token': all tokens the same. 'sequence': all sequences the same, and in each its tokens. A number L: each 1 / (b L)
    (Dr. GRPO's constant, 2503.20783, listing 1); "constant" takes the longest here for L.
    """
    shares = mask.float()
    if normalization == "constant":
        normalization = int(mask.sum(dim=-1).max())
    if normalization == "token":
        return shares / shares.sum().clamp(min=1)
    if normalization == "sequence":
        return shares / (shares.sum(dim=-1, keepdim=True).clamp(min=1) * len(mask))
    return shares / (len(mask) * normalization)


def to_groups(values: Tensor, group_ids: Tensor) -> Tensor:
    """Values (b,) of samples -> (groups, g), a row for each id in group_ids (b,)."""
    order, g = _by_group(group_ids)
    return values[order].reshape(-1, g)


def from_groups(values: Tensor, group_ids: Tensor) -> Tensor:
    """The inverse of `to_groups`: (groups, g) -> (b,) in the order of group_ids."""
    order, _ = _by_group(group_ids)
    return values.flatten()[order.argsort()]


def _by_group(group_ids: Tensor) -> tuple[Tensor, int]:
    """Row numbers sorted by group, and how many rows each has."""
    _, counts = group_ids.unique(return_counts=True)
    sizes = counts.unique()
    if len(sizes) > 1:
        raise ValueError(f"every prompt needs as many samples as the others, got {sizes.tolist()}: do not split groups")
    return group_ids.argsort(stable=True), int(sizes)


def scatter_to_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Values (m, ...) laid back at the m True places of `mask` (b, n), 0 elsewhere -> (b, n, ...)."""
    zeros = torch.zeros(*mask.shape, *values.shape[1:], dtype=values.dtype, device=values.device)
    if values.ndim > 1 and values.device.type == "cpu" and not torch.compiler.is_compiling():
        where = mask.flatten().nonzero().squeeze(-1)  # vectors as wholes: what follows goes number by number
        return zeros.flatten(0, 1).index_copy(0, where, values).view_as(zeros)
    return zeros.masked_scatter(mask.reshape(*mask.shape, *(1,) * (values.ndim - 1)), values)


def has_token_after_padding(mask: Tensor) -> bool:
    """Whether in any row of `mask` (b, n) a real token follows padding: only then must a causal model be masked."""
    return bool((mask[:, 1:] & ~mask[:, :-1]).any())


def lengths_to_mask(lengths: Tensor, n: int) -> Tensor:
    """Lengths (b,) -> (b, n) bool, True before each length."""
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def groups_of_like_length(lengths: Tensor, max_tokens: int | None = None, waste: float = 0.1) -> list[Tensor]:
    """Row numbers of lengths (b,) in groups to be computed together, longest first. Padded to its longest row, no group
    spends more than `waste` of its positions on padding, or takes more than max_tokens positions (a single row may).
    Groups below `LEAST_TOKENS` grow all the same: a pass of its own would cost more than the padding.
    """
    least = LEAST_TOKENS.get(lengths.device.type, 4096)
    lengths, order = lengths.sort(descending=True, stable=True)
    cuts, start, real = [], 0, 0
    known = lengths.tolist()
    for row, length in enumerate(known):
        positions = known[start] * (row + 1 - start)
        wasteful = positions - known[start] >= least and real + length < (1 - waste) * positions
        if row > start and (wasteful or (max_tokens is not None and positions > max_tokens)):
            cuts.append(row)
            start, real = row, 0
        real += length
    return list(order.tensor_split(cuts))
