"""Tiny models of transformers' Cohere and Cohere2, and the same weights in a PaLM: two implementations that must agree.

The mapping is written out here on its own, so that it also judges what `pretrained.py` reads and writes.
"""

import pytest
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch import PaLM

HEADS, DIM_HEAD, TOKENS = 4, 8, 50

# what the family varies: as Cohere's config says it
SHAPES = {
    "one kv head": dict(num_key_value_heads=1),
    "two kv heads": dict(num_key_value_heads=2, logit_scale=0.7),
    "all kv heads": dict(num_key_value_heads=4),
    "qk-norm, one kv head": dict(num_key_value_heads=1, use_qk_norm=True),
    "qk-norm, two kv heads": dict(num_key_value_heads=2, use_qk_norm=True),
    "qk-norm, all kv heads": dict(num_key_value_heads=4, use_qk_norm=True, layer_norm_eps=0.3),
    "Cohere2": dict(num_key_value_heads=2, sliding_window=4),
    "Cohere2, one kv head": dict(num_key_value_heads=1, sliding_window=7, logit_scale=0.7),
    "Cohere2, all kv heads": dict(num_key_value_heads=4, sliding_window=3),
    "Cohere2, window 1": dict(num_key_value_heads=2, sliding_window=1),
    "Cohere2, a window that is never full": dict(num_key_value_heads=2, sliding_window=999),
    "Cohere2, global layers first": dict(
        sliding_window=5, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2
    ),
}


def tiny_cohere(**config) -> nn.Module:
    """A CohereForCausalLM, or with a sliding_window a Cohere2ForCausalLM, of weights that all matter."""
    transformers = pytest.importorskip("transformers")
    kind = "Cohere2" if "sliding_window" in config else "Cohere"
    sizes = dict(
        vocab_size=TOKENS,
        hidden_size=HEADS * DIM_HEAD,
        intermediate_size=72,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        logit_scale=0.25,
        layer_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**sizes, **config}))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model.eval()


def as_palm(theirs: nn.Module) -> PaLM:
    """The PaLM that computes the same."""
    config = theirs.config
    types = getattr(config, "layer_types", None) or ()
    ours = PaLM(
        dim=config.hidden_size,
        num_tokens=config.vocab_size,
        depth=config.num_hidden_layers,
        dim_head=DIM_HEAD,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        ff_inner_dim=config.intermediate_size,
        use_xpos=False,
        rotary_theta=5000,
        logit_scale=config.logit_scale,
        norm_eps=config.layer_norm_eps,
        qk_layernorm=getattr(config, "use_qk_norm", False),
        sliding_window=getattr(config, "sliding_window", None),
        global_layers=[i for i, kind in enumerate(types) if kind == "full_attention"],
    ).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        ours.token_emb.weight.copy_(theirs.model.embed_tokens.weight)
        ours.norm.gamma.copy_(theirs.model.norm.weight - 1)
        for ours_layer, layer in zip(ours.layers, theirs.model.layers, strict=True):
            block, attention, mlp = ours_layer.fn, layer.self_attn, layer.mlp
            into = halves(attention.q_proj.weight), halves(attention.k_proj.weight), attention.v_proj.weight
            block.fused_attn_ff_proj.weight.copy_(torch.cat((*into, mlp.up_proj.weight, mlp.gate_proj.weight)))
            block.attn_out.weight.copy_(attention.o_proj.weight)
            block.ff_out[2].weight.copy_(mlp.down_proj.weight)
            block.norm.gamma.copy_(layer.input_layernorm.weight - 1)
            if block.qk_layernorm:
                for mine, their in ((block.q_norm, attention.q_norm), (block.k_norm, attention.k_norm)):
                    mine.gamma.copy_(halves(their.weight.flatten()).view_as(mine.gamma) - 1)
    return ours


def halves(weight: Tensor) -> Tensor:
    """Rows of heads: Cohere turns the neighbours (0, 1), (2, 3), ..; PaLM the two halves of a head."""
    return weight.unflatten(0, (-1, DIM_HEAD // 2, 2)).transpose(1, 2).flatten(0, 2)
