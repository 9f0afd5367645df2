"""AdamW that starts at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def unguarded(method: Callable) -> Callable:
    """A method of torch's without what keeps torch's compiler off it."""
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.AdamW):
    """torch's. To keep its compiler off an optimiser's methods, torch imports it with the first call of one: seconds
    (`time python -c "import torch._dynamo"`) and memory. Nobody compiles this one, so these are the methods themselves.
    """

    add_param_group = unguarded(torch.optim.AdamW.add_param_group)
    zero_grad = unguarded(torch.optim.AdamW.zero_grad)
    state_dict = unguarded(torch.optim.AdamW.state_dict)
    load_state_dict = unguarded(torch.optim.AdamW.load_state_dict)

    def step(self, closure: Callable | None = None) -> Any:
        """One step; a closure that computes the loss again is called first."""
        if self.defaults["differentiable"]:
            return super().step(closure)
        with torch.no_grad():
            return unguarded(torch.optim.AdamW.step)(self, closure)
