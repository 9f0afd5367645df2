import math

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


def test_entropy_by_hand_also_with_impossible_tokens():
    log_probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.25, 0.25, 0.5]]).log().requires_grad_()
    entropy = ops.entropy_of(log_probs)
    assert entropy.tolist() == pytest.approx([math.log(2), 0.0, 1.5 * math.log(2)])
    entropy.sum().backward()
    assert log_probs.grad.isfinite().all()


def test_log_softmax_is_float32_and_finite_at_a_gap_of_200():
    logits = torch.tensor([[0.0, 200.0, -200.0]], dtype=torch.bfloat16)
    log_probs = ops.log_softmax(logits)
    assert log_probs.dtype == torch.float32
    assert log_probs.tolist() == [[-200.0, 0.0, -400.0]]
    assert ops.log_softmax(logits, temperature=2.0).tolist() == [[-100.0, 0.0, -200.0]]


def test_bfloat16_logits_are_upcast_before_the_softmax():
    embeds, weight = torch.randn(9, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    targets = torch.randint(0, 50, (9,))
    log_probs, entropy = ops.linear_log_probs(embeds, weight, targets)
    assert log_probs.dtype == entropy.dtype == torch.float32
    exact = (embeds @ weight.t()).float().log_softmax(-1)
    torch.testing.assert_close(log_probs, exact.gather(-1, targets[:, None]).squeeze(-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (0.25, 0.7)])
def test_linear_log_probs_in_chunks_is_the_whole(monkeypatch, scale, temperature):
    embeds, weight = torch.randn(23, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(0, 11, (23,))
    plain = (embeds @ weight.t() * scale / temperature).log_softmax(-1)
    expected = plain[torch.arange(23), targets], -(plain.exp() * plain).sum(-1)
    coefficients = torch.randn(2, 23)
    gradients = torch.autograd.grad(
        sum((c * e).sum() for c, e in zip(coefficients, expected, strict=True)), (embeds, weight)
    )

    widths = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(ops.F, "linear", lambda x, w: widths.append(len(x)) or linear(x, w))
    for limit in (11 * 5, 1, 2**24):  # five rows of 11 logits; never less than one row; all at once
        widths.clear()
        monkeypatch.setattr(ops, "LOGITS_PER_CHUNK", limit)
        result = ops.linear_log_probs(embeds, weight, targets, scale, temperature)
        assert max(widths) == {55: 5, 1: 1, 2**24: 23}[limit]
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        loss = sum((c * r).sum() for c, r in zip(coefficients, result, strict=True))
        for ours, theirs in zip(torch.autograd.grad(loss, (embeds, weight)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_linear_log_probs_of_nothing():
    log_probs, entropy = ops.linear_log_probs(torch.randn(0, 8), torch.randn(5, 8), torch.zeros(0, dtype=torch.long))
    assert log_probs.shape == entropy.shape == (0,)


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
