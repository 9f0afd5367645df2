"""What follows the last layer's keys and values is computed only at places whose final embeddings are wanted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from palm_rlhf_pytorch.products import only_computed

WORTH = 0.95  # of the places; where more are wanted, choosing them costs what it saves


class Places(NamedTuple):
    """m of the places (b, n), all of them in some columns."""

    shape: tuple[int, int]
    index: Tensor  # (m,) counted over b and n, ascending
    columns: slice  # of n

    def of(self, x: Tensor) -> Tensor:
        """x (b, n, ...) -> what it has there (m, ...)."""
        return x.flatten(0, 1).index_select(0, self.index)

    def spread(self, x: Tensor) -> Tensor:
        """x (m, ...) -> (b, n, ...), 0 at other places."""
        b, n = self.shape
        return x.new_zeros(b * n, *x.shape[1:]).index_copy(0, self.index, x).unflatten(0, self.shape)

    def within_columns(self) -> Places:
        """The same, counted over b and their columns alone."""
        (b, n), (start, stop) = self.shape, (self.columns.start, self.columns.stop)
        width = stop - start
        index = self.index - start - self.index.div(n, rounding_mode="floor") * (n - width)
        return Places((b, width), index, slice(0, width))


def worth_it(wanted: Tensor) -> Places | None:
    """The True places of wanted (b, n); None where they are nearly all, or shapes may not hang on the data."""
    if not only_computed(wanted):
        return None
    index = wanted.flatten().nonzero().squeeze(-1)
    if len(index) >= WORTH * wanted.numel():
        return None
    columns = columns_of(wanted) if len(index) else slice(0, 0)
    return Places(tuple(wanted.shape), index, columns)


def columns_of(wanted: Tensor) -> slice:
    """What holds all places of wanted (b, n), of which there are some. On a GPU every column: another look would wait
    for it, and the kernel that is best there takes whole squares.
    """
    if wanted.device.type != "cpu":
        return slice(0, wanted.shape[1])
    held = wanted.any(dim=0).nonzero()
    start, stop = int(held[0]), int(held[-1]) + 1
    # of a causal square a kernel skips half, of a rectangle nothing
    return slice(start if start >= stop / 2 else 0, stop)
