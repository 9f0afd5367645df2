"""What the machine can do at most: matrix products and copies, each the best of ten runs after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from serving import serve


def best_seconds(work: Callable[[], object], device: str, runs: int = 10) -> float:
    """The shortest of `runs` runs."""
    seconds = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[2:])


def matmul(device: str, dtype: str = "float32") -> dict[str, float]:
    """n x n by n x n, n = 2,048 on a CPU and 8,192 on a GPU: 2 n^3 operations."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return {"operations_per_second": 2 * n**3 / best_seconds(lambda: a @ b, device)}


def copy(device: str, mib: int = 1024) -> dict[str, float]:
    """An array that no cache holds, copied: each byte is read once and written once."""
    a = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    b = torch.full_like(a, 2)
    return {"bytes_per_second": 2 * a.numel() / best_seconds(lambda: b.copy_(a), device)}


if __name__ == "__main__":
    serve({"matmul": matmul, "copy": copy})
