"""Large products, as training multiplies: ours in C++ and torch's library, in turn in one process, on the CPU.

python benchmarks/products.py
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from harness import limits, record, table, three
from torch import Tensor

from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_product import product
from palm_rlhf_pytorch.products import ours_is_faster

# rows, inputs, outputs: into a block, out of its feedforward and of its attention
OF_PPO = ((1280, 256, 2432), (1280, 1024, 256), (1280, 256, 256))  # a minibatch of rl_iteration.py
OF_TRAINING = ((2048, 512, 4736), (2048, 2048, 512), (2048, 512, 512))


def factors(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What is multiplied to go forward, and for the gradients of x and of the weight: a (m, k) and b (k, n) each."""
    x, weight, gradient = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    return {"forward": (x, weight.t()), "to x": (gradient, weight), "to weight": (gradient.t(), x)}


def seconds(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> float:
    started = time.perf_counter()
    multiply(a, b)
    return time.perf_counter() - started


def ours(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b.t())


def row(shape: tuple[int, int, int], name: str, a: Tensor, b: Tensor, repeats: int, matmul: float) -> dict[str, str]:
    """Medians and quartiles of both, after a warm-up in which they are seen to agree."""
    torch.testing.assert_close(ours(a, b), a @ b, rtol=1e-4, atol=1e-3)
    spent = {multiply: [] for multiply in (torch.mm, ours)}
    for _ in range(repeats + 1):
        for multiply, found in spent.items():
            found.append(seconds(multiply, a, b))
    (torch_low, torch_ms, torch_high), (low, ms, high) = (
        [1e3 * q for q in statistics.quantiles(found[1:], n=4)] for found in spent.values()
    )
    return {
        "rows, inputs, outputs": ", ".join(map(str, shape)),
        "product": name,
        "torch, ms": f"{three(torch_ms)} ({three(torch_low)} to {three(torch_high)})",
        "ours, ms": f"{three(ms)} ({three(low)} to {three(high)})",
        "times as fast": f"{torch_ms / ms:.2f}",
        "share of matmul peak": f"{2 * a.numel() * b.shape[1] / ms * 1e3 / matmul:.0%}",
    }


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both")
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each, in turn, after a warm-up")
    parser.add_argument("--record", action="store_true", help="also write the result into benchmarks/RESULTS.md")
    options = parser.parse_args()
    if library("product") is None:
        raise SystemExit("product.cpp does not work here: is there a C++ compiler?")
    torch.set_num_threads(options.threads)
    limit = limits("cpu", "float32", options.threads)
    rows = [
        row(shape, name, a, b, options.repeats, limit.matmul)
        for shape in OF_PPO + OF_TRAINING
        for name, (a, b) in factors(*shape).items()
    ]
    shown = table(rows)
    notes = (
        f"float32, {options.threads} threads; medians and quartiles of {options.repeats}. Models on this processor "
        f"multiply by {'ours' if ours_is_faster() else 'torch'}. {limit}"
    )
    print(shown, notes, sep="\n\n")
    if options.record:
        record("products, cpu", shown, notes)


if __name__ == "__main__":
    main()
