"""Large products, as training multiplies: ours in C++ and torch's library, in turn in one process, on the CPU.

python benchmarks/products.py
"""

from functools import partial

import torch
from harness import limits
from torch import Tensor
from twins import in_turn, options_of, show

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


def ours(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b.t())


def row(shape: tuple[int, int, int], name: str, a: Tensor, b: Tensor, repeats: int, matmul: float) -> dict[str, str]:
    """Both, once they are seen to agree."""
    torch.testing.assert_close(ours(a, b), a @ b, rtol=1e-4, atol=1e-3)
    cells, ms = in_turn(partial(torch.mm, a, b), partial(ours, a, b), repeats)
    return {
        "rows, inputs, outputs": ", ".join(map(str, shape)),
        "product": name,
        **cells,
        "share of matmul peak": f"{2 * a.numel() * b.shape[1] / ms * 1e3 / matmul:.0%}",
    }


def main() -> None:
    options = options_of(__doc__)
    if library("product") is None:
        raise SystemExit("product.cpp does not work here: is there a C++ compiler?")
    limit = limits("cpu", "float32", options.threads)
    rows = [
        row(shape, name, a, b, options.repeats, limit.matmul)
        for shape in OF_PPO + OF_TRAINING
        for name, (a, b) in factors(*shape).items()
    ]
    side = "ours" if ours_is_faster() else "torch"
    show("products, cpu", rows, f"Models on this processor multiply by {side}. {limit}", options)


if __name__ == "__main__":
    main()
