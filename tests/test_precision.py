import copy

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.precision import Unrounded, UnroundedLinear, at_least_float32


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.rounded, self.kept = nn.Linear(3, 2), UnroundedLinear(3, 2)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_the_others(half):
    both = Both()
    weight = both.kept.weight.clone()
    for change in (lambda: both.to(half), lambda: both.to("cpu", half), both.half, both.bfloat16):
        change()
        assert both.rounded.weight.dtype in (torch.float16, torch.bfloat16)
        assert both.kept.bias.dtype == torch.float32 and torch.equal(both.kept.weight, weight)
    assert both.float().rounded.weight.dtype == torch.float32


def test_wider_dtypes_and_other_devices_are_followed():
    both = Both().double()
    assert {p.dtype for p in both.parameters()} == {torch.float64}
    assert both.bfloat16().kept.weight.dtype == torch.float64
    assert both.to("meta").kept.weight.is_meta
    assert both.to_empty(device="cpu").kept.weight.device.type == "cpu"


def test_buffers_too_and_copies():
    class Table(Unrounded):
        def __init__(self):
            super().__init__()
            self.register_buffer("rows", torch.arange(3))
            self.register_buffer("values", torch.tensor([1e-3, 1.001]))

    table = copy.deepcopy(Table().half())
    assert table.rows.dtype == torch.int64 and torch.equal(table.values, torch.tensor([1e-3, 1.001]))


def test_modules_within_are_rounded():
    class Around(Unrounded):
        def __init__(self):
            super().__init__()
            self.own, self.within = nn.Parameter(torch.ones(2)), Both()

    around = Around().bfloat16()
    dtypes = {name: p.dtype for name, p in around.named_parameters() if not name.endswith("bias")}
    assert dtypes == {
        "own": torch.float32,
        "within.rounded.weight": torch.bfloat16,
        "within.kept.weight": torch.float32,
    }


def test_a_linear_map_in_its_own_precision():
    linear, x = UnroundedLinear(64, 2).bfloat16(), torch.randn(5, 64).bfloat16()
    assert linear(x).dtype == torch.float32
    torch.testing.assert_close(linear(x), x.float() @ linear.weight.t() + linear.bias)
    assert set(linear.state_dict()) == {"weight", "bias"}


def test_at_least_float32():
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [at_least_float32(dtype) for dtype in dtypes] == [torch.float32] * 3 + [torch.float64]
