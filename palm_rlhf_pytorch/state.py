"""Training states on disk: nested dicts of tensors and plain values, enough to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from palm_rlhf_pytorch.checkpoint import reason
from palm_rlhf_pytorch.files import atomic_path


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a state, atomically."""
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a state that says it is of this kind. Only tensors and plain values are read, no code is ever run."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make torch.load raise nearly anything
        raise ValueError(
            f"{str(path)!r} is not a whole checkpoint (nothing in it was executed): {reason(error)}"
        ) from None
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        raise ValueError(f"{str(path)!r} is no {kind} checkpoint (it says {found!r}); weights load by PaLM.load")
    return state


def hyper_parameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each of its groups: learning rate, betas and the like."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def restore_optimizer(
    optimizer: Optimizer,
    state: dict[str, Any],
    own: list[dict[str, Any]],
    saved: list[dict[str, Any]] | None = None,
) -> None:
    """Take up a state's moments, but with `own` hyper-parameters. saved: those that its run began with; where they are
    as `own`, what they had become (by a schedule, say) is taken up too.
    """
    optimizer.load_state_dict(state)
    for group, now, before in zip(optimizer.param_groups, own, saved or [{}] * len(own), strict=True):
        group.update({k: v for k, v in now.items() if k not in before or before[k] != v})


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the tensors' bits, the same on every device."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def random_state() -> dict[str, Tensor]:
    """torch's global random state, the current GPU's too: what dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go back to what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
