"""Products by oneDNN are those of `F.linear`, with gradients of any order, and are left to torch where they must be."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf_pytorch import products
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.products import Linear, by_onednn, filled_up, linear, multiplied, only_computed
from palm_rlhf_pytorch.swiglu import project_swiglu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def everything(monkeypatch):
    """Whatever may go to oneDNN goes there, whichever processor this is."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "ROWS", 1)


@pytest.mark.parametrize("x_shape", [(7, 6), (2, 5, 6), (6,), (1, 6)])
def test_the_product(x_shape):
    x, weight = torch.randn(x_shape), torch.randn(4, 6)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    added = torch.randn(*x_shape[:-1], 4)
    if x.ndim > 1:
        torch.testing.assert_close(multiplied(x, weight, added), F.linear(x, weight) + added)


def test_wrong_sizes_are_refused():
    for wrong in (torch.randn(4, 5), torch.randn(5)):
        with pytest.raises(RuntimeError, match="size|shape"):
            linear(torch.randn(7, 6), wrong)


def test_the_module():
    module, x = Linear(6, 4, bias=False), torch.randn(3, 6)
    torch.testing.assert_close(module(x), x @ module.weight.t())
    biased = Linear(6, 4)
    torch.testing.assert_close(biased(x), x @ biased.weight.t() + biased.bias)


def test_views():
    wide, weight = torch.randn(5, 20), torch.randn(9, 6)
    torch.testing.assert_close(linear(wide[:, 3:9], weight), wide[:, 3:9] @ weight.t())
    torch.testing.assert_close(linear(wide[:, 3:9], weight[2:5]), wide[:, 3:9] @ weight[2:5].t())
    torch.testing.assert_close(linear(wide[:, :9], weight.t()), wide[:, :9] @ weight)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradients(trained):
    x, weight = torch.randn(3, 5, 6), torch.randn(4, 6)
    for t, wanted in zip((x, weight), trained, strict=True):
        t.requires_grad_(wanted)
    ours, theirs = linear(x, weight), F.linear(x, weight)
    assert type(ours.grad_fn) is not type(theirs.grad_fn)
    back, learned = torch.randn_like(ours), [t for t in (x, weight) if t.requires_grad]
    for a, b in zip(*(torch.autograd.grad(out, learned, back) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    def twice(product):
        x, weight = (torch.linspace(-1, 1, n).view(-1, 3).requires_grad_() for n in (12, 6))
        by_x, by_weight = torch.autograd.grad(product(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(by_x.pow(2).sum() + by_weight.sum(), (x, weight))

    for a, b in zip(twice(linear), twice(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_left_to_torch(monkeypatch):
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    assert by_onednn(x, weight) and by_onednn(x, torch.nn.Parameter(weight))
    assert not by_onednn(x.double(), weight.double()) and not by_onednn(x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_onednn(x, weight) and linear(x, weight).dtype == torch.bfloat16
    for slow in (torch.randn(4, 12)[:, :6], torch.randn(1, 6).expand(4, -1)):  # 1,000 times slower there
        assert not by_onednn(x, slow)
    monkeypatch.setattr(products, "ROWS", 4)
    assert not by_onednn(x, weight) and by_onednn(x[:4], weight) and by_onednn(torch.randn(2, 2, 6), weight)
    monkeypatch.setattr(products, "ROWS", 1)
    monkeypatch.setattr(products, "SMALL", 5 * 6 * 4 + 1)
    assert not by_onednn(x, weight)
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert not by_onednn(x, weight)


def test_filled_up(monkeypatch):
    monkeypatch.setattr(products, "ROWS", 8)
    monkeypatch.setattr(products, "FILL", 0.25)
    x = torch.randn(28, 3)
    more = filled_up(x)
    assert more.shape == (32, 3) and torch.equal(more[:28], x) and not more[28:].any()
    for rows in (32, 4, 9, 0):  # a multiple already; too many to add: 4 to 4, 7 to 9; nothing
        assert filled_up(torch.ones(rows, 3)).shape == (rows, 3)
    assert filled_up(x.double()).shape == (28, 3)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert filled_up(x).shape == (28, 3)


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_what_is_not_only_computed():
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    assert only_computed(x, weight) and only_computed(torch.nn.Parameter(x))
    with Nothing():
        assert not only_computed(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(linear(dual, weight)).tangent is not None
    torch.testing.assert_close(torch.func.vmap(lambda row: linear(row, weight))(x), x @ weight.t())
    by_x = torch.func.grad(lambda x: linear(x, weight).sum())(x)
    torch.testing.assert_close(by_x, weight.sum(0).expand(4, -1))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: linear(x, weight), x)
    torch.testing.assert_close(traced(x + 1), (x + 1) @ weight.t())


def test_compiled_as_one_graph():
    palm = PaLM(num_tokens=16, dim=16, depth=2, dim_head=8, heads=2)
    ids = torch.randint(0, 16, (2, 8))
    compiled = torch.compile(palm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), palm(ids))
    compiled(ids, return_loss=True).backward()


@pytest.mark.parametrize("trained", [False, True])
def test_swiglu_with_rows_filled_up(monkeypatch, trained):
    x, into, out = (torch.randn(s).requires_grad_(trained) for s in ((2, 15, 6), (14, 6), (6, 5)))
    expected = project_swiglu(x, into, out)
    monkeypatch.setattr(products, "ROWS", 8)
    monkeypatch.setattr(products, "FILL", 0.25)
    found = project_swiglu(x, into, out)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if trained:
        learned = [torch.autograd.grad(o[0].pow(2).sum() + o[1].sum(), (x, into, out)) for o in (found, expected)]
        for a, b in zip(*learned, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2 avx512f\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fma avx2 avx512f\n", False),
        ("CPU implementer\t: 0x41\nFeatures\t: avx512f\n", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, cpuinfo, expected):
    monkeypatch.undo()  # the function itself
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + cpuinfo)
    monkeypatch.setattr("palm_rlhf_pytorch.processor.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products.onednn_is_faster.cache_clear()
    assert products.onednn_is_faster() == expected
    products.onednn_is_faster.cache_clear()


def test_a_model_learns_the_same(monkeypatch):
    def gradients():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=50, dim=24, depth=2, dim_head=8, heads=4, finetune_scopes=["a"], lora_ff=True)
        torch.nn.init.normal_(palm.finetune_modules["a"][0][0].B)
        palm(torch.randint(0, 50, (3, 17)), return_loss=True, finetune_scope="a").backward()
        return [p.grad for p in palm.parameters()]

    ours = gradients()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
