"""Log-probabilities over a vocabulary, without holding (positions, vocabulary) at once, in either direction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palm_rlhf_pytorch.precision import HALVES
from palm_rlhf_pytorch.products import linear

LOGITS_PER_CHUNK = 2**22  # 16 MiB in float32, which a CPU's caches still serve
ROWS_PER_CHUNK = 64  # at least: each chunk reads the whole weight
ON_GPU = 16  # times as many: there, products want to be large
MULTIPLIES_INTO_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # on a GPU; from torch 2.8 on


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities in float32, whatever the dtype of the logits (..., v)."""
    return tempered(logits, temperature).log_softmax(dim=-1)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, over the temperature; 0 counts as 1."""
    logits = logits.float()
    return logits if temperature in (0.0, 1.0) else logits / temperature  # at each token drawn, an operation counts


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy in nats of each distribution (..., v) -> (...); a log-prob of -inf counts as 0."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(dim=-1)


def linear_log_probs(
    embeds: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of each distribution softmax(scale * embeds @ weight^T / temperature).

    embeds (m, d), weight (v, d), targets (m,) -> log_probs (m,), entropy (m,), both float32. Where m * v is more than
    a chunk, rows go through the vocabulary in chunks, and each chunk's logits are made anew for its backward pass.
    """
    embeds, weight, rounded = as_multiplied(embeds, weight)
    if embeds.shape[0] <= rows_of_chunk(weight) and rounded:
        log_probs = log_softmax(linear(embeds, weight) * scale, temperature)
        return log_probs.gather(-1, targets[:, None]).squeeze(-1), entropy_of(log_probs)
    with torch.autocast(embeds.device.type, enabled=False):  # what follows is float32 wherever sums are taken
        return ChunkedLogProbs.apply(embeds, weight, targets, scale / temperature, rounded)


