"""LoRA adapters as files of PEFT, for the Hugging Face model that a PaLM is written as."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from palm_rlhf_pytorch.cohere import PROJECTIONS, adapter_slots
from palm_rlhf_pytorch.directories import read_object
from palm_rlhf_pytorch.files import write_json
from palm_rlhf_pytorch.lora import LoraOptions
from palm_rlhf_pytorch.tensor_files import SafetensorsFiles, Slot, check_fit, few, fill, refuse_faults

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MODULES = {name.rpartition(".")[2]: name for name in PROJECTIONS}  # q_proj -> self_attn.q_proj
FEEDFORWARD = set(PROJECTIONS[4:])
# what PEFT can do to a model and adapters of ours cannot, by the value that means no
ABSENT: dict[str, Any] = {
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": False,
    "alora_invocation_tokens": None,
}


def write_adapter(palm: PaLM, scope: str, directory: Path, base: str | None) -> None:
    """The adapters of a scope as adapter_config.json and adapter_model.safetensors. base: the model they stand on."""
    dtype = palm.finetune_parameters(scope)[0].dtype
    slots, options = slots_of(palm, scope), palm.lora_options[scope]
    targets = {name.split(".")[-3] for name in slots}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": options.r,
        "lora_alpha": options.r if options.alpha is None else options.alpha,
        "use_rslora": options.rslora,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "inference_mode": True,
        **{field: ABSENT[field] for field in ("bias", "fan_in_fan_out", "modules_to_save", "use_dora")},
    }
    save_file({name: slot.get(dtype) for name, slot in slots.items()}, directory / WEIGHTS_FILE, {"format": "pt"})
    write_json(directory / CONFIG_FILE, config)


def read_adapter(palm: PaLM, directory: Path, scope: str) -> None:
    """Add a scope with PEFT's adapters. Of modules that these leave out ours do nothing until they are trained."""
    if not (directory / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{str(directory)!r} does not hold a PEFT adapter: {CONFIG_FILE} is missing")
    options = options_of(read_object(directory / CONFIG_FILE))
    tensors = SafetensorsFiles([directory / WEIGHTS_FILE])
    there = {name: re.fullmatch(r".*\.(\w+)\.lora_[AB]\.weight", name) for name in tensors.shapes}
    foreign = [name for name, found in there.items() if not found or found[1] not in MODULES]
    if foreign:
        raise ValueError(f"the adapter in {str(directory)!r} changes {few(foreign)}; it may change {[*MODULES]} only")
    made = [(name, shape, (options.r, *shape[1:])) for name, shape in tensors.shapes.items() if ".lora_A." in name]
    wrong = [f"{name} (is {shape}, should be {should})" for name, shape, should in made if shape != should]
    refuse_faults(directory, {"of another shape": wrong})  # before memory is taken for a rank of any size
    adapts_ff = any(MODULES[found[1]] in FEEDFORWARD for found in there.values())
    keywords = dict(lora_r=options.r, lora_alpha=options.alpha, lora_rslora=options.rslora, lora_ff=adapts_ff)
    palm.add_finetune_params(scope, **keywords)
    try:
        targets = {found[1] for found in there.values()}
        slots = {name: slot for name, slot in slots_of(palm, scope).items() if name.split(".")[-3] in targets}
        check_fit(directory, slots, {}, tensors)
        fill(directory, slots, {}, tensors)
    except Exception:
        palm.remove_finetune_params(scope)
        raise


def options_of(config: dict[str, Any]) -> LoraOptions:
    """Rank, alpha and scaling; anything else that an adapter of PEFT may be is refused by name."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{CONFIG_FILE} says peft_type={config.get('peft_type')!r}: only 'LORA' can be taken over")
    for field, absent in ABSENT.items():
        if config.get(field, absent) not in (absent, None):
            raise ValueError(f"{CONFIG_FILE} says {field}={config[field]!r}: adapters here are without it")
    r, alpha = config.get("r"), config.get("lora_alpha", 8)
    if type(r) is not int or type(alpha) not in (int, float) or r < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"{CONFIG_FILE} says r={r!r} and lora_alpha={alpha!r}: numbers above 0 are needed")
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"{CONFIG_FILE} says use_rslora={rslora!r}: true or false is needed")
    return LoraOptions(r, alpha, rslora)


def slots_of(palm: PaLM, scope: str) -> dict[str, Slot]:
    """Where each tensor of an adapter's file lies in a scope."""
    found = adapter_slots(palm.finetune_modules[scope], palm.dim_head)
    return {
        f"{PREFIX}{name}.lora_{part}.weight": slot
        for name, pair in found.items()
        for part, slot in zip("AB", pair, strict=True)
    }
