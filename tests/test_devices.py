import subprocess
import sys

import pytest
import torch

from palm_rlhf_pytorch.devices import (
    accelerate_keywords,
    accelerator_on,
    choose_device,
    choose_precision,
    ready_for,
    to_device,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    assert accelerate_keywords(CPU) == {"cpu": True, "mixed_precision": "no"}
    assert accelerate_keywords(CUDA) == {"cpu": False, "mixed_precision": "no"}
    assert accelerate_keywords(CPU, "bf16") == {"cpu": True, "mixed_precision": "bf16"}
    device = choose_device("auto")
    assert accelerator_on(device).device.type == device.type


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_bf16_where_a_gpu_computes_in_it(monkeypatch, there):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **keywords: asked.append(keywords) or there)
    assert choose_precision("auto", CUDA) == ("bf16" if there else "fp32")
    assert asked == [{"including_emulation": False}]
    assert choose_precision("auto", CPU) == "fp32" and choose_precision("bf16", CPU) == "bf16"
    assert choose_precision("fp32", CUDA) == "fp32"
    with pytest.raises(ValueError, match="one of auto, fp32, bf16, got 'fp16'"):
        choose_precision("fp16", CPU)


def test_one_process_may_change_its_precision():
    for precision, dtype in (("fp32", None), ("bf16", torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", None)):
        with accelerator_on(CPU, precision).autocast():
            assert torch.is_autocast_enabled("cpu") is (dtype is not None)
            assert dtype is None or torch.get_autocast_dtype("cpu") == dtype


def test_batches_are_moved_whole():
    batch = (torch.zeros(1), None, (torch.ones(1),))
    assert ready_for(batch, CPU) is batch
    moved = to_device(batch, torch.device("meta"))
    assert moved[0].device.type == moved[2][0].device.type == "meta" and moved[1] is None
    named = to_device({"a": torch.ones(1), "b": batch}, torch.device("meta"))
    assert named["a"].device.type == named["b"][0].device.type == "meta"


TRAINS = """
import sys, torch
from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
palm = PaLM(num_tokens=32, dim=16, depth=1, heads=1, dim_head=16)
prompts = torch.ones(2, 3, dtype=torch.long)
trainer = RLHFTrainer(
    palm=palm, reward_model=RewardModel(palm), prompt_token_ids=prompts, accelerate_kwargs={"cpu": True}
)
trainer.train(num_episodes=1, max_timesteps=2, update_timesteps=2, max_seq_len=8)
print([name for name in ("sympy", "torch.distributed.tensor", "torch._dynamo") if name in sys.modules])
"""


def test_one_process_trains_without_what_is_for_many():
    done = subprocess.run([sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
