"""PaLM's weights as those of Cohere's models: the same block under other names.

What differs: rotary embeddings turn neighbours instead of halves, so the rows of q and k stand in another order within
each head; gains are kept whole instead of less 1; projections are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from palm_rlhf_pytorch.rotary import RotaryEmbedding
from palm_rlhf_pytorch.tensor_files import Slot

if TYPE_CHECKING:
    from palm_rlhf_pytorch.lora import LoRA
    from palm_rlhf_pytorch.palm import PaLM

NOT_NEEDED = r"rotary_emb\.inv_freq$"  # buffers in older checkpoints
TWINS = {"lm_head.weight": "model.embed_tokens.weight"}


def layout(palm: PaLM) -> tuple[dict[str, Slot], dict[str, str]]:
    """Where each tensor of a Cohere checkpoint lies in a PaLM, adapters apart; and which names may repeat another."""
    slots = {"model.embed_tokens.weight": Slot(palm.token_emb.weight.data)}
    for i, layer in enumerate(palm.layers):
        block, layer_name = layer.fn, f"model.layers.{i}."
        slots[f"{layer_name}input_layernorm.weight"] = Slot(block.norm.gamma.data, gain=True)
        q, k, v, ff = block.fused_attn_ff_proj.weight.data.split(block.fused_dims)
        value, gate = ff.chunk(2)
        rows = (q, k, v, block.attn_out.weight.data, value, gate, block.ff_out[2].weight.data)
        slots |= {f"{layer_name}{name}.weight": slot for name, slot in projections(rows, palm.dim_head).items()}
        if block.qk_layernorm:
            for name, norm in (("q_norm", block.q_norm), ("k_norm", block.k_norm)):
                slots[f"{layer_name}self_attn.{name}.weight"] = Slot(norm.gamma.data, True, palm.dim_head)
    return slots | {"model.norm.weight": Slot(palm.norm.gamma.data, gain=True)}, TWINS


def compute_frequencies(palm: PaLM) -> None:
    """The rotary embedding's buffers, which no checkpoint has."""
    config = palm.config
    made = RotaryEmbedding(palm.dim_head, config["rotary_xpos_scale_base"], False, config["rotary_theta"])
    palm.rotary_emb.load_state_dict(made.state_dict())


# in the order of a scope's adapters
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)


def projections(rows: Iterable[Tensor], dim_head: int) -> dict[str, Slot]:
    """Slots of a layer's matrices, rows being outputs; those of q and k stand in another order."""
    named = zip(PROJECTIONS, rows, strict=False)  # the feedforward may have no adapters
    return {name: Slot(t, dim_head=dim_head if name in PROJECTIONS[:2] else 0) for name, t in named}


def adapter_slots(layers: Sequence[Sequence[LoRA]], dim_head: int) -> dict[str, tuple[Slot, Slot]]:
    """Where A (r, in) and B (out, r) of each projection's adapter lie, by the projection's name."""
    return {
        f"model.layers.{i}.{name}": (Slot(adapter.A.data.t()), b)
        for i, lora in enumerate(layers)
        for adapter, (name, b) in zip(
            lora, projections((adapter.B.data.t() for adapter in lora), dim_head).items(), strict=True
        )
    }
