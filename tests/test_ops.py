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


def test_scatter_vectors_to_mask():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.arange(6.0).view(3, 2).requires_grad_()
    laid = ops.scatter_to_mask(values, mask)
    assert laid.tolist() == [[[0, 1], [0, 0], [2, 3]], [[0, 0], [4, 5], [0, 0]]]
    (laid * torch.arange(12.0).view(2, 3, 2)).sum().backward()
    assert values.grad.tolist() == [[0, 1], [4, 5], [8, 9]]
    compiled = torch.compile(ops.scatter_to_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(values, mask), laid)
    assert ops.scatter_to_mask(values[:0], torch.zeros_like(mask)).count_nonzero() == 0


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


LENGTHS_OF = {
    "like": [*range(90, 100)] * 4,
    "unlike": [(37 * i) % 401 for i in range(1, 61)],
    "few long": [3, 500, 2, 4, 1, 498, 3] * 3,
    "zeros": [0, 5, 0, 300],
    "short": [1, 4, 2, 3, 2] * 4,
    "one": [7],
}


@pytest.mark.parametrize("least", [1, 128])
@pytest.mark.parametrize("max_tokens", [None, 1, 450, 1000])
@pytest.mark.parametrize("kind", LENGTHS_OF)
def test_groups_of_like_length(monkeypatch, kind, max_tokens, least):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", least)
    lengths, waste = torch.tensor(LENGTHS_OF[kind]), 0.1
    groups = ops.groups_of_like_length(lengths, max_tokens, waste)
    rows = torch.cat(groups)
    assert rows.sort().values.tolist() == list(range(len(lengths)))
    assert lengths[rows].tolist() == sorted(lengths.tolist(), reverse=True)
    for group, behind in zip(groups, [*groups[1:], None], strict=True):
        longest, count = int(lengths[group[0]]), len(group)
        positions, real = longest * count, int(lengths[group].sum())
        assert max_tokens is None or positions <= max_tokens or count == 1
        if positions - longest >= least:
            assert real >= (1 - waste) * positions
        if behind is not None:  # one row more would have been too much
            more, found = positions + longest, real + int(lengths[behind[0]])
            wasteful = positions >= least and found < (1 - waste) * more
            assert wasteful or (max_tokens is not None and more > max_tokens)


def test_groups_by_hand(monkeypatch):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", 20)
    lengths = torch.tensor([10, 2, 9, 10, 1, 5])
    assert [g.tolist() for g in ops.groups_of_like_length(lengths)] == [[0, 3, 2], [5, 1, 4]]
    assert [g.tolist() for g in ops.groups_of_like_length(lengths, waste=0.3)] == [[0, 3, 2, 5, 1], [4]]
    assert [g.tolist() for g in ops.groups_of_like_length(lengths, max_tokens=20)] == [[0, 3], [2, 5], [1, 4]]
    assert [g.tolist() for g in ops.groups_of_like_length(torch.tensor([4, 4, 4]))] == [[0, 1, 2]]  # stable
