"""Directories of models: tensors in one file or in shards, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.tensor_files import SafetensorsFiles, Slot, few

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def tensors_of(directory: Path) -> SafetensorsFiles:
    """The tensors of a directory: of model.safetensors, or of the shards that its index names."""
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return SafetensorsFiles([directory / WEIGHTS])
    if not index.is_file():
        raise FileNotFoundError(f"there is no weights file {str(directory / WEIGHTS)!r}; pickles (.bin) are not read")
    said = weight_map(index)
    for name in sorted(set(said.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{str(index)!r} names the file {name!r}: only .safetensors files beside it are read")
        if not (directory / name).is_file():
            raise ValueError(f"{str(index)!r} names the file {name!r}, which is not there")
    tensors = SafetensorsFiles(directory / name for name in sorted(set(said.values())))
    there = {name: path.name for name, path in tensors.where.items()}
    if there != said:
        differ = sorted(name for name in {*there, *said} if there.get(name) != said.get(name))
        raise ValueError(f"{str(index)!r} and its shards do not agree on where these are: {few(differ)}")
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    found = read_object(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{str(index)!r} has no weight_map of tensor names to file names")
    return found


def read_object(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, got {type(found).__name__}")
    return found


def write_shards(directory: Path, slots: Mapping[str, Slot], dtype: torch.dtype, max_shard_size: int | str) -> None:
    """The slots' tensors as model.safetensors, or as shards with an index; one shard at a time is in memory."""
    sizes = {name: torch.empty(slot.place.shape, dtype=dtype, device="meta") for name, slot in slots.items()}
    split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: slots[name].get(dtype) for name in names}, directory / file, {"format": "pt"})
    if split.is_sharded:
        write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


@contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """Yield an empty directory to write to, which becomes `directory`, or whose files go there, once all is written.

    Weights that this replaces (shards, where there are fewer now) are removed; other files stay. When the block
    raises, nothing has changed.
    """
    final = Path(directory).absolute()
    # within what is there, because only on its own disk can files be renamed into it
    staging = (final if final.exists() else final.parent) / f".{secrets.token_hex(4)}.{final.name}"
    staging.mkdir(parents=True)
    try:
        yield staging
        if not final.exists():
            os.rename(staging, final)
            return
        written = sorted((file.name for file in staging.iterdir()), key=arrival)
        stale = [f for f in final.iterdir() if ALL_WEIGHTS.fullmatch(f.name) and f.name not in written]
        for name in written:
            if (final / name).is_dir():  # which cannot be replaced at once
                shutil.rmtree(final / name)
            os.replace(staging / name, final / name)
        for file in stale if any(ALL_WEIGHTS.fullmatch(name) for name in written) else ():
            file.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def arrival(name: str) -> tuple[int, str]:
    """Weights come first, then what points to them, and last what says how to read them."""
    return {INDEX: 1, "config.json": 2}.get(name, 0), name
