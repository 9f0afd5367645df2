"""What a checkpoint is: its constructor's keywords, its tensors, and where in a model these go."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from beartype.roar import BeartypeCallHintViolation
from torch import nn
from torch.overrides import TorchFunctionMode

from palm_rlhf_pytorch import cohere, cohere_config
from palm_rlhf_pytorch.adapters import CONFIG_FILE as ADAPTER_CONFIG
from palm_rlhf_pytorch.checkpoint import (
    PRETRAINED,
    config_in,
    first_names,
    is_safetensors,
    noted_in,
    refuse_hugging_face,
    tell_generation,
)
from palm_rlhf_pytorch.directories import WEIGHTS, read_object, tensors_of
from palm_rlhf_pytorch.hub import LIBRARY
from palm_rlhf_pytorch.tensor_files import (
    FLOATING,
    SafetensorsFiles,
    Slot,
    Tensors,
    TorchFile,
    check_fit,
    fill,
    materialize,
)

Layout = tuple[Mapping[str, Slot], Mapping[str, str]]  # slots, and the names that may repeat one of them
# what a caller may choose for any checkpoint, because no weight depends on it
FREE = ("attn_dropout", "ff_dropout", "flash_attn", "cross_entropy_ignore_index", "gradient_checkpointing")
FREE_LORA = ("lora_r", "lora_alpha", "lora_rslora", "lora_ff")


@dataclass(frozen=True)
class Source:
    """A checkpoint: the constructor's keywords for it, its tensors, and where in the model these go."""

    where: Path
    keywords: dict[str, Any]
    tensors: Tensors
    layout: Callable[[Any], Layout]
    passed_over: str = "$^"  # a pattern in names that are not needed
    compute: Callable[[Any], None] = lambda module: None  # what the model has and the file does not
    serving: dict[str, Any] = field(default_factory=dict)  # what config.json says beyond the constructor


