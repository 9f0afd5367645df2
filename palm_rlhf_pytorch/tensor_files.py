"""Tensors of files, read piece by piece straight into a model's memory."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.checkpoint import check_sums, open_safetensors, read_weights, refusal

PIECE = 2**24  # bytes read at once, which is all that loading holds beside the model
# what weights are; anything narrower is quantised, and of another worth than its numbers
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a file lies in a model: `place` is a view into its memory, of the file's shape.

    gain: the file says a gain, the model keeps gain - 1. dim_head: each head's rows stand in other order, because the
    file's rotary embedding turns neighbours (2 i, 2 i + 1) and the model's the halves (i, i + dim_head / 2).
    """

    place: Tensor
    gain: bool = False
    dim_head: int = 0

    def put(self, rows: Tensor, start: int) -> None:
        """Rows of the file's tensor, from `start` on, into their place."""
        rows = exactly(rows) - 1 if self.gain else rows
        self.place[start : start + len(rows)].copy_(self._transposed(rows, self.dim_head // 2, 2))

    def get(self, dtype: torch.dtype) -> Tensor:
        """The whole tensor as the file has it, on the CPU."""
        whole = exactly(self.place) + 1 if self.gain else self.place
        return self._transposed(whole, 2, self.dim_head // 2).to("cpu", dtype).contiguous()

    def _transposed(self, t: Tensor, first: int, second: int) -> Tensor:
        """Each head's (first, second) turned into (second, first). A gain has all heads in one row each."""
        if not self.dim_head:
            return t
        width = 1 if self.gain else t.shape[-1]
        return t.reshape(-1, first, second, width).transpose(1, 2).reshape(t.shape)

    def pieces(self) -> Iterator[tuple[int, int]]:
        """From which row to which is read at once: whole heads, in few bytes."""
        rows, heads = len(self.place), self.dim_head or 1
        step = max(1, PIECE // max(1, 4 * self.place[0].numel()) // heads) * heads
        yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def exactly(t: Tensor) -> Tensor:
    """In float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class SafetensorsFiles:
    """The tensors of one or several .safetensors files by name; only headers are read before `read`."""

    def __init__(self, paths: Iterable[Path]):
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            with open_safetensors(path) as file:
                self.metadata.update(file.metadata() or {})
                for name in file.keys():
                    if name in self.where:
                        raise ValueError(f"{str(path)!r} and {self.where[name].name} both hold {name}: one is too many")
                    self.where[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of a tensor. The file is mapped anew each time, so that pages read before are let go."""
        with open_safetensors(self.where[name]) as file:
            return file.get_slice(name)[start : self.shapes[name][0] if stop is None else stop]

    def release(self, name: str) -> None:
        """Nothing is held."""


class TorchFile:
    """The tensors of a .pt file, mapped too, and anew after every piece. Files of torch before 1.6 cannot be mapped:
    their tensors stay in memory until they are in their places.
    """

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self.path, self.mapped, self.touched = path, zipfile.is_zipfile(path), 0
        if self.mapped:
            try:
                check_sums(path)
            except Exception as error:  # as broken as bytes can be
                raise refusal(path, error) from None
        self.state, _ = read_weights(path, mapped=self.mapped)
        self.shapes = {name: tuple(t.shape) for name, t in self.state.items()}
        self.version = getattr(self.state, "_metadata", {}).get("", {}).get("version", 1)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if self.mapped and self.touched >= PIECE:
            self.state, self.touched = read_weights(self.path, mapped=True)[0], 0
        rows = self.state[name][start:stop]
        self.touched += rows.nbytes
        return rows

    def release(self, name: str) -> None:
        if not self.mapped:
            del self.state[name]


Tensors = SafetensorsFiles | TorchFile


@torch.no_grad()
def fill(where: Path, slots: Mapping[str, Slot], twins: Mapping[str, str], tensors: Tensors) -> None:
    """Every slot from the tensor of its name. twins: names that may be there too, and hold what another name holds."""
    for twin, name in twins.items():
        if twin in tensors.shapes:
            if not all(torch.equal(tensors.read(twin, *at), tensors.read(name, *at)) for at in slots[name].pieces()):
                raise ValueError(f"{str(where)!r} keeps {twin} apart from {name}: only tied weights can be taken over")
            tensors.release(twin)
    for name, slot in slots.items():
        for start, stop in slot.pieces():
            slot.put(tensors.read(name, start, stop), start)
        tensors.release(name)


def check_fit(
    where: Path, slots: Mapping[str, Slot], twins: Mapping[str, str], tensors: Tensors, passed_over: str = "$^"
) -> None:
    """Refuse in one sentence what is missing, left over, of another shape or of none of the dtypes that weights have.
    passed_over: a pattern in names that are not needed.
    """
    shapes = {name: tuple(slot.place.shape) for name, slot in slots.items()}
    known = shapes | {twin: shapes[name] for twin, name in twins.items()}
    missing = [name for name in shapes if name not in tensors.shapes]
    left = [name for name in tensors.shapes if name not in known and not re.search(passed_over, name)]
    wrong = [
        f"{name} (is {tensors.shapes[name]}, should be {shape})"
        for name, shape in known.items()
        if tensors.shapes.get(name, shape) != shape
    ]
    refuse_faults(where, {"missing": missing, "left over": left, "of another shape": wrong})
    dtypes = {name: tensors.read(name, 0, 1).dtype for name in slots}
    strange = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in FLOATING]
    refuse_faults(where, {"of another dtype": strange})


def refuse_faults(where: Path, faults: Mapping[str, list[str]]) -> None:
    said = "; ".join(f"{what}: {few(names)}" for what, names in faults.items() if names)
    if said:
        raise ValueError(f"the weights in {str(where)!r} do not fit their model, {said}")


def few(names: list[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give a module new memory on a device: parameters that are not yet written, buffers of zeros. What is tied stays
    tied.
    """
    places: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, p in child.named_parameters(recurse=False):
            if id(p) not in places:
                made = torch.empty(p.shape, dtype=p.dtype, device=device)
                places[id(p)] = nn.Parameter(made, p.requires_grad)
            child._parameters[name] = places[id(p)]
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
