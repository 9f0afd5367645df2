"""Where to compute, and how exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.optimizers import AdamW

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")


def choose_device(name: str) -> torch.device:
    """'auto' takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in DEVICES:
        raise ValueError(f"the device is one of {', '.join(DEVICES)}, got {name!r} (CUDA_VISIBLE_DEVICES picks a GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no CUDA GPU here; use --device cpu")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> str:
    """'auto' takes bf16 on a GPU that computes in it, not one that only emulates it."""
    if name not in PRECISIONS:
        raise ValueError(f"the precision is one of {', '.join(PRECISIONS)}, got {name!r}")
    if name == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return name


def accelerate_keywords(device: torch.device, precision: str = "fp32") -> dict[str, Any]:
    """Keywords with which accelerate takes that device and precision (weights stay float32, autocast does the rest)."""
    mixed = "bf16" if choose_precision(precision, device) == "bf16" else "no"
    # accelerate has one precision a process, and refuses a second run that wants another
    if AcceleratorState._shared_state and AcceleratorState._shared_state.get("_mixed_precision") != mixed:
        AcceleratorState._reset_state()
    return {"cpu": device.type == "cpu", "mixed_precision": mixed}


def accelerator_on(device: torch.device, precision: str = "fp32") -> Accelerator:
    return Accelerator(**accelerate_keywords(device, precision))


def prepared(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    """What accelerate makes of a module that is on its device already. In one process it is told so: accelerate 1.15
    would else import torch's distributed tensors to see whether these are such, 40 MB.
    """
    alone = accelerator.distributed_type == DistributedType.NO
    return accelerator.prepare(module, optimizer, device_placement=[False, None] if alone else None)


def fused(optimizer_class: Any, device: torch.device) -> dict[str, bool]:
    """The keyword for AdamW's one-pass kernel, where there is one; nothing for other optimisers."""
    known = optimizer_class in (AdamW, torch.optim.AdamW)
    return {"fused": True} if known and device.type in ("cpu", "cuda") else {}


def on_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, None, or a tuple or dict of such, with its tensors changed."""
    if isinstance(batch, tuple):
        return tuple(on_tensors(part, change) for part in batch)
    if isinstance(batch, dict):
        return {name: on_tensors(part, change) for name, part in batch.items()}
    return batch if batch is None else change(batch)


def ready_for(batch: Any, device: torch.device) -> Any:
    """A batch in memory from which that device copies while it computes."""
    return on_tensors(batch, Tensor.pin_memory) if device.type == "cuda" else batch


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch, moved; from pinned memory without waiting for it."""
    return on_tensors(batch, lambda t: t.to(device, non_blocking=t.is_pinned()))
