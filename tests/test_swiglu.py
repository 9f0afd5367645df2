import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import products, swiglu
from palm_rlhf_pytorch.swiglu import ProjectSwiGLU, SwiGLU, project_swiglu


def plain(x, into, out):
    width = out.shape[1]
    first, value, gate = (x @ into.t()).split((len(into) - 2 * width, width, width), dim=-1)
    return first, (value * gate * torch.sigmoid(gate)) @ out.t()


def test_the_second_half_is_the_gate():
    torch.testing.assert_close(SwiGLU()(torch.tensor([3.0, 2.0])), torch.tensor([3 * 2 * 0.8807971]))


@pytest.mark.parametrize("block", [2**18, 25, 1])
@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_the_split_projection_is_the_formula(monkeypatch, block, trained):
    monkeypatch.setattr(swiglu, "BLOCK", block)
    given = torch.randn(2, 5, 6), torch.randn(14, 6), torch.randn(6, 5)
    inputs = [t.requires_grad_(wanted) for t, wanted in zip(given, trained, strict=True)]
    ours, theirs = project_swiglu(*inputs), plain(*inputs)
    made, _ = ours[1].grad_fn.next_functions[0]
    assert "ProjectSwiGLUBackward" in (made.name(), made.next_functions[0][0].name())
    with torch.no_grad():
        without = project_swiglu(*inputs)
    for a, b, c in zip(ours, theirs, without, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, b)
    ours, theirs = (
        sum((c * t).sum() for c, t in zip((0.3, 0.7), outputs, strict=True))
        if trained != (False, False, True)
        else outputs[1].sum()
        for outputs in (ours, theirs)
    )
    learned = [t for t in inputs if t.requires_grad]
    for a, b in zip(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, learned), strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def both_ways(monkeypatch):
    """A call in one pass of C++, and the same in torch's operations."""
    if swiglu.library("swiglu") is None:
        pytest.skip("there is no C++ compiler to be found")
    monkeypatch.setattr(swiglu, "SMALL", 0)

    def call(function, *tensors):
        assert swiglu.in_one_pass(*tensors)
        ours = function(*(t.clone() if t.is_contiguous() else t for t in tensors))
        with monkeypatch.context() as patch:
            patch.setattr(swiglu, "library", lambda name: None)
            return ours, function(*(t.clone() if t.is_contiguous() else t for t in tensors))

    return call


SPREAD = torch.tensor([-1e4, -100.0, -88.0, -20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 88.0, 100.0, 1e4])


@pytest.mark.parametrize("n", [1, 15, 16, 37])
def test_one_pass_is_the_formula(both_ways, n):
    value, gate = torch.randn(5, n), torch.randn(5, n) * 4
    torch.testing.assert_close(*both_ways(swiglu.gated, value, gate), rtol=1e-5, atol=1e-6)
    wide = torch.randn(2, 3, 2 * n + 7)  # as it comes out of the block's projection
    torch.testing.assert_close(*both_ways(swiglu.gated, wide[..., 7 : n + 7], wide[..., n + 7 :]), rtol=1e-5, atol=1e-6)
    to_inner = torch.randn(5, n)
    for a, b in zip(*both_ways(swiglu.swiglu_backward, to_inner, value, gate), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    once = both_ways(lambda *given: swiglu.swiglu_backward(*given, again=False), to_inner, value, gate)
    for inner, to_value, to_gate in once:  # the same, but for what is not asked for
        assert inner is None
        for a, b in zip((to_value, to_gate), swiglu.swiglu_backward(to_inner.clone(), value, gate)[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_pass_far_from_zero(both_ways):
    gate = SPREAD.repeat(2, 3)
    torch.testing.assert_close(*both_ways(swiglu.gated, torch.ones_like(gate), gate), rtol=1e-5, atol=1e-6)
    ours, theirs = both_ways(swiglu.swiglu_backward, torch.ones_like(gate), torch.ones_like(gate), gate)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    broken, _ = both_ways(swiglu.gated, torch.ones(1, 20), torch.full((1, 20), torch.nan))
    assert broken.isnan().all()


def test_what_one_pass_cannot_read(monkeypatch):
    monkeypatch.setattr(swiglu, "SMALL", 1)
    x = torch.randn(4, 6, 8)
    assert not swiglu.in_one_pass(x.double()) and not swiglu.in_one_pass(x.transpose(1, 2))
    assert not swiglu.in_one_pass(x[:, :, :4], x[:, :, :4].contiguous())  # rows at two distances
    assert not swiglu.in_one_pass(x[:, :3, :4])  # and at no single one
    assert not swiglu.in_one_pass(torch.empty(0, 4))


def test_a_vector_and_what_is_written_in_place():
    x, into, out = torch.randn(6), torch.randn(14, 6), torch.randn(6, 5)
    for a, b in zip(project_swiglu(x, into, out), plain(x, into, out), strict=True):
        torch.testing.assert_close(a, b)
    first, _ = project_swiglu(x[None].requires_grad_(), into, out)
    first.add_(1).sum().backward()


def test_far_out_it_overflows_no_sooner_than_torch(both_ways):
    value, gate = torch.full((1, 20), 1e38), torch.full((1, 20), -60.0)
    torch.testing.assert_close(*both_ways(swiglu.gated, value, gate), rtol=1e-4, atol=0.0)


def test_an_output_that_is_not_used():
    x, into, out = torch.randn(5, 6, requires_grad=True), torch.randn(14, 6), torch.randn(6, 5)
    (gradient,) = torch.autograd.grad(project_swiglu(x, into, out)[0].sum(), x)
    torch.testing.assert_close(gradient, into[:4].sum(dim=0).expand(5, -1))


def test_second_derivatives():
    inputs = [torch.randn(*sizes, dtype=torch.float64, requires_grad=True) for sizes in ((3, 4), (8, 4), (4, 3))]
    besides = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    for more in ((None, 0), (besides, 1)):
        assert torch.autograd.gradcheck(ProjectSwiGLU.apply, (*inputs, *more))
        assert torch.autograd.gradgradcheck(ProjectSwiGLU.apply, (*inputs, *more))


@pytest.mark.parametrize("m", [5, 0, 125])
@pytest.mark.parametrize("trained", range(16))
def test_besides(monkeypatch, trained, m):
    """Some of what is projected is made of other rows."""
    monkeypatch.setattr(products, "SMALL", 0)
    inputs = [torch.randn(m, 6), torch.randn(14, 6), torch.randn(6, 5), torch.randn(2, 64, 6)]
    inputs = [t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(inputs)]
    x, into, out, besides = inputs
    first, last = plain(x, into, out)
    theirs = first[:, :1], last, besides @ into[1:4].t()
    ours = project_swiglu(x, into, out, besides, 3)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    learned = [t for t in inputs if t.requires_grad]
    if learned:
        ours, theirs = (sum((t * t).sum() for t in outputs) for outputs in (ours, theirs))
        for a, b in zip(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, learned), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_takes_the_plain_way():
    x, into, out = torch.randn(5, 6, requires_grad=True), torch.randn(14, 6), torch.randn(6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, last = project_swiglu(x, into, out)
    expected = plain(x.bfloat16(), into.bfloat16(), out.bfloat16())
    assert first.dtype == last.dtype == torch.bfloat16 and torch.equal(first, expected[0])
    torch.testing.assert_close(F.normalize(last), F.normalize(expected[1]), atol=2e-2, rtol=2e-2)
