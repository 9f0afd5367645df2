import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are tiny: more threads only wait for each other

from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from palm_rlhf_pytorch import swiglu  # noqa: E402
from palm_rlhf_pytorch.devices import accelerate_keywords  # noqa: E402
from palm_rlhf_pytorch.palm import PaLM  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision():
    """What a test computes in is not what the next one does: accelerate has one precision a process."""
    yield
    accelerate_keywords(torch.device("cpu"), "fp32")


@pytest.fixture
def said(caplog) -> Callable[[], list[str]]:
    """What the package logged, from INFO on."""
    caplog.set_level("INFO", "palm_rlhf_pytorch")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("palm_rlhf_pytorch")]


def make(**keywords) -> PaLM:
    """A tiny PaLM in eval mode, with weights far enough from their start that every one of them matters."""
    model = PaLM(**{**dict(dim=24, num_tokens=17, depth=2, dim_head=8, heads=4), **keywords})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith((".B", ".gamma")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif name == "token_emb.weight":
                parameter.normal_(std=0.4)
            elif name.endswith("weight"):
                parameter.mul_(3)
    return model.eval()


@pytest.fixture
def make_palm() -> Callable[..., PaLM]:
    return make


@pytest.fixture
def feedforward_rows(monkeypatch) -> list[int]:
    """How many rows each layer's feedforward is computed for, pass after pass."""
    found, gated = [], swiglu.gated
    monkeypatch.setattr(swiglu, "gated", lambda v, g: found.append(v.numel() // v.shape[-1]) or gated(v, g))
    return found
