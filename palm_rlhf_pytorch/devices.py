"""Where to compute."""

from __future__ import annotations

import torch
from accelerate import Accelerator


def choose_device(name: str) -> torch.device:
    """'auto' takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device is auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA GPU here; use --device cpu")
    return device


def accelerate_keywords(device: torch.device) -> dict[str, bool]:
    """Keywords with which accelerate takes that device."""
    return {"cpu": device.type == "cpu"}


def accelerator_on(device: torch.device) -> Accelerator:
    return Accelerator(**accelerate_keywords(device))
