import pytest
import torch

from palm_rlhf_pytorch import ops


def test_masked_mean_by_hand():
    seq = torch.tensor([[1.0, 2.0, 6.0], [5.0, 7.0, 100.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert ops.masked_mean(seq, mask).tolist() == [3.0, 5.0]
    assert ops.masked_mean(seq, mask, dim=None).item() == pytest.approx(14 / 4)
    assert ops.masked_mean(seq, mask, keepdim=True).shape == (2, 1)
    assert ops.masked_mean(seq, keepdim=True)[0].tolist() == [3.0]
    features = torch.stack((seq, -seq), dim=-1)
    assert ops.masked_mean(features, mask).tolist() == [[3.0, -3.0], [5.0, -5.0]]


def test_masked_mean_of_nothing_is_zero_and_masked_values_cannot_leak():
    seq = torch.tensor([[torch.nan, 2.0], [torch.inf, torch.nan]], requires_grad=True)
    mean = ops.masked_mean(seq, torch.tensor([[False, True], [False, False]]))
    assert mean.tolist() == [2.0, 0.0]
    mean.sum().backward()
    assert seq.grad.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_whiten_is_over_the_whole_masked_batch_and_padding_is_nothing():
    t, mask = torch.randn(4, 6) * 3 + 5, torch.rand(4, 6) > 0.3
    white = ops.whiten(t, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (white[~mask] == 0).all()
    # rows keep their differences: one sequence with a higher reward stays higher
    assert (ops.whiten(t + 10 * (torch.arange(4) == 0)[:, None], mask)[0][mask[0]] > 0).all()
    padded = torch.nn.functional.pad(t, (0, 3), value=1e6)
    torch.testing.assert_close(ops.whiten(padded, torch.nn.functional.pad(mask, (0, 3)))[:, :6], white)
    kept = ops.whiten(t, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask], white[mask] + t[mask].mean())


def test_scatter_to_mask_and_its_gradient():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    laid = ops.scatter_to_mask(values, mask)
    assert laid.tolist() == [[0, 1, 2], [3, 0, 0]]
    (laid * torch.arange(6.0).reshape(2, 3)).sum().backward()
    assert values.grad.tolist() == [1, 2, 3]


def test_masks():
    assert ops.lengths_to_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    right, left, hole = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [0, 1, 1]], [[1, 0, 1], [1, 1, 1]]]).bool()
    assert [ops.has_token_after_padding(m) for m in (right, left, hole)] == [False, True, True]