def source_of(path: Path, generation: str | None, overrides: Mapping[str, Any]) -> Source:
    """What lies at a path: a directory of Hugging Face's or ours, or a file of ours or the reference's."""
    if path.is_file():
        return source_in_file(path, generation, overrides)
    config = read_object(path / "config.json") if (path / "config.json").is_file() else {}
    kind = config.get("model_type")
    serving = serving_in(path, config)
    if kind in [*cohere_config.ARCHITECTURES]:  # a list, for whatever config.json says
        tensors, keywords = tensors_of(path), cohere_config.keywords_of(config)
        return Source(path, keywords, tensors, cohere.layout, cohere.NOT_NEEDED, cohere.compute_frequencies, serving)
    if kind not in (None, LIBRARY):
        raise ValueError(
            f"{str(path)!r} holds a model of type {kind!r}: {[*cohere_config.ARCHITECTURES]} and our own can be loaded"
        )
    if (path / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{str(path)!r} holds an adapter: load the model that it belongs to, then palm.load_adapter")
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{str(path)!r} does not hold a language model: {WEIGHTS} is missing")
    source = source_in_file(path / WEIGHTS, generation, overrides)
    source.serving.update(serving)
    return source


def serving_in(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a directory says beyond the constructor: of special ids generation_config.json, as in transformers, before
    config.json.
    """
    ids = path / "generation_config.json"
    first = read_object(ids) if ids.is_file() else {}
    said = {**config, **{name: value for name, value in first.items() if value is not None}}
    found = {name: said[name] for name in (*cohere_config.SERVING, "base_model") if said.get(name) is not None}
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


def source_in_file(path: Path, generation: str | None, overrides: Mapping[str, Any]) -> Source:
    """Ours says in the file what it is; the reference's is told by its shapes, and its generation by its gammas."""
    if is_safetensors(path):
        tensors, ours = SafetensorsFiles([path]), False
        keywords = config_in(path, tensors.metadata)
        if keywords is not None:
            if "palm" in keywords:
                raise ValueError(f"{str(path)!r} holds a reward model: RewardModel.from_pretrained loads it")
            pretrained = noted_in(path, tensors.metadata).get(PRETRAINED, {})
            return Source(path, keywords, tensors, state_layout, serving=pretrained)
    else:
        tensors = TorchFile(path)
        ours = tensors.version > 1
    refuse_hugging_face(path, tensors.shapes)
    keywords = sizes_of(path, tensors.shapes, overrides)
    if generation is None and not ours:
        generation = tell_generation([tensors.read(name) for name in tensors.shapes if name.endswith("norm.gamma")])
    return Source(path, keywords, tensors, lambda palm: state_layout(palm, whole_gains=generation == "0.2"))


def sizes_of(path: Path, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's keywords that give a state dict its shapes; those given count where shapes leave a choice."""
    block = "layers.0.fn."
    try:
        num_tokens, dim = shapes["token_emb.weight"]
        rows, _ = shapes[f"{block}fused_attn_ff_proj.weight"]
        _, attn_inner = shapes[f"{block}attn_out.weight"]
        _, ff_inner = shapes[f"{block}ff_out.2.weight"]
    except (KeyError, ValueError):
        raise ValueError(f"{str(path)!r} is not a PaLM's weights: the tensors of its first layer are missing") from None
    both = (rows - attn_inner) // 2 - ff_inner  # of keys, and of values
    dim_head = given.get("dim_head", 2 * shapes.get(f"{block}rotary_emb.inv_freq", (both // 2,))[0])  # one head each
    heads, kv_heads = (given.get(k, n // max(1, dim_head)) for k, n in (("heads", attn_inner), ("kv_heads", both)))
    if dim_head < 2 or heads * dim_head != attn_inner or attn_inner + 2 * (kv_heads * dim_head + ff_inner) != rows:
        raise ValueError(f"the heads of {str(path)!r} cannot be told by its shapes: give heads, dim_head and kv_heads")
    layers = {name.split(".")[1] for name in shapes if re.match(r"layers\.\d+\.", name)}
    adapters = (re.fullmatch(r"finetune_modules\.(.+)\.0\.0\.A", name) for name in shapes)
    found = dict(
        num_tokens=num_tokens,
        dim=dim,
        depth=len(layers),
        heads=heads,
        kv_heads=kv_heads,
        dim_head=dim_head,
        ff_inner_dim=ff_inner,
        qk_rmsnorm=f"{block}q_scale" in shapes,
        finetune_scopes={m[1]: shapes[m[0]][1] for m in adapters if m},
    )
    return {**found, **given}


def state_layout(module: nn.Module, whole_gains: bool = False) -> Layout:
    """The layout of a state dict."""
    state = module.state_dict()
    first = first_names(state)
    once = dict.fromkeys(first.values())
    slots = {name: Slot(state[name], gain=whole_gains and name.endswith("norm.gamma")) for name in once}
    return slots, {name: one for name, one in first.items() if name != one}


def chosen(source: Source, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords to build with; what the weights fix cannot be chosen otherwise."""
    for name, value in overrides.items():
        said = source.keywords.get(name, value)
        if name not in (*FREE, *FREE_LORA) and said != value:
            raise ValueError(f"{name} cannot be {value!r}: for {str(source.where)!r} it is {said!r}, leave it out")
    return {**source.keywords, **{name: value for name, value in overrides.items() if name not in FREE_LORA}}


def check_depth(where: Path, depth: Any, tensors: Tensors) -> None:
    """Layers are made before their tensors are looked for, and even without memory a million takes long."""
    if isinstance(depth, int) and depth > len(tensors.shapes):
        raise ValueError(f"{str(where)!r} says that there are {depth} layers, but holds {len(tensors.shapes)} tensors")


class Unmade(TorchFunctionMode):
    """Weights are made on the meta device, without memory, and not initialised. With `torch.device("meta")` positions
    and random numbers would be made there too, for which torch imports 800 modules (77 MiB).
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", *args[:1])
        where = {"device": "meta"} if func in (torch.empty, torch.randn) else {}
        return func(*args, **{**kwargs, **where})


def unmade(where: Path, make: Callable[[], nn.Module]) -> nn.Module:
    """A module without memory. Keywords out of a file may be anything."""
    try:
        with Unmade():
            return make()
    except (TypeError, OverflowError, RuntimeError, BeartypeCallHintViolation) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{str(where)!r} does not say how its model is made: {reason}") from None


def load_into(module: nn.Module, source: Source, dtype: torch.dtype | str | None, device: Any) -> None:
    """Give a module on the meta device memory, and fill it piece by piece: no tensor is in memory twice. What does not
    fit is refused before.
    """
    check_fit(source.where, *source.layout(module), source.tensors, source.passed_over)
    module.to(stored_dtype(source.tensors) if dtype is None else floating(dtype))
    materialize(module, torch.device("cpu" if device is None else device))
    fill(source.where, *source.layout(module), source.tensors)
    source.compute(module)


def stored_dtype(tensors: Tensors) -> torch.dtype:
    """The embedding's: norms and adapters may be kept wider."""
    names = [name for name in tensors.shapes if name.endswith(("token_emb.weight", "embed_tokens.weight"))]
    return floating(tensors.read(names[0], 0, 1).dtype) if names else torch.float32


def floating(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in FLOATING:
        raise ValueError(f"weights are float32, bfloat16, float16 or float64, got {dtype}")
    return found
