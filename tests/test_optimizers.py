"""AdamW that starts at once is AdamW."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from palm_rlhf_pytorch.devices import fused
from palm_rlhf_pytorch.optimizers import AdamW


def learned(optimizer_class, steps=3, **keywords):
    """Parameters and state after some steps, the last of which had gradients for one of two parameters."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = optimizer_class(
        [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}], lr=0.01, **keywords
    )
    for i in range(steps):
        sum((p * p).sum() for p in parameters[: 1 if i == steps - 1 else 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize("keywords", [{}, {"fused": True}, {"weight_decay": 0.3, "amsgrad": True}, {"foreach": True}])
def test_the_same_steps_as_torch_s(keywords):
    (ours, one), (theirs, other) = (learned(kind, **keywords) for kind in (AdamW, torch.optim.AdamW))
    assert all(torch.equal(a, b) and not a.grad_fn and a.grad is None for a, b in zip(ours, theirs, strict=True))
    assert str(one.state_dict()) == str(other.state_dict())


def test_states_go_from_one_to_the_other():
    (ours, one), (theirs, other) = learned(AdamW), learned(torch.optim.AdamW, steps=2)
    other.load_state_dict(deepcopy(one.state_dict()))
    one.load_state_dict(deepcopy(other.state_dict()))
    for parameters, optimizer in ((ours, one), (theirs, other)):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(1.0)
        sum((p * p).sum() for p in parameters).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_closures_and_hooks_and_differentiable_steps():
    (parameter, _), optimizer = learned(AdamW)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))

    def closure():
        optimizer.zero_grad()
        loss = (parameter * parameter).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and seen == [1]
    with pytest.raises(RuntimeError, match="leaf Variable"):  # as torch's own: parameters are leaves
        learned(AdamW, differentiable=True)


def test_both_are_fused():
    cpu = torch.device("cpu")
    assert fused(AdamW, cpu) == fused(torch.optim.AdamW, cpu) == {"fused": True} and not fused(torch.optim.SGD, cpu)


def test_training_imports_no_compiler():
    code = (
        "import sys, torch; from palm_rlhf_pytorch import PaLM, RLHFTrainer\n"
        "palm = PaLM(num_tokens=9, dim=16, depth=1, heads=2, dim_head=8)\n"
        "reward = lambda prompts, responses: [float(len(r)) for r in responses]\n"
        "trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=torch.ones(4, 3, dtype=torch.long),"
        " accelerate_kwargs={'cpu': True})\n"
        "trainer.train(1, 4, 4, 4, 8)\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
