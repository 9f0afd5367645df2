"""Products in C++ are those of torch, whatever the sizes and the strides, with gradients of any order."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import products
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_product import product
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.processor import is_not_intel_with
from palm_rlhf_pytorch.products import by_ours, faster, linear, ours_is_faster, to_weight

pytestmark = pytest.mark.skipif(library("product") is None, reason="there is no C++ compiler to be found")


@pytest.fixture
def everything(monkeypatch):
    """Whatever may be multiplied there is, whichever processor this is."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "ours_is_faster", lambda: True)
    for name in ("FEWEST_ROWS", "NARROWEST", "LARGE"):
        monkeypatch.setattr(products, name, 1)


def check(found, x, weight, added=0.0):
    """Against float64, to a rounding error for each number that is summed."""
    expected = x.double() @ weight.double().t() + added
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * x.shape[-1])


# rows in groups of 72 and tiles of 6; sums of 768 at once; outputs in panels of 16, 8 of these together
@pytest.mark.parametrize("rows", [1, 5, 6, 73, 150])
@pytest.mark.parametrize("inputs", [1, 8, 13, 768, 771, 1600])
@pytest.mark.parametrize("outputs", [1, 16, 17, 140])
def test_sizes(rows, inputs, outputs):
    torch.manual_seed(0)
    x, weight, added = (torch.randn(size) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    for a in (x, x.t().contiguous().t()):
        for b in (weight, weight.t().contiguous().t()):
            check(product(a, b), x, weight)
    place = added.clone()
    assert product(x, weight, place) is place
    check(place, x, weight, added)
    place = torch.full((rows + 2, outputs), torch.nan)
    assert torch.equal(product(x, weight, out=place[1:-1]), product(x, weight))
    assert place[[0, -1]].isnan().all()  # nothing beside it was written to


def test_a_right_factor_that_is_laid_out_in_parts():
    torch.manual_seed(0)
    x, weight = torch.randn(7, 768), torch.randn(1500, 768)  # 1,360 outputs at once
    check(product(x, weight), x, weight)


def test_views():
    wide, weight = torch.randn(40, 50), torch.randn(30, 60)
    check(product(wide[3:20, 7:27], weight[2:9, 5:25]), wide[3:20, 7:27], weight[2:9, 5:25])
    check(product(wide[3:20, 7:27].t(), weight.t()[5:25, 2:19]), wide[3:20, 7:27].t(), weight.t()[5:25, 2:19])
    cube = torch.randn(4, 5, 6)
    check(product(cube, weight[:, :6]).view(20, 30), cube.view(20, 6), weight[:, :6])
    check(product(cube.transpose(0, 1), weight[:, :6]).view(20, 30), cube.transpose(0, 1).reshape(20, 6), weight[:, :6])
    check(product(wide[:, ::2], weight[:, :25]), wide[:, ::2], weight[:, :25])
    check(product(torch.ones(()).expand(9, 60), weight), torch.ones(9, 60), weight)


def test_bits_depend_on_nothing_else():
    torch.manual_seed(0)
    x, weight, threads = torch.randn(301, 900), torch.randn(77, 900), torch.get_num_threads()
    whole = product(x, weight)
    assert torch.equal(product(x[100:107], weight), whole[100:107])
    assert torch.equal(product(x, weight[16:33]), whole[:, 16:33])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(product(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


def test_what_is_no_number_is_seen():
    x, weight = torch.ones(20, 30), torch.ones(40, 30)
    x[3, 4], weight[5, 6] = torch.nan, torch.inf
    found = product(x, weight)
    assert found[3].isnan().all() and found[0, 5].isinf() and found[:3, :5].eq(30).all()


@pytest.mark.parametrize("sizes", [(0, 5, 4), (5, 0, 4), (5, 6, 0)])
def test_nothing_to_multiply(sizes):
    rows, inputs, outputs = sizes
    x, weight, added = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    assert torch.equal(product(x, weight), torch.zeros(rows, outputs))
    assert torch.equal(product(x, weight, added.clone()), added)


def test_threads_of_python_do_not_disturb_each_other():
    def repeat(size):
        x, weight = torch.randn(size, 50 + size), torch.randn(3 * size, 50 + size)
        once = product(x, weight)
        return all(torch.equal(product(x, weight), once) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, (20, 61, 100, 153)))


def test_wrong_sizes_are_refused(everything):
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    for wrong in (torch.randn(4, 5), torch.randn(5)):
        with pytest.raises(RuntimeError, match="size|shape"):
            linear(x, wrong)
    for out in (torch.zeros(5, 5), torch.zeros(4, 5).t()):
        with pytest.raises(ValueError, match="are multiplied, got"):
            product(x, weight, out=out)
    with pytest.raises(ValueError, match=r"\(5, 6\) and \(4, 5\) into \(5, 4\)"):
        product(x, torch.randn(4, 5))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        to_weight(torch.randn(7, 4), x)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradients(everything, trained):
    x, weight = torch.randn(3, 5, 6), torch.randn(4, 6)
    for t, wanted in zip((x, weight), trained, strict=True):
        t.requires_grad_(wanted)
    ours, theirs = linear(x, weight), F.linear(x, weight)
    assert type(ours.grad_fn) is not type(theirs.grad_fn)
    learned = [t for t in (x, weight) if t.requires_grad]
    for back in (torch.randn_like(ours), torch.ones(()).expand_as(ours)):
        found = (torch.autograd.grad(out, learned, back, retain_graph=True) for out in (ours, theirs))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_the_input_of_a_frozen_weight_is_not_kept(everything):
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6)
    assert linear(x, weight).grad_fn.saved_tensors[0] is None
    assert linear(x, weight.requires_grad_()).grad_fn.saved_tensors[0] is not None


def test_second_derivatives(everything):
    def twice(multiply):
        x, weight = (torch.linspace(-1, 1, n).view(-1, 3).requires_grad_() for n in (12, 6))
        by_x, by_weight = torch.autograd.grad(multiply(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(by_x.pow(2).sum() + by_weight.pow(2).sum(), (x, weight))

    for a, b in zip(twice(linear), twice(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_transforms_of_torch_are_left_to_torch(everything):
    x, weight, scales = torch.randn(4, 6), torch.nn.Parameter(torch.randn(3, 6)), torch.randn(2)
    by_scale = torch.func.grad(lambda s: (linear(x, weight) * s).sum())(scales[0])
    torch.testing.assert_close(by_scale, (x @ weight.t()).sum().detach())
    scaled = torch.func.vmap(lambda s: linear(x, weight) * s)(scales)
    torch.testing.assert_close(scaled, scales[:, None, None] * (x @ weight.t()))
    back = torch.randn(5, 4, 3)
    (found,) = torch.autograd.grad(linear(x, weight), weight, back, is_grads_batched=True)
    torch.testing.assert_close(found, back.transpose(1, 2) @ x)
    torch.testing.assert_close(linear(torch._neg_view(x), weight), -x @ weight.t())
    assert not by_ours(torch._neg_view(x), weight)


def test_left_to_torch(everything, monkeypatch):
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    assert faster(x, weight) is product and by_ours(x.view(1, 5, 6), torch.nn.Parameter(weight))
    assert not by_ours(x.double(), weight.double()) and not by_ours(x.bfloat16(), weight.bfloat16())
    assert not by_ours(x.to("meta"), weight.to("meta")) and not by_ours(x[0], weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not by_ours(x, weight) and linear(x, weight).dtype == torch.bfloat16
    assert not by_ours(x, torch.randn(4, 12)[:, ::2])
    for name, least in (("FEWEST_ROWS", 6), ("NARROWEST", 5), ("LARGE", 5 * 6 * 4 + 1)):
        with monkeypatch.context() as patched:
            patched.setattr(products, name, least)
            assert not by_ours(x, weight)
    with monkeypatch.context() as patched:
        patched.setattr(products, "library", lambda name: None)
        assert not by_ours(x, weight)
    monkeypatch.setattr(products, "ours_is_faster", lambda: False)
    assert not by_ours(x, weight)


def test_the_gradient_of_a_weight(everything):
    gradient, x, place = torch.randn(20, 9), torch.randn(20, 30), torch.zeros(11, 30)
    with torch.no_grad():
        check(to_weight(gradient, x), gradient.t(), x.t())
        to_weight(gradient, x, place[1:10])
        check(place[1:10], gradient.t(), x.t())
        assert not place[[0, 10]].any()
        across = torch.zeros(30, 9).t()  # as the gradient of a weight that is a transposed view
        check(to_weight(gradient, x, across), gradient.t(), x.t())


def test_when_the_gradient_of_a_weight_is_ours(everything, monkeypatch):
    called, wide = [], torch.randn(7, 20)
    monkeypatch.setattr(products, "product", lambda *args, **kwargs: called.append(args) or product(*args, **kwargs))
    monkeypatch.setattr(products, "FEWEST_ROWS", 10)  # rows of the gradient, which are columns of what is given
    with torch.no_grad():
        to_weight(wide, torch.randn(7, 8))
        assert called
        called.clear()
        to_weight(wide.t(), torch.randn(20, 8))
    assert not called


def test_a_weight_that_is_a_transposed_view_learns_the_same(everything, monkeypatch):
    def gradients():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=50, dim=24, depth=2, dim_head=8, heads=4)
        for layer in palm.layers:
            weight = layer.fn.fused_attn_ff_proj.weight
            layer.fn.fused_attn_ff_proj.weight = torch.nn.Parameter(weight.detach().t().contiguous().t())
        palm(torch.randint(0, 50, (3, 17)), return_loss=True).backward()
        return [p.grad for p in palm.parameters() if p.grad is not None]

    ours = gradients()
    monkeypatch.setattr(products, "ours_is_faster", lambda: False)
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_learns_the_same(everything, monkeypatch, lora):
    called = []
    monkeypatch.setattr(products, "product", lambda *args, **kwargs: called.append(args) or product(*args, **kwargs))

    def gradients():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=50, dim=24, depth=2, dim_head=8, heads=4, finetune_scopes=["a"])
        torch.nn.init.normal_(palm.finetune_modules["a"][0][0].B)
        for p in palm.palm_parameters():
            p.requires_grad_(not lora)
        palm(torch.randint(0, 50, (3, 17)), return_loss=True, finetune_scope="a").backward()
        return [p.grad for p in palm.parameters() if p.grad is not None]

    ours = gradients()
    assert len(called) > 12
    monkeypatch.setattr(products, "ours_is_faster", lambda: False)
    for a, b in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2 avx512f\n", False),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fma avx2\n", True),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: avx\n", False),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fma avx2\n", False),
        ("CPU implementer\t: 0x41\nFeatures\t: fma avx2\n", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, cpuinfo, expected):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n" + cpuinfo)
    monkeypatch.setattr("palm_rlhf_pytorch.processor.CPUINFO", tmp_path / "cpuinfo")
    ours_is_faster.cache_clear()
    assert ours_is_faster() == expected and is_not_intel_with() == cpuinfo.startswith("vendor_id\t: Auth")
    ours_is_faster.cache_clear()
