"""Makes random checkpoints, and loads them."""

from __future__ import annotations

import time
from typing import Any

import torch
from serving import host_mib, serve

from palm_rlhf_pytorch import PaLM


def make(directory: str, dtype: str, format: str, max_shard_size: str, **sizes: Any) -> None:
    """A random PaLM on disk: Cohere's format, ours, or a state dict as the reference saves it."""
    palm = PaLM(**sizes, use_xpos=False).to(getattr(torch, dtype))
    if format == "reference":
        torch.save(dict(palm.state_dict()), f"{directory}.pt")
    else:
        palm.save_pretrained(directory, format, max_shard_size=max_shard_size)


def load(path: str, dtype: str | None, device: str) -> dict[str, float]:
    """Bytes of the model that is loaded, and seconds; the model is let go again."""
    started = time.perf_counter()
    palm = PaLM.from_pretrained(path, dtype=dtype, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "mib": sum(p.nbytes for p in palm.parameters()) / 2**20, "resident": host_mib("VmRSS")}


if __name__ == "__main__":
    serve({"make": make, "load": load})
