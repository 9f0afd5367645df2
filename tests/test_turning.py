"""Heads are turned in one pass of C++ as by the formula, and gradients turned back."""

import ctypes

import pytest
import torch

from palm_rlhf_pytorch import turning
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.rotary import RotaryEmbedding
from palm_rlhf_pytorch.turning import Turned, by_formula, by_native, fits, turned

compiles = pytest.mark.skipif(library("rotary") is None, reason="there is no C++ compiler to be found")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(turning, "SMALL", 0)


def turns(*shape, dtype=torch.float32):
    """Any cosines and sines: the two halves' need not be the same."""
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def test_by_hand():
    # pairs (1, 3) and (2, 4); the sine comes negated in its first half
    x, cos, sin = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.5, 1, 0.5, 1]), torch.tensor([-0.25, 0, 0.25, 0])
    expected = [1 * 0.5 - 3 * 0.25, 2, 3 * 0.5 + 1 * 0.25, 4]
    x, cos, sin = x.view(1, 1, 1, 4), cos.view(1, 1, 4), sin.view(1, 1, 4)
    for turn in (turned, by_formula):
        assert turn(x, cos, sin).flatten().tolist() == pytest.approx(expected)


SHAPES = {
    "all rows and heads alike": (7, 1, 6),
    "each head": (7, 3, 6),
    "each row": (2, 7, 1, 6),
    "each row and head": (2, 7, 3, 6),
    "one row for all": (1, 7, 3, 6),
}


@compiles
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_one_pass_is_the_formula(kind, strided):
    cos, sin = turns(*SHAPES[kind])
    wide = torch.randn(2, 7, 5, 6)
    x = wide[:, :, 1:4] if strided else torch.randn(2, 7, 3, 6)
    assert fits(x, cos, sin)
    torch.testing.assert_close(turned(x, cos, sin), by_formula(x, cos, sin))
    x.requires_grad_()
    learned = [torch.autograd.grad(turn(x, cos, sin).square().sum(), x)[0] for turn in (turned, by_formula)]
    torch.testing.assert_close(*learned)
    assert isinstance(turned(x, cos, sin).grad_fn, Turned._backward_cls)


@compiles
def test_turns_of_a_part():
    """Some heads' and some positions', as `HeadsRotation.some` cuts them out."""
    cos, sin = turns(2, 9, 5, 6)
    x, cos, sin = torch.randn(2, 4, 2, 6), cos[:, 3:7, 1:3], sin[:, 3:7, 1:3]
    assert fits(x, cos, sin) and not cos.is_contiguous()
    torch.testing.assert_close(turned(x, cos, sin), by_formula(x, cos, sin))
    expanded = cos[:1].expand(2, -1, -1, -1), sin[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(turned(x, *expanded), by_formula(x, *expanded))


@compiles
def test_a_gradient_that_is_one_number():
    x, (cos, sin) = torch.randn(2, 7, 3, 6, requires_grad=True), turns(7, 1, 6)
    learned = [torch.autograd.grad(turn(x, cos, sin).sum(), x)[0] for turn in (turned, by_formula)]
    torch.testing.assert_close(*learned)


@compiles
def test_second_derivatives():
    x, (cos, sin) = torch.randn(2, 3, 2, 4, requires_grad=True), turns(3, 2, 4)
    found = []
    for turn in (turned, by_formula):
        (first,) = torch.autograd.grad(turn(x, cos, sin).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found)


def test_what_one_pass_cannot_do(monkeypatch):
    x, (cos, sin) = torch.randn(2, 7, 3, 6), turns(7, 3, 6)
    assert not fits(x.double(), cos, sin) and not fits(x, cos.double(), sin.double())
    assert not fits(x.bfloat16(), cos, sin)
    assert not fits(x.transpose(2, 3).contiguous().transpose(2, 3), cos, sin)  # features apart
    assert not fits(x, cos, sin.transpose(0, 1).contiguous().transpose(0, 1))  # two ways to step
    assert not fits(x, cos.clone().requires_grad_(), sin)
    assert not fits(x, cos[:, :2], sin[:, :2])  # would read beside them
    assert not fits(x, cos[:5], sin[:5])
    assert not fits(x, *(t.expand(3, -1, -1, -1) for t in (cos, sin)))
    with torch.device("meta"):
        assert not fits(torch.empty(2, 7, 3, 6), torch.empty(7, 3, 6), torch.empty(7, 3, 6))
    monkeypatch.setattr(turning, "SMALL", x.numel() + 1)
    assert not fits(x, cos, sin)


def test_other_shapes_go_by_the_formula():
    x, (cos, sin) = torch.randn(7, 3, 6), turns(7, 1, 6)  # as a decoding step has them
    assert not fits(x, cos, sin) and torch.equal(turned(x, cos, sin), by_formula(x, cos, sin))
    assert not fits(x[None, None], cos, sin)


@compiles
def test_many_gradients_at_once():
    x, (cos, sin) = torch.randn(2, 7, 3, 6, requires_grad=True), turns(7, 1, 6)
    given = torch.randn(4, 2, 7, 3, 6)
    found = [torch.autograd.grad(t(x, cos, sin), x, given, is_grads_batched=True)[0] for t in (turned, by_formula)]
    torch.testing.assert_close(*found)


@compiles
def test_nothing():
    cos, sin = turns(7, 1, 6)
    assert turned(torch.empty(0, 7, 3, 6), cos, sin).shape == (0, 7, 3, 6)


def test_half_precision_is_rounded_once():
    x, (cos, sin) = torch.randn(2, 7, 3, 6).bfloat16(), turns(7, 3, 6)
    assert torch.equal(turned(x, cos, sin), by_formula(x.float(), cos, sin).bfloat16())


@compiles
@pytest.mark.parametrize("positions", [torch.arange(5), torch.arange(15).view(3, 5)])
@pytest.mark.parametrize("use_xpos", [True, False])
def test_queries_and_keys_of_an_embedding(use_xpos, positions):
    rotation = RotaryEmbedding(8, use_xpos=use_xpos)(positions, 3).over(2, 1)
    qk = torch.randn(3, 5, 3, 8)
    assert fits(qk, rotation.cos, rotation.sin)
    torch.testing.assert_close(rotation.rotate(qk), by_formula(qk, rotation.cos, rotation.sin))


@compiles
def test_the_call_is_laid_out_as_in_c():
    assert library("rotary").size_of_call() == ctypes.sizeof(turning.Call)


@compiles
def test_without_a_graph_none_is_made():
    x, (cos, sin) = torch.randn(2, 7, 3, 6, requires_grad=True), turns(7, 1, 6)
    with torch.no_grad():
        assert not turned(x, cos, sin).requires_grad
    assert not turned(x.detach(), cos, sin).requires_grad
    assert by_native("forward", x.detach(), cos, sin).is_contiguous()
