"""Weights on disk: safetensors with the constructor's keywords inside; the reference's files read, never executed."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palm_rlhf_pytorch.files import atomic_path

logger = logging.getLogger(__name__)

CONFIG = "palm_rlhf_pytorch"  # the one metadata key: with two, safetensors would write them in any order
# keywords that no tensor's shape tells, and that change what the tensors compute
MEANING = ("causal", "use_xpos", "rotary_theta", "rotary_xpos_scale_base", "norm_eps", "logit_scale")
GENERATIONS = ("0.2", "0.8")  # of the reference: the gain is gamma, or gamma + 1


def detect_generation(gammas: list[Tensor]) -> str:
    """'0.2' where most gammas are nearer to 1 (they multiply), '0.8' where nearer to 0 (gamma + 1 multiplies)."""
    values = torch.cat([g.flatten().float() for g in gammas])
    return "0.2" if (values > 0.5).float().mean() > 0.5 else "0.8"


def adopt_reference_weights(
    module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict, *_: object
) -> None:
    """Load-state-dict hook of PaLM: weights that ours did not write are told apart and brought to gamma + 1."""
    tied = f"{prefix}token_emb.weight"
    if tied in state:
        state.setdefault(f"{prefix}to_logits.weight", state[tied])
    names = [k for k in state if k.startswith(prefix) and k.endswith("norm.gamma")]
    if metadata.get("version", 1) >= module._version or not names:
        return
    generation = metadata.get("generation")
    if generation is None:
        generation = detect_generation([state[k] for k in names])
        logger.warning(
            "These weights are taken for the reference's generation %s: their gammas are mostly near %s. "
            "If that is wrong, load the file with generation='%s'.",
            generation,
            *(("1", "0.8") if generation == "0.2" else ("0", "0.2")),
        )
    if generation == "0.2":
        for name in names:
            state[name] = state[name] - 1


def read_weights(path: str | Path, only_config: bool = False) -> tuple[OrderedDict[str, Tensor], dict | None]:
    """A .safetensors or .pt file -> tensors by name, and the constructor's keywords if ours wrote it.

    With only_config no tensor of a safetensors file is read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {str(path)!r}")
    try:
        if is_safetensors(path):
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = () if only_config else file.keys()
                state = OrderedDict((name, file.get_tensor(name)) for name in names)
            return state, json.loads(metadata[CONFIG]) if CONFIG in metadata else None
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make torch.load raise nearly anything: KeyError, IndexError, OSError
        raise ValueError(
            f"{str(path)!r} is not a whole weights file of tensors only (nothing in it was executed): {reason(error)}"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{str(path)!r} holds {type(state).__name__}, a state dict of tensors is needed")
    return state, None


def is_safetensors(path: Path) -> bool:
    """By the file's beginning, whatever its name: the length of a JSON header in 8 bytes, then the header."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def reason(error: Exception) -> str:
    """What is wrong in a few words: the code that a pickle wanted to run, without torch's advice to run it."""
    forbidden = re.search(r"GLOBAL (\S+)", str(error))
    if forbidden:
        return f"it wants to run {forbidden[1]}"
    if isinstance(error, pickle.UnpicklingError):
        return "it is no pickle of tensors"
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def read_config(path: str | Path) -> dict:
    """The constructor's keywords inside a file that ours wrote."""
    _, config = read_weights(path, only_config=True)
    if config is None:
        raise ValueError(f"{str(path)!r} was not written by palm_rlhf_pytorch: build the model, then load it")
    return config


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name -> the first name under which the same memory stands (tied embeddings, shared buffers)."""
    first: dict[tuple, str] = {}
    keys = {name: (t.data_ptr(), t.shape) if t.numel() else name for name, t in state.items()}
    return {name: first.setdefault(key, name) for name, key in keys.items()}


def save_weights(path: str | Path, state: Mapping[str, Tensor], config: Mapping) -> None:
    """Write a state dict as safetensors, tensors that share memory once, with the constructor's keywords."""
    once = {name: state[name].contiguous() for name in dict.fromkeys(first_names(state).values())}
    with atomic_path(path) as temporary:
        save_file(once, temporary, {CONFIG: json.dumps(config)})


def warn_of_differences(path: str | Path, theirs: Mapping, ours: Mapping) -> None:
    """Say which keywords the weights were trained with otherwise, of those that change what they compute."""
    theirs, ours = (config.get("palm", config) for config in (theirs, ours))
    differ = [f"{k}={theirs[k]} (here {ours[k]})" for k in MEANING if k in theirs and theirs[k] != ours[k]]
    if differ:
        logger.warning(
            "The weights in %s were saved with %s: they compute something else here.", path, ", ".join(differ)
        )


def load_weights(module: nn.Module, path: str | Path, generation: str | None = None) -> dict | None:
    """Load a file into a PaLM or a RewardModel; names and shapes must match, what does not is named.

    Returns the constructor's keywords inside, if ours wrote the file.
    """
    if generation is not None and generation not in GENERATIONS:
        raise ValueError(f"generation is one of {GENERATIONS}, or None to look, got {generation!r}")
    state, config = read_weights(path)
    own = module.state_dict()
    if config is not None:
        warn_of_differences(path, config, module.whole_config)
        for name, first in first_names(own).items():
            if name not in state and first in state:
                state[name] = state[first]
        state._metadata = own._metadata
    if generation is not None:
        state = OrderedDict(state)
        state._metadata = OrderedDict((name, {"generation": generation}) for name in own._metadata)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reasons = "; ".join(line.strip() for line in str(error).split("\n")[1:4])
        raise ValueError(f"{str(path)!r} does not fit this {type(module).__name__}: {reasons[:400]}") from None
    return config
