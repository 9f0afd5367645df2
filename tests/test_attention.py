import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import attention
from palm_rlhf_pytorch.attention import (
    Attention,
    added_to_scores,
    causal_key_mask,
    narrowed,
    segment_mask,
    window_mask,
)


def plain(q, k, v, causal, key_mask=None):
    """The formula, with every key repeated for the heads that share it."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        visible = visible.tril()
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(~visible, -torch.inf).softmax(dim=-1), v)


def qkv(kv_heads, n=7, heads=4, d=8):
    return torch.randn(2, heads, n, d), torch.randn(2, kv_heads, n, d), torch.randn(2, kv_heads, n, d)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("n", [7, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_is_the_formula_with_and_without_padding(kv_heads, causal, n, flash):
    q, k, v = qkv(kv_heads, n)
    attend = Attention(causal=causal, use_flash_attn=flash)
    torch.testing.assert_close(attend(q, k, v), plain(q, k, v, causal))
    mask = torch.arange(n) < torch.tensor([[n], [max(1, n - 3)]])
    real = mask[:, None, :, None]  # what a padded query sees is nobody's business
    expected = plain(q, k, v, causal, mask) * real
    torch.testing.assert_close(attend(q, k, v, mask=mask) * real, expected)
    if kv_heads == 1:  # the reference's shape of the one shared head
        torch.testing.assert_close(attend(q, k[:, 0], v[:, 0], mask=mask) * real, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_query_over_many_keys_is_the_formula(kv_heads):
    q, k, v = qkv(kv_heads)
    q, mask = q[:, :, -1:], torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(Attention()(q, k, v), plain(q, k, v, False))
    torch.testing.assert_close(Attention()(q, k, v, mask=mask), plain(q, k, v, False, mask))
    decoding = Attention(causal=True)(q, k, v, mask=mask[:, None, None, :])
    torch.testing.assert_close(decoding, plain(q, k, v, False, mask))


def test_keys_repeated_for_a_mask_are_the_same_keys(monkeypatch):
    """As on a GPU, whose fused kernels take a mask, or heads that share a key, but not both."""
    monkeypatch.setattr(attention, "shares_keys_under_masks", lambda q: False)
    q, k, v = qkv(2)
    mask = torch.arange(7) < torch.tensor([[7], [5]])
    real = mask[:, None, :, None]
    found = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kw: found.append(kw["enable_gqa"]) or kernel(*args, **kw)
    )
    torch.testing.assert_close(Attention(causal=True)(q, k, v, mask) * real, plain(q, k, v, True, mask) * real)
    torch.testing.assert_close(Attention(causal=True)(q, k, v), plain(q, k, v, True))
    assert found == [False, True]


def test_gradients_are_the_formulas():
    for kv_heads in (1, 2):
        inputs = [t.requires_grad_() for t in qkv(kv_heads)]
        weights = torch.randn(2, 4, 7, 8)
        ours = torch.autograd.grad((Attention(causal=True)(*inputs) * weights).sum(), inputs)
        theirs = torch.autograd.grad((plain(*inputs, True) * weights).sum(), inputs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_left_padding_is_invisible_and_nothing_turns_into_nan(kv_heads):
    q, k, v = qkv(kv_heads)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]).bool()
    out = Attention(causal=True)(q, k, v, mask=mask)
    assert out.isfinite().all()
    torch.testing.assert_close(out[0, :, 3:], plain(q, k, v, True, mask)[0, :, 3:])
    alone = Attention(causal=True)(q[:1, :, 3:], k[:1, :, 3:], v[:1, :, 3:])
    torch.testing.assert_close(out[:1, :, 3:], alone)


def test_causal_key_mask_by_hand():
    mask = causal_key_mask(torch.tensor([[False, True, True]]))
    assert mask.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]]]


def test_segment_mask_by_hand():
    segment_ids = torch.tensor([[0, 0, 1, -1]])
    assert segment_mask(segment_ids, True).int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    ]
    assert segment_mask(segment_ids, False).int().tolist() == [
        [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]
    ]


def test_window_mask_by_hand():
    mask = window_mask(torch.tensor([[0, 1, 2, 3]]), 4, 2)
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]]]
    ragged = window_mask(torch.tensor([[4], [1]]), 6, 3)  # one query a row, over a cache
    assert ragged.int().tolist() == [[[[0, 0, 1, 1, 1, 0]]], [[[1, 1, 0, 0, 0, 0]]]]


@pytest.mark.parametrize("window", [1, 2, 5, 7, 100])
def test_window_mask_is_what_it_says(window):
    positions, keys = torch.tensor([[0, 3, 4, 6], [2, 2, 9, 5]]), 11
    mask = window_mask(positions, keys, window)
    for b in range(2):
        for i in range(4):
            at = int(positions[b, i])
            assert mask[b, 0, i].nonzero().flatten().tolist() == list(range(max(0, at - window + 1), at + 1))


def test_narrowed_is_both():
    visible = window_mask(torch.arange(7)[None], 7, 3)
    padded = causal_key_mask(torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7]).bool())
    expected = added_to_scores(padded & visible, torch.float32)
    assert torch.equal(narrowed(None, visible, torch.float32), added_to_scores(visible, torch.float32))
    assert torch.equal(narrowed(padded, visible, torch.float32), expected)
    assert torch.equal(narrowed(added_to_scores(padded, torch.float32), visible, torch.float32), expected)
    assert narrowed(padded, visible, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_mask_added_to_the_scores_is_the_bool_one(kv_heads):
    q, k, v = qkv(kv_heads)
    visible = segment_mask(torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0] * 7]), True)
    added = added_to_scores(visible, torch.float32)
    assert added.dtype == torch.float32 and set(added.unique().tolist()) == {0.0, -torch.inf}
    torch.testing.assert_close(Attention(causal=True)(q, k, v, added), Attention(causal=True)(q, k, v, visible))


def test_a_whole_mask_replaces_causality():
    q, k, v = qkv(2)
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    torch.testing.assert_close(Attention(causal=True)(q, k, v, mask=mask), plain(q, k, v, False))


def test_a_row_of_padding_alone_is_finite():
    q, k, v = qkv(1)
    assert Attention()(q, k, v, mask=torch.zeros(2, 7, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("n", [7, 1])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_keys_are_never_expanded_in_memory(monkeypatch, kv_heads, n):
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v, **keywords):
        seen.append((k, v))
        return attention(q, k, v, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = qkv(kv_heads)
    Attention()(q[:, :, :n], k, v)
    for given, passed in zip((k, v), seen[0], strict=True):
        assert passed.data_ptr() == given.data_ptr()
        assert passed.untyped_storage().nbytes() == 2 * kv_heads * 7 * 8 * 4


@pytest.mark.parametrize("n", [7, 1])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_dropout_in_training_alone(flash, causal, n):
    q, k, v = qkv(1, n)
    mask = torch.ones(2, n, dtype=torch.bool)
    attend = Attention(dropout=1.0, causal=causal, use_flash_attn=flash)
    for inputs in ((q, k, v), (q, k, v, mask)):
        assert (attend.train()(*inputs) == 0).all()
        torch.testing.assert_close(attend.eval()(*inputs), plain(q, k, v, causal))


def test_dropout_keeps_the_expected_value():
    q, k, v = qkv(1)
    attend = Attention(dropout=0.5).train()
    mean = torch.stack([attend(q, k, v) for _ in range(3000)]).mean(dim=0)
    torch.testing.assert_close(mean, plain(q, k, v, False), atol=0.1, rtol=0)


def test_fewer_queries_than_keys_are_the_last_positions():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 6, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    attend = Attention(causal=True)
    whole = attend(q, k, v)
    for n in (1, 2, 5):
        assert torch.allclose(attend(q[:, :, -n:], k, v), whole[:, :, -n:], atol=1e-6)
