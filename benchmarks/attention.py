"""Attention with and without its gradients: ours in C++ and torch's kernel, in turn in one process, on the CPU.

python benchmarks/attention.py
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import limits
from torch import Tensor
from twins import in_turn, options_of, show

from palm_rlhf_pytorch.fused_attention import fits, fused_attention

# rows, heads, key heads, places, head size: of training, of a PPO minibatch, without shared keys, long, wide
SHAPES = ((4, 8, 1, 512, 64), (16, 4, 1, 80, 64), (4, 8, 8, 512, 64), (1, 8, 1, 2048, 64), (4, 8, 1, 512, 128))


def inputs(b: int, heads: int, kv_heads: int, n: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as a block has them, parts of one matrix, and the gradient of what comes out; all (b, h, n, d)."""
    qkv = torch.randn(b, n, heads + 2 * kv_heads, d)
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in qkv.split((heads, kv_heads, kv_heads), dim=2))
    return q, k, v, torch.randn(b, n, heads, d).transpose(1, 2)


def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As our `Attention` calls torch: a shared head is seen by all through stride 0."""
    if k.shape[1] == 1:
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return fused_attention(q, k, v, causal=True)


def work(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, to_out: Tensor, learns: bool) -> None:
    with torch.set_grad_enabled(learns):
        out = attend(q, k, v)
        if learns:
            torch.autograd.grad(out, (q, k, v), to_out)


def row(shape: tuple[int, ...], learns: bool, repeats: int, matmul: float) -> dict[str, str]:
    """Both, once they are seen to agree."""
    given = inputs(*shape)
    if not fits(*given[:3], causal=True):
        raise SystemExit("attention.cpp does not work here: is there a C++ compiler?")
    torch.testing.assert_close(ours(*given[:3]), theirs(*given[:3]), rtol=1e-4, atol=1e-4)
    cells, ms = in_turn(*(partial(work, attend, *given, learns) for attend in (theirs, ours)), repeats)
    b, heads, _, n, d = shape
    needed = b * heads * n * (n + 1) / 2 * d * 4 * (3.5 if learns else 1.0)  # causal; backward is 2.5 times forward
    return {
        "b, h, kv, n, d": ", ".join(map(str, shape)),
        "pass": "forward and backward" if learns else "forward",
        **cells,
        "share of matmul peak": f"{needed / ms * 1e3 / matmul:.0%}",
    }


def main() -> None:
    options = options_of(__doc__)
    limit = limits("cpu", "float32", options.threads)
    rows = [row(shape, learns, options.repeats, limit.matmul) for shape in SHAPES for learns in (False, True)]
    show("attention, cpu", rows, f"Causal; share: of operations that a causal mask leaves. {limit}", options)


if __name__ == "__main__":
    main()
