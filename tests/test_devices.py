import pytest
import torch

from palm_rlhf_pytorch.devices import accelerate_keywords, accelerator_on, choose_device


@pytest.mark.parametrize("there, expected", [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto") == torch.device(expected)
    assert choose_device("cpu") == torch.device("cpu")


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["meta", "gpu", "cuda:1", ""])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="one of auto, cpu, cuda, got"):
        choose_device(name)


def test_accelerate_computes_there():
    assert accelerate_keywords(torch.device("cpu")) == {"cpu": True}
    assert accelerate_keywords(torch.device("cuda")) == {"cpu": False}
    device = choose_device("auto")
    assert accelerator_on(device).device.type == device.type