@torch.no_grad()
def target_log_probs(
    embeds: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """The first of `linear_log_probs` alone, without gradient (m,)."""
    embeds, weight, rounded = as_multiplied(embeds, weight)
    found = results(targets)
    for e, t, of_target in chunks(weight, embeds, targets, found):
        of_all = chunk_log_probs(e, weight, scale / temperature, rounded)
        torch.gather(of_all, -1, t[:, None], out=of_target[:, None])
        del of_all
    return found


def linear_cross_entropy(
    embeds: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    ignore_index: int = -100,
    tied: list[Tensor] | None = None,
) -> Tensor:
    """-log softmax(scale * embeds @ weight^T)[target], the mean over those of embeds (m, d) whose targets (m,) are not
    `ignore_index`; weight (v, d). `tied`: see `Lookup`.

    In chunks like `linear_log_probs`; gradients are made with the loss, so that no logits are computed twice. torch
    has such a function from 2.13 on; with its own choice of chunks it took three to four times as long on a CPU.
    """
    embeds, weight, rounded = as_multiplied(embeds, weight)
    if embeds.shape[0] <= rows_of_chunk(weight) and rounded:
        logits = linear(embeds, weight)
        return F.cross_entropy((logits if scale == 1.0 else logits * scale).float(), targets, ignore_index=ignore_index)
    if not torch.is_grad_enabled():  # a Function is not told, and would make gradients
        embeds, weight = embeds.detach(), weight.detach()
    counted = targets != ignore_index
    shares = counted / counted.sum()
    with torch.autocast(embeds.device.type, enabled=False):
        return ChunkedCrossEntropy.apply(embeds, weight, targets.where(counted, 0), shares, scale, tied, rounded)


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the precision that autocast asks for: the functions below are opaque to it."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
    return tensors


def as_multiplied(embeds: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both `as_computed`, and whether their product may be rounded to their precision: where that is the whole of
    float32, or where autocast asks for less. Weights in half precision alone do not: logits of 20 would be rounded to
    1/8, and their log-probs with them.
    """
    asked = torch.is_autocast_enabled(embeds.device.type)
    return *as_computed(embeds, weight), asked or weight.dtype not in HALVES


def float_logits(embeds: Tensor, weight: Tensor, rounded: bool) -> Tensor:
    """embeds (m, d) @ weight^T (v, d) -> (m, v) in float32, its sums not rounded in between unless they may be."""
    if rounded or (weight.is_cuda and not MULTIPLIES_INTO_FLOAT32):
        return linear(embeds, weight).float()
    if weight.is_cuda:
        return torch.mm(embeds, weight.t(), out_dtype=torch.float32)
    return linear(embeds.float(), weight.float())


def rows_of_chunk(weight: Tensor) -> int:
    times = ON_GPU if weight.is_cuda else 1
    return max(ROWS_PER_CHUNK, LOGITS_PER_CHUNK // weight.shape[0]) * times


def chunks(weight: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(rows_of_chunk(weight)) for t in tensors), strict=True)


def results(targets: Tensor) -> Tensor:
    """Where chunks put theirs: a small tensor that came behind each chunk's large ones and stayed would keep glibc from
    giving the next chunk the same memory, 1.2 GB of it for 8,192 positions of a vocabulary of 20,000.
    """
    return torch.empty(targets.shape, dtype=torch.float32, device=targets.device)


def chunk_log_probs(embeds: Tensor, weight: Tensor, scale: float, rounded: bool = True) -> Tensor:
    logits = float_logits(embeds, weight, rounded)
    if scale != 1.0:
        logits *= scale
    # in place where that is known to be safe: a CPU's kernel is done with a row before it writes it
    return torch.log_softmax(logits, dim=-1, out=logits) if logits.device.type == "cpu" else logits.log_softmax(dim=-1)


def entropies(log_probs: Tensor) -> Tensor:
    """As `entropy_of` where all is finite, without a second (m, v) of products."""
    return -torch.einsum("mv,mv->m", log_probs.exp(), log_probs)


def to_gradient_of_logits(
    log_probs: Tensor,
    targets: Tensor,
    by_log_prob: Tensor,
    scale: float,
    entropy: Tensor | None = None,
    by_entropy: Tensor | None = None,
) -> Tensor:
    """Gradients (m,) by the targets' log-probs and by the entropies H -> that by the logits (m, v), in the memory of
    log_probs: d log p_t / dz_j = [j = t] - p_j and dH / dz_j = -p_j (log p_j + H), each times scale.
    """
    by_log_prob = by_log_prob * scale
    if by_entropy is None:
        gradient = log_probs.exp_().mul_(-by_log_prob[:, None])
    else:
        by_entropy = by_entropy * scale
        probs, level = log_probs.exp(), by_log_prob + by_entropy * entropy
        gradient = log_probs.mul_(-by_entropy[:, None]).sub_(level[:, None]).mul_(probs)
    return gradient.scatter_add_(-1, targets[:, None], by_log_prob[:, None])


class Gradients:
    """Those of embeds (m, d) and weight (v, d), gathered chunk by chunk; None where nobody needs them."""

    def __init__(self, embeds: Tensor, weight: Tensor, needed: tuple[bool, bool]):
        self.dtype = weight.dtype
        self.embeds = torch.empty_like(embeds) if needed[0] else None
        # sums over chunks are float32 whatever is summed
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        self.row = 0

    def add(self, of_logits: Tensor, embeds: Tensor, weight: Tensor) -> None:
        """Of the next chunk: of_logits (m, v) float32."""
        of_logits = of_logits.to(self.dtype)
        rows = slice(self.row, self.row + len(embeds))
        self.row = rows.stop
        if self.embeds is not None:
            self.embeds[rows] = linear(of_logits, weight.t())
        if self.weight is not None and self.dtype == torch.float32:
            self.weight.addmm_(of_logits.t(), embeds)
        elif self.weight is not None:
            self.weight += of_logits.t() @ embeds

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        return self.embeds, None if self.weight is None else self.weight.to(self.dtype)


@torch.no_grad()
def all_log_probs(embeds: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """log softmax(scale * embeds @ weight^T) of a chunk, without gradient: (m, d), (v, d) -> (m, v) float32."""
    embeds, weight, rounded = as_multiplied(embeds, weight)
    return chunk_log_probs(embeds, weight, scale, rounded)


class ChunkedLogProbs(torch.autograd.Function):
    """`linear_log_probs` beyond one chunk."""

    @staticmethod
    def forward(
        ctx: Any, embeds: Tensor, weight: Tensor, targets: Tensor, scale: float, rounded: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.scale, ctx.rounded = scale, rounded
        ctx.set_materialize_grads(False)
        of_targets, entropy = results(targets), results(targets)
        for e, t, of_target, h in chunks(weight, embeds, targets, of_targets, entropy):
            log_probs = chunk_log_probs(e, weight, scale, rounded)
            torch.gather(log_probs, -1, t[:, None], out=of_target[:, None])
            h.copy_(entropies(log_probs))
            del log_probs
        ctx.save_for_backward(embeds, weight, targets, entropy)
        return of_targets, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_probs: Tensor | None, by_entropy: Tensor | None):
        embeds, weight, targets, entropy = ctx.saved_tensors
        gradients = Gradients(embeds, weight, ctx.needs_input_grad[:2])
        if by_log_probs is None:
            by_log_probs = torch.zeros(len(targets), device=targets.device)
        entropies_too = () if by_entropy is None else (entropy, by_entropy)
        with torch.autocast(embeds.device.type, enabled=False):  # as in the forward pass
            for e, t, g, *h in chunks(weight, embeds, targets, by_log_probs, *entropies_too):
                log_probs = chunk_log_probs(e, weight, ctx.scale, ctx.rounded)
                gradients.add(to_gradient_of_logits(log_probs, t, g, ctx.scale, *h), e, weight)
                del log_probs
        return *gradients.pair(), None, None, None


class ChunkedCrossEntropy(torch.autograd.Function):
    """-sum of shares (m,) * log-probs, for `linear_cross_entropy` beyond one chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        embeds: Tensor,
        weight: Tensor,
        targets: Tensor,
        shares: Tensor,
        scale: float,
        tied: list[Tensor] | None,
        rounded: bool,
    ) -> Tensor:
        needed = ctx.needs_input_grad[:2]
        gradients, total = Gradients(embeds, weight, needed), torch.zeros((), device=embeds.device)
        for e, t, share in chunks(weight, embeds, targets, shares):
            log_probs = chunk_log_probs(e, weight, scale, rounded)
            total -= share @ log_probs.gather(-1, t[:, None]).squeeze(-1)
            if any(needed):
                gradients.add(to_gradient_of_logits(log_probs, t, -share, scale), e, weight)
            del log_probs  # or two chunks would be in memory
        ctx.gradients, ctx.tied = gradients.pair(), tied
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the loss's gradients were handed out already: compute it again to go backward again")
        made, ctx.gradients = ctx.gradients, None
        to_embeds, to_weight = (None if t is None else t.mul_(gradient) for t in made)
        if ctx.tied is not None and to_weight is not None:
            ctx.tied.append(to_weight)
            to_weight = None
        return to_embeds, to_weight, None, None, None, None, None


class Lookup(torch.autograd.Function):
    """Rows of a weight (v, d) that is the vocabulary's too: ids (b, n) -> (b, n, d).

    Through the list `tied`, which `linear_cross_entropy` gets as well, the vocabulary's gradient comes here, where the
    rows' own is added to it: otherwise there would be two tensors as large as the weight.
    """

    @staticmethod
    def usable(ids: Tensor, weight: Tensor) -> bool:
        """Where the loss goes in chunks, in the weight's own precision, and nothing compiles it."""
        plain = torch.is_autocast_enabled(weight.device.type) or torch.compiler.is_compiling()
        return weight.requires_grad and ids.numel() > rows_of_chunk(weight) and not plain

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied: list[Tensor]) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.tied = tied
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        ids, weight = ctx.saved_tensors
        total = ctx.tied.pop() if ctx.tied else torch.zeros_like(weight)
        return None, total.index_add_(0, ids.flatten(), gradient.flatten(0, -2)), None
