import math

import pytest
import torch

from palm_rlhf_pytorch.lora import LoRA, LoraOptions, side_by_side


def test_by_hand():
    lora = LoRA(2, 2, r=1, alpha=3.0)
    with torch.no_grad():
        lora.A.copy_(torch.tensor([[1.0], [2.0]]))
        lora.B.copy_(torch.tensor([[5.0, 7.0]]))
    # x A = 1 * 1 + 10 * 2 = 21, times B, times alpha / r = 3
    assert lora(torch.tensor([[1.0, 10.0]])).tolist() == [[315.0, 441.0]]
    assert lora.weight.tolist() == [[15.0, 21.0], [30.0, 42.0]]


def test_starts_at_nothing_with_scale_one():
    lora = LoRA(6, 4, r=3)
    assert lora.scale == 1.0 and lora.A.shape == (6, 3) and lora.B.shape == (3, 4)
    assert (lora(torch.randn(2, 5, 6)) == 0).all() and (lora.weight == 0).all()
    assert lora.A.std() > 0  # else nothing could ever be learned


def test_merged_is_unmerged():
    lora, x = LoRA(6, 4, r=2, alpha=5), torch.randn(3, 6)
    torch.nn.init.normal_(lora.B)
    torch.testing.assert_close(lora(x), x @ lora.weight)


def test_the_dense_product_is_never_made():
    x = torch.ones(1, 300_000, requires_grad=True)
    LoRA(300_000, 300_000, r=1)(x).sum().backward()  # dense: 360 GB
    assert x.grad.shape == x.shape


def test_rank_must_be_positive():
    with pytest.raises(ValueError, match="rank must be a positive integer, got 0"):
        LoRA(4, 4, r=0)


def test_side_by_side_is_each_adapter():
    adapters = [LoRA(6, 4, r=2, alpha=3), LoRA(6, 2, r=3), LoRA(6, 2)]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B)
    x = torch.randn(2, 5, 6)
    expected = torch.cat([adapter(x) for adapter in adapters], dim=-1)
    torch.testing.assert_close(side_by_side(adapters, x), expected)


def test_the_scale_of_each_option():
    assert LoRA(6, 4, r=4, alpha=8).scale == 2 and LoRA(6, 4, r=4, alpha=8, rslora=True).scale == 4
    assert LoraOptions(r=8).scale == 1 and LoraOptions(r=9, rslora=True).scale == 3  # alpha is r
    assert LoraOptions(r=2, alpha=3.0, rslora=True).scale == pytest.approx(3 / math.sqrt(2))


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ValueError, match="alpha must be above 0, or None for the rank"):
        LoraOptions(alpha=alpha)


def test_a_half_beside_float32_adapters():
    """x goes in as it is, the product is made in float32 and rounded once; half precision does not reach A and B."""
    adapters = [LoRA(16, 4, r=2, alpha=3).bfloat16(), LoRA(16, 2, r=3).half()]
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B)
        assert adapter.A.dtype == adapter.B.dtype == torch.float32
    x = torch.randn(2, 5, 16).bfloat16().requires_grad_()
    expected = torch.cat([x.float() @ adapter.weight for adapter in adapters], dim=-1)
    for ours in (side_by_side(adapters, x), torch.cat([adapter(x) for adapter in adapters], dim=-1)):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, atol=1e-5, rtol=2**-8)
    side_by_side(adapters, x).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and all(adapter.B.grad.dtype == torch.float32 for adapter in adapters)
