"""Hugging Face's Cohere: the architecture of PaLM in transformers, with our weights."""

from __future__ import annotations

import json
import time

import torch
from safetensors import safe_open
from tasks import Task
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM


def pairs(weight: Tensor, dim_head: int) -> Tensor:
    """Rows (heads * d, dim) of q or k: PaLM turns the two halves of a head, Cohere neighbours (0, 1), (2, 3), .."""
    return weight.unflatten(0, (-1, 2, dim_head // 2)).transpose(1, 2).flatten(0, 2)


def config_of(palm: dict) -> CohereConfig:
    """From PaLM's keywords."""
    return CohereConfig(
        vocab_size=palm["num_tokens"],
        hidden_size=palm["dim"],
        intermediate_size=palm["ff_inner_dim"] or int(palm["dim"] * palm["ff_mult"]),
        num_hidden_layers=palm["depth"],
        num_attention_heads=palm["heads"],
        num_key_value_heads=palm["kv_heads"],
        head_dim=palm["dim_head"],
        logit_scale=palm["logit_scale"],
        layer_norm_eps=palm["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(palm["rotary_theta"])},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def converted(state: dict[str, Tensor], config: CohereConfig) -> dict[str, Tensor]:
    """PaLM's weights under Cohere's names."""
    d, ff = config.head_dim, config.intermediate_size
    sizes = (config.num_attention_heads * d, config.num_key_value_heads * d, config.num_key_value_heads * d, ff, ff)
    embedding = state["token_emb.weight"]
    out = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
    out["model.norm.weight"] = state["norm.gamma"] + 1
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}.fn.", f"model.layers.{i}."
        q, k, v, up, gate = state[ours + "fused_attn_ff_proj.weight"].split(sizes)
        out[theirs + "self_attn.q_proj.weight"] = pairs(q, d)
        out[theirs + "self_attn.k_proj.weight"] = pairs(k, d)
        out[theirs + "self_attn.v_proj.weight"] = v
        out[theirs + "self_attn.o_proj.weight"] = state[ours + "attn_out.weight"]
        out[theirs + "mlp.up_proj.weight"] = up
        out[theirs + "mlp.gate_proj.weight"] = gate
        out[theirs + "mlp.down_proj.weight"] = state[ours + "ff_out.2.weight"]
        out[theirs + "input_layernorm.weight"] = state[ours + "norm.gamma"] + 1
    return out


class Clock:
    """A streamer that notes when tokens come; the prompt comes first and is not counted."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Cohere(Task):
    def load(self, path: str, gradient_checkpointing: bool = False) -> CohereForCausalLM:
        with safe_open(path, "pt") as file:
            config = config_of(json.loads(file.metadata()["palm_rlhf_pytorch"]))
            state = {name: file.get_tensor(name) for name in file.keys()}
        model = CohereForCausalLM(config)
        model.load_state_dict(converted(state, config))
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits

    def loss(self, ids: Tensor) -> Tensor:
        return self.forward(input_ids=ids, labels=ids, use_cache=False).loss

    def draw(self, ids: Tensor, length: int, static: bool = False, streamer: Clock | None = None) -> Tensor:
        self.model.eval()
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_length=length,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            streamer=streamer,
        )

    def clock(self, ids: Tensor, length: int) -> list[float]:
        clock = Clock()
        self.draw(ids, length, streamer=clock)
        return clock.times[1:]


if __name__ == "__main__":
    Cohere().serve()
