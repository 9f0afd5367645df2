import math

import pytest
import torch

from palm_rlhf_pytorch.rotary import RotaryEmbedding


def scores(rotary: RotaryEmbedding, q, k, positions, centre=None):
    turned = rotary(positions, centre)
    return turned.rotate_queries(q) @ turned.rotate_keys(k).transpose(-1, -2)


def test_by_hand():
    # d = 4: frequencies 1 and 100 ** -0.5 = 0.1; position 2 turns (x0, x2) by 2 and (x1, x3) by 0.2
    rotary = RotaryEmbedding(4, use_xpos=False, theta=100.0)
    assert rotary.inv_freq.tolist() == pytest.approx([1.0, 0.1])
    turned = rotary(3).rotate_queries(torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 4))[0, 0]
    assert turned[0].tolist() == [1, 2, 3, 4]
    cos, sin, slow_cos, slow_sin = math.cos(2), math.sin(2), math.cos(0.2), math.sin(0.2)
    expected = [cos - 3 * sin, 2 * slow_cos - 4 * slow_sin, sin + 3 * cos, 2 * slow_sin + 4 * slow_cos]
    assert turned[2].tolist() == pytest.approx(expected)


def test_xpos_by_hand():
    # scales (0 + 0.4 * 4) / (1.4 * 4) = 2/7 and (2 + 1.6) / 5.6 = 9/14; at distance 3 and base 2 to the power 1.5
    rotary = RotaryEmbedding(4, scale_base=2)
    assert rotary.scale.tolist() == pytest.approx([2 / 7, 9 / 14])
    q = k = torch.eye(4)[1].expand(1, 1, 4, 4)
    assert scores(rotary, q, k, 4)[0, 0, 3, 0].item() == pytest.approx((9 / 14) ** 1.5 * math.cos(3 * 0.01))


@pytest.mark.parametrize("use_xpos", [True, False])
def test_scores_depend_on_distance_alone_and_the_centre_cancels(use_xpos):
    rotary = RotaryEmbedding(8, scale_base=16, use_xpos=use_xpos)
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    plain = scores(rotary, q, k, 6)
    for centre in (0, 40, -7.5):
        torch.testing.assert_close(scores(rotary, q, k, torch.arange(6), centre), plain)
    torch.testing.assert_close(scores(rotary, q, k, torch.arange(6) + 90, 90), plain, atol=1e-4, rtol=1e-4)


def test_rows_may_have_positions_of_their_own():
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 1, 4, 8)
    positions = torch.stack((torch.arange(4), torch.arange(4) + 5))
    together = scores(rotary, q, k, positions, 3)
    for row in range(2):
        torch.testing.assert_close(together[row], scores(rotary, q[row], k[row], positions[row], 3))


def test_bfloat16_and_half_keep_the_frequencies():
    rotary = RotaryEmbedding(8, theta=500_000.0)
    before = rotary.inv_freq.clone(), rotary.scale.clone()
    for changed in (rotary.bfloat16(), rotary.half(), rotary.to(torch.bfloat16)):
        assert changed.inv_freq.dtype == torch.float32
        assert torch.equal(changed.inv_freq, before[0]) and torch.equal(changed.scale, before[1])
    turned = rotary(2000).rotate_queries(torch.ones(1, 1, 2000, 8).bfloat16())
    assert turned.dtype == torch.bfloat16
    exact = rotary(2000).rotate_queries(torch.ones(1, 1, 2000, 8)).bfloat16()
    assert torch.equal(turned, exact)  # turned in float32, rounded once
