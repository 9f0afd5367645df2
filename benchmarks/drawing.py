"""Tokens drawn from logits: ours in C++ and torch's operations, in turn in one process, on the CPU.

python benchmarks/drawing.py
"""

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from twins import in_turn, options_of, show

from palm_rlhf_pytorch import native_draw
from palm_rlhf_pytorch.generation import Sampling
from palm_rlhf_pytorch.utils import top_k

SIZES = ((1, 256), (64, 256), (1, 50_257), (16, 20_000), (64, 20_000))  # rows, vocabulary
SAMPLINGS = {
    "all": Sampling(),
    "generate's default: the tenth that is largest": Sampling(filter_logits=partial(top_k, thres=0.9)),
    "top_k=50": Sampling(top_k=50),
    "top_p=0.9": Sampling(top_p=0.9),
}


def by_torch(sampling: Sampling, logits: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    with patch.object(native_draw, "fits", lambda _: False):
        return sampling.draw(logits, generator)


def row(rows: int, vocabulary: int, name: str, repeats: int) -> dict[str, str]:
    sampling, logits = SAMPLINGS[name], 3 * torch.randn(rows, vocabulary)
    ours, theirs = (
        draw(logits, torch.Generator().manual_seed(0)) for draw in (sampling.draw, partial(by_torch, sampling))
    )
    same = (ours[0] == theirs[0]).float().mean()
    if same < 0.98:  # rounding may make another one of a few
        raise SystemExit(f"of the same random numbers only {same:.0%} of the tokens are the same")
    cells, _ = in_turn(partial(by_torch, sampling, logits), partial(sampling.draw, logits), repeats)
    return {"rows, vocabulary": f"{rows}, {vocabulary}", "kept": name, **cells}


def main() -> None:
    options = options_of(__doc__)
    if not native_draw.fits(torch.zeros(1, 1)):
        raise SystemExit("draw.cpp does not work here: is there a C++ compiler?")
    rows = [row(*size, name, options.repeats) for size in SIZES for name in SAMPLINGS]
    show("drawing, cpu", rows, "Normal logits of deviation 3.", options)


if __name__ == "__main__":
    main()
