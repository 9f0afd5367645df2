"""The reference, PaLM-rlhf-pytorch 0.8.0: its model under the same module name as ours, hence a process apart."""

from __future__ import annotations

import json
from importlib.metadata import version

from safetensors import safe_open
from tasks import Task
from torch import Tensor

from palm_rlhf_pytorch import PaLM

PUBLISHED = ("dim", "num_tokens", "depth", "dim_head", "heads", "ff_mult", "rotary_xpos_scale_base")


class Reference(Task):
    def load(self, path: str, flash_attn: bool = False) -> PaLM:
        if version("PaLM-rlhf-pytorch") != "0.8.0":
            raise RuntimeError(f"this is not the reference but {version('PaLM-rlhf-pytorch')}: run benchmarks/peers.py")
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["palm_rlhf_pytorch"])
            state = {name: file.get_tensor(name) for name in file.keys()}
        model = PaLM(**{name: config[name] for name in PUBLISHED}, flash_attn=flash_attn)
        missing, unexpected = model.load_state_dict(state, strict=False)
        # left out of the file because their memory is another's: tied logits, and the rotary buffers of later layers
        absent = [name for name in missing if "rotary_emb" not in name and name != "to_logits.weight"]
        if absent or unexpected:
            raise RuntimeError(f"the weights do not fit: missing {absent}, unexpected {unexpected}")
        return model

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def loss(self, ids: Tensor) -> Tensor:
        return self.forward(ids, return_loss=True)

    def draw(self, ids: Tensor, length: int) -> Tensor:
        def unfiltered(logits: Tensor, thres: float) -> Tensor:
            return logits

        return self.model.generate(length, ids, filter_logits_fn=unfiltered, return_seq_without_prompt=False)


if __name__ == "__main__":
    Reference().serve()
