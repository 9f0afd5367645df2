"""Weights on disk: safetensors with the constructor's keywords inside; the reference's files read, never executed."""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palm_rlhf_pytorch.files import atomic_path

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"  # beside the constructor's keywords, which have no such name
CONFIG = "palm_rlhf_pytorch"  # the one metadata key: with two, safetensors would write them in any order
# keywords that no tensor's shape tells, and that change what the tensors compute
MEANING = ("causal", "use_xpos", "rotary_theta", "rotary_xpos_scale_base", "norm_eps", "logit_scale")
GENERATIONS = ("0.2", "0.8")  # of the reference: the gain is gamma, or gamma + 1


def detect_generation(gammas: list[Tensor]) -> str:
    """'0.2' where most gammas are nearer to 1 (they multiply), '0.8' where nearer to 0 (gamma + 1 multiplies)."""
    values = torch.cat([g.flatten().float() for g in gammas])
    return "0.2" if (values > 0.5).float().mean() > 0.5 else "0.8"


def tell_generation(gammas: list[Tensor]) -> str:
    """`detect_generation`, and say which it took."""
    generation = detect_generation(gammas)
    logger.warning(
        "These weights are taken for the reference's generation %s: their gammas are mostly near %s. "
        "If that is wrong, load the file with generation='%s'.",
        generation,
        *(("1", "0.8") if generation == "0.2" else ("0", "0.2")),
    )
    return generation


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
    generation = metadata.get("generation") or tell_generation([state[k] for k in names])
    if generation == "0.2":
        for name in names:
            state[name] = state[name] - 1


def read_weights(
    path: str | Path, only_config: bool = False, mapped: bool = False
) -> tuple[OrderedDict[str, Tensor], dict | None]:
    """A .safetensors or .pt file -> tensors by name, and the constructor's keywords if ours wrote it.

    With only_config no tensor of a safetensors file is read. mapped: those of a .pt file are read when they are used,
    and `check_sums` is the caller's business.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {str(path)!r}")
    if is_safetensors(path):
        with open_safetensors(path) as file:
            names = () if only_config else file.keys()
            return OrderedDict((name, file.get_tensor(name)) for name in names), noted_in(path, file.metadata())
    try:
        if not mapped:
            check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # broken bytes make torch.load raise nearly anything: KeyError, IndexError, OSError
        raise refusal(path, error) from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{str(path)!r} holds {type(state).__name__}, a state dict of tensors is needed")
    return state, None


def check_sums(path: Path) -> None:
    """Refuse a .pt file whose bytes are not those that were written: it is a zip file, and torch checks no sums."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has another checksum than when it was written")


def open_safetensors(path: Path) -> Any:
    """A .safetensors file, mapped; its header, which says what lies where, is checked against its length."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {str(path)!r}")
    try:
        return safe_open(path, "pt")
    except Exception as error:  # SafetensorError, OSError
        raise refusal(path, error) from None


def refuse_hugging_face(path: str | Path, names: Iterable[str]) -> None:
    if "model.embed_tokens.weight" in names:
        raise ValueError(
            f"{str(path)!r} is a file of a Hugging Face model: PaLM.from_pretrained loads the directory around it"
        )


def refusal(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{str(path)!r} is not a whole weights file of tensors only (nothing in it was executed): {reason(error)}"
    )


def config_in(path: Path, metadata: Mapping[str, str] | None) -> dict | None:
    """The constructor's keywords in a file's metadata, None where ours did not write it."""
    noted = noted_in(path, metadata)
    return None if noted is None else {name: value for name, value in noted.items() if name != PRETRAINED}


def noted_in(path: Path, metadata: Mapping[str, str] | None) -> dict | None:
    """All that `save_weights` noted."""
    if CONFIG not in (metadata or {}):
        return None
    try:
        noted = json.loads(metadata[CONFIG])
    except (ValueError, RecursionError) as error:
        raise refusal(path, error) from None
    if not isinstance(noted, dict):
        raise refusal(path, TypeError(f"its metadata holds {type(noted).__name__}, not the constructor's keywords"))
    return noted


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
    config.pop(PRETRAINED, None)
    return config


def first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name -> the first name under which the same memory stands (tied embeddings, shared buffers)."""
    first: dict[tuple, str] = {}
    keys = {name: (t.untyped_storage()._cdata, t.storage_offset(), t.shape) for name, t in state.items()}  # on meta too
    return {name: first.setdefault(key, name) for name, key in keys.items()}


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], config: Mapping, pretrained: Mapping[str, Any] | None = None
) -> None:
    """Write a state dict as safetensors, tensors that share memory once, with the constructor's keywords, and what else
    is to be kept of the checkpoint that the weights come from.
    """
    noted = {**config, PRETRAINED: dict(pretrained)} if pretrained else config
    once = {name: state[name].contiguous() for name in dict.fromkeys(first_names(state).values())}
    with atomic_path(path) as temporary:
        save_file(once, temporary, {CONFIG: json.dumps(noted)})


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
    refuse_hugging_face(path, state)
    own = module.state_dict()
    if config is not None:
        module.pretrained = config.pop(PRETRAINED, {})
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
