"""Writes the weights that all sides load, and the logits that all must then give."""

from __future__ import annotations

import torch
from serving import serve
from tasks import CHECKED, random_ids

from palm_rlhf_pytorch import PaLM


def create(path: str, config: dict) -> None:
    """A PaLM with these keywords goes to `path`, its logits beside it."""
    torch.manual_seed(0)
    palm = PaLM(**config).eval()
    with torch.no_grad():
        for name, parameter in palm.named_parameters():
            if name.endswith("gamma"):  # else all are 0, and a wrong one would not be seen
                parameter.normal_(std=0.1)
        torch.save(palm(random_ids(config["num_tokens"], *CHECKED)), f"{path}.logits")
    palm.save(path)


if __name__ == "__main__":
    serve({"create": create})
