"""The config.json of Cohere's models (`CohereForCausalLM`, `Cohere2ForCausalLM`) as PaLM's keywords, and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palm_rlhf_pytorch.palm import PaLM

logger = logging.getLogger(__name__)

ARCHITECTURES = {"cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM"}
# what configs may say, and the one value of each that a PaLM computes; not said means this one
ONLY = {
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "quantization_config": None,
    "rotary_pct": 1,
    "use_parallel_block": True,
    "use_gated_activation": True,
}
SIZES = dict(num_tokens="vocab_size", dim="hidden_size", depth="num_hidden_layers", heads="num_attention_heads")
SLIDING, GLOBAL = "sliding_attention", "full_attention"
SERVING = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")  # what a PaLM does not ask for


# config.json -> keywords


def keywords_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's keywords for what a config.json of transformers 4 or 5 says; what PaLM cannot be is refused."""
    for field, only in ONLY.items():
        if config.get(field, only) != only:
            raise refusal(field, config[field], f"only {only!r} can be represented")
    sizes = {ours: whole_number(config, field) for ours, field in SIZES.items()}
    heads = sizes["heads"]
    pad = config.get("pad_token_id")
    return sizes | dict(
        kv_heads=whole_number(config, "num_key_value_heads", heads),
        dim_head=whole_number(config, "head_dim", sizes["dim"] // heads),
        ff_inner_dim=whole_number(config, "intermediate_size"),
        norm_eps=float(number(config, "layer_norm_eps", 1e-5)),
        logit_scale=number(config, "logit_scale", 0.0625),
        attn_dropout=number(config, "attention_dropout", 0.0),
        rotary_theta=rotary_theta(config),
        use_xpos=False,
        cross_entropy_ignore_index=pad if isinstance(pad, int) else -100,
        **(windows(config, sizes["depth"]) if config["model_type"] == "cohere2" else qk_norm(config)),
    )


def refusal(field: str, value: Any, why: str) -> ValueError:
    return ValueError(f"config.json says {field}={value!r}, of which {why}")


def number(config: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise refusal(field, value, "a number is needed")
    return value


def whole_number(config: Mapping[str, Any], field: str, default: int | None = None) -> int:
    """A number from 1; where there is a default, null stands for it too."""
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise refusal(field, value, "a whole number from 1 is needed")
    return value


def rotary_theta(config: Mapping[str, Any]) -> float:
    """transformers 5 says it within rope_parameters, 4 beside rope_scaling."""
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    for field, said in (("rope_parameters", rope), ("rope_scaling", scaling)):
        kind = said.get("rope_type", said.get("type", "default")) if isinstance(said, dict) else None
        more = set(said) - {"rope_theta", "rope_type", "type"}
        if kind != "default" or (more and said.get("partial_rotary_factor", 1) != 1):
            raise refusal(field, said, "only plain rotary embeddings can be represented, without scaling")
    said = [base for base in (rope.get("rope_theta"), config.get("rope_theta")) if base is not None]
    if len(set(said)) > 1:
        raise refusal("rope_theta", config["rope_theta"], f"rope_parameters says {rope.get('rope_theta')}")
    theta = number({"rope_theta": said[0] if said else None}, "rope_theta")
    if theta <= 0:
        raise refusal("rope_theta", theta, "a number above 0 is needed")
    return theta


def qk_norm(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_layernorm": bool(config.get("use_qk_norm"))}


def windows(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Which layers are global: transformers 5 lists all layers, 4 says that every so manieth is."""
    if config.get("use_qk_norm"):
        raise refusal("use_qk_norm", True, "Cohere2 has none")
    kinds = config.get("layer_types")
    if kinds is None:
        every = whole_number(config, "sliding_window_pattern", 4)
        kinds = [GLOBAL if (i + 1) % every == 0 else SLIDING for i in range(depth)]
    if not isinstance(kinds, list) or len(kinds) != depth or not {*map(str, kinds)} <= {SLIDING, GLOBAL}:
        raise refusal("layer_types", kinds, f"{SLIDING!r} or {GLOBAL!r} for each of the {depth} layers is needed")
    where = [i for i, kind in enumerate(kinds) if kind == GLOBAL]
    return {"sliding_window": whole_number(config, "sliding_window"), "global_layers": where}


# model -> config.json


def config_of(palm: PaLM, ids: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for transformers 4 and 5; ids: its `SERVING` fields."""
    refuse_what_is_in_the_way(palm)
    ours, block = palm.config, palm.layers[0].fn
    kind = "cohere" if palm.sliding_window is None else "cohere2"
    theta, dtype = ours["rotary_theta"], str(palm.token_emb.weight.dtype).removeprefix("torch.")
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{field: ours[name] for name, field in SIZES.items()},
        "num_key_value_heads": palm.kv_heads,
        "head_dim": palm.dim_head,
        "intermediate_size": block.ff_out[2].in_features,
        "layer_norm_eps": ours["norm_eps"],
        "logit_scale": float(palm.logit_scale),
        "attention_dropout": float(ours["attn_dropout"]),
        "rope_theta": float(theta),
        "rope_parameters": {"rope_theta": float(theta), "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **{name: ids.get(name) for name in SERVING},
        "max_position_embeddings": ids.get("max_position_embeddings") or 8192,
    }
    if kind == "cohere":
        return config | {"use_qk_norm": block.qk_layernorm}
    kinds = [SLIDING if windowed else GLOBAL for windowed in palm.windowed]
    every = kinds.index(GLOBAL) + 1 if GLOBAL in kinds else len(kinds) + 1
    regular = all((kind == GLOBAL) == ((i + 1) % every == 0) for i, kind in enumerate(kinds))
    pattern = {"sliding_window_pattern": every} if regular else {}
    return config | {"sliding_window": palm.sliding_window, "layer_types": kinds, **pattern}


def refuse_what_is_in_the_way(palm: PaLM) -> None:
    """Say in one sentence why a model is none of Cohere's."""
    block = palm.layers[0].fn
    in_the_way = [
        said
        for said, there in {
            "it is an encoder (causal=False)": not palm.causal,
            "its positions are xpos (train with use_xpos=False)": palm.rotary_emb.use_xpos,
            "it has qk_rmsnorm (train with qk_layernorm instead)": block.qk_rmsnorm,
            "it has both qk_layernorm and sliding_window": block.qk_layernorm and palm.sliding_window is not None,
        }.items()
        if there
    ]
    if in_the_way:
        raise ValueError(
            f"this PaLM cannot be written for Hugging Face, because {', and '.join(in_the_way)}: "
            "format='palm' takes every model"
        )
    if palm.heads * palm.dim_head != palm.dim:
        logger.warning(
            "heads * dim_head (%d) is not dim (%d): transformers reads head_dim from config.json, others may not.",
            palm.heads * palm.dim_head,
            palm.dim,
        )
