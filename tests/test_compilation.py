import pytest
import torch
from torch import nn

from palm_rlhf_pytorch import compilation
from palm_rlhf_pytorch.compilation import CompiledModule


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs were compiled: one entry each."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", backend)
    return found


def layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = layers()

    def forward(self, batch):
        return self.model(batch).square().sum()


def gradients(module, batch, wanted, **keywords):
    loss = CompiledModule(module, wanted, **keywords).backward(batch, torch.Tensor.backward)
    return loss, [p.grad for p in module.parameters()]


def test_compiled_is_plain(graphs, said):
    batch = torch.randn(5, 4)
    module, twin = Loss(), Loss()
    loss, found = gradients(module, batch, True)
    expected, wanted = gradients(twin, batch, False)
    torch.testing.assert_close((loss, found), (expected, wanted))
    assert len(graphs) == 1 and not loss.requires_grad
    assert module.state_dict().keys() == twin.state_dict().keys()
    assert [message.split(" in ")[0] for message in said()] == ["compiled the training step"]


def test_gradients_are_added_in_every_step(graphs):
    module, batch = Loss(), torch.randn(5, 4)
    compiled = CompiledModule(module, True)
    compiled.backward(batch, torch.Tensor.backward)
    once = [p.grad.clone() for p in module.parameters()]
    compiled.backward(batch, torch.Tensor.backward)
    for total, one in zip((p.grad for p in module.parameters()), once, strict=True):
        torch.testing.assert_close(total, 2 * one)
    assert len(graphs) == 1


@pytest.mark.parametrize("ragged, compiled", [(True, 1), (False, 2)])
def test_ragged_batches_share_what_is_compiled(graphs, ragged, compiled):
    step = CompiledModule(Loss(), True, ragged)
    for rows in (5, 6, 7):
        step.backward(torch.randn(rows, 4), torch.Tensor.backward)
    assert len(graphs) == compiled


def test_what_cannot_be_compiled_is_run_plainly(monkeypatch, said):
    def choke(graph, inputs):
        raise RuntimeError("no code for this")

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", choke)
    batch = torch.randn(5, 4)
    torch.testing.assert_close(gradients(Loss(), batch, True), gradients(Loss(), batch, False))
    assert said() == ["the step could not be compiled (BackendCompilerFailed); training goes on plainly"]


def test_a_backward_pass_that_fails_leaves_no_gradients(graphs):
    calls = []

    def backward(loss):
        loss.backward()
        calls.append(loss)
        if len(calls) == 1:
            raise RuntimeError("no code for this")

    module, twin, batch = Loss(), Loss(), torch.randn(5, 4)
    CompiledModule(module, True).backward(batch, backward)
    _, expected = gradients(twin, batch, False)
    torch.testing.assert_close([p.grad for p in module.parameters()], expected)


@pytest.mark.parametrize(
    "wanted, paces, compiled",
    [
        (None, [10.0, 10.0], True),  # 4,000 steps at 10 a second are more than five minutes
        (None, [10.0, 20.0], False),
        (None, [10.0], False),  # the first steps are slow for other reasons
        (None, [], False),
        (False, [10.0, 10.0], False),
        (True, [], True),
    ],
)
def test_only_long_runs_are_compiled_unasked(graphs, wanted, paces, compiled):
    step = CompiledModule(Loss(), wanted)
    for pace in paces:
        step.look(4000, pace)
    step.backward(torch.randn(5, 4), torch.Tensor.backward)
    assert bool(graphs) is compiled
