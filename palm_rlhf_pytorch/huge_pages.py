"""Memory in pages of 2 MiB: what is read from end to end at every step is read faster, for fewer addresses are looked
up. It is asked of the system anew, for a heap's memory keeps the small pages it once had; only of Linux, which may
refuse.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from palm_rlhf_pytorch.products import only_computed

PAGE = 2**21
FEWEST = 8  # pages: what is smaller is looked up fast enough in small ones, and may take what a heap has at hand


def zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros with the dtype and device of `like`: on a CPU if they are many in large pages, and in no memory until they
    are written to.
    """
    size = prod(shape) * like.element_size()
    if size < FEWEST * PAGE or like.device.type != "cpu" or sys.platform != "linux" or not only_computed(like):
        return like.new_zeros(shape)
    try:
        memory = mmap.mmap(-1, (-(-size // PAGE) + 1) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # there is not so much: torch says so in its own way
        return like.new_zeros(shape)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE  # of the first whole page
    return torch.frombuffer(memory, dtype=like.dtype, count=prod(shape), offset=begin).view(shape)
