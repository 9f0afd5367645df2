import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import swiglu
from palm_rlhf_pytorch.swiglu import ProjectSwiGLU, SwiGLU, project_swiglu


def plain(x, weight, width):
    first, value, gate = (x @ weight.t()).split((len(weight) - 2 * width, width, width), dim=-1)
    return first, value * gate * torch.sigmoid(gate)


def test_the_second_half_is_the_gate():
    torch.testing.assert_close(SwiGLU()(torch.tensor([3.0, 2.0])), torch.tensor([3 * 2 * 0.8807971]))


@pytest.mark.parametrize("block", [2**18, 25, 1])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_the_split_projection_is_the_formula(monkeypatch, block, trained):
    monkeypatch.setattr(swiglu, "BLOCK", block)
    x, weight = torch.randn(2, 5, 6), torch.randn(14, 6)
    inputs = [t.requires_grad_(wanted) for t, wanted in zip((x, weight), trained, strict=True)]
    ours, theirs = project_swiglu(*inputs, 5), plain(*inputs, 5)
    assert ours[1].grad_fn.name() == "ProjectSwiGLUBackward"
    with torch.no_grad():
        without = project_swiglu(*inputs, 5)
    for a, b, c in zip(ours, theirs, without, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    coefficients = [torch.randn_like(t) for t in theirs]
    learned = [t for t in inputs if t.requires_grad]
    gradients = torch.autograd.grad(sum((c * t).sum() for c, t in zip(coefficients, ours, strict=True)), learned)
    expected = torch.autograd.grad(sum((c * t).sum() for c, t in zip(coefficients, theirs, strict=True)), learned)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_output_that_is_not_used():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(14, 6)
    (gradient,) = torch.autograd.grad(project_swiglu(x, weight, 5)[0].sum(), x)
    torch.testing.assert_close(gradient, weight[:4].sum(dim=0).expand(5, -1))


def test_second_derivatives():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: ProjectSwiGLU.apply(*t, 3), (x, weight))


def test_autocast_takes_the_plain_way():
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(14, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, out = project_swiglu(x, weight, 5)
    expected = plain(x.bfloat16(), weight.bfloat16(), 5)
    assert first.dtype == out.dtype == torch.bfloat16 and torch.equal(first, expected[0])
    torch.testing.assert_close(F.normalize(out), F.normalize(expected[1]), atol=2e-2, rtol=2e-2)
