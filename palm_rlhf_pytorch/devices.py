"""Where to compute."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import AdamW

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """'auto' takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in DEVICES:
        raise ValueError(f"the device is one of {', '.join(DEVICES)}, got {name!r} (CUDA_VISIBLE_DEVICES picks a GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def accelerate_keywords(device: torch.device) -> dict[str, bool]:
    """Keywords with which accelerate takes that device."""
    return {"cpu": device.type == "cpu"}


def accelerator_on(device: torch.device) -> Accelerator:
    return Accelerator(**accelerate_keywords(device))


def fused(optimizer_class: Any, device: torch.device) -> dict[str, bool]:
    """The keyword for AdamW's one-pass kernel, where there is one; nothing for other optimisers."""
    return {"fused": True} if optimizer_class is AdamW and device.type in ("cpu", "cuda") else {}
