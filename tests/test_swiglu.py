import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import swiglu
from palm_rlhf_pytorch.swiglu import SplitSwiGLU, SwiGLU, split_swiglu


def plain(x, sizes):
    *parts, last = x.split(sizes, dim=-1)
    first, second = last.chunk(2, dim=-1)
    return *parts, first * second * torch.sigmoid(second)


def test_the_second_half_is_the_gate():
    torch.testing.assert_close(SwiGLU()(torch.tensor([3.0, 2.0])), torch.tensor([3 * 2 * 0.8807971]))


@pytest.mark.parametrize("block", [2**18, 60, 1])
def test_the_split_with_one_backward_tensor_is_the_formula(monkeypatch, block):
    monkeypatch.setattr(swiglu, "BLOCK", block)
    x, sizes = torch.randn(2, 5, 16, requires_grad=True), (4, 2, 10)
    ours, theirs = split_swiglu(x, sizes), plain(x, sizes)
    assert ours[0].grad_fn.name() == "SplitSwiGLUBackward"
    with torch.no_grad():
        without = split_swiglu(x, sizes)
    weights = [torch.randn_like(t) for t in theirs]
    for a, b, c in zip(ours, theirs, without, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    (gradient,) = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, ours, strict=True)), x)
    (expected,) = torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, theirs, strict=True)), x)
    torch.testing.assert_close(gradient, expected)
    (unused,) = torch.autograd.grad(split_swiglu(x, sizes)[0].sum(), x)
    torch.testing.assert_close(unused, F.pad(torch.ones(2, 5, 4), (0, 12)))


def test_second_derivatives():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: SplitSwiGLU.apply(t, (2, 4)), x)
