"""What the training commands share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palm_rlhf_pytorch.devices import choose_device
from palm_rlhf_pytorch.flags import option


@dataclass(frozen=True)
class RunOptions:
    """Where and how to run"""

    resume: bool = option(False, "go on with the run in --out from its last checkpoint")
    device: str = option("auto", "cpu, cuda, or auto")

    def start(self, seed: int) -> torch.device:
        torch.manual_seed(seed)
        return choose_device(self.device)
