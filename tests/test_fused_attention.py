"""C++ against torch's own attention in float64."""

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import attention, fused_attention
from palm_rlhf_pytorch.attention import Attention, added_to_scores, segment_mask, window_mask
from palm_rlhf_pytorch.fused_attention import FusedAttention, attend, attend_backward, fits, formula

compiles = pytest.mark.skipif(fused_attention.library("attention") is None, reason="there is no C++ compiler")
GROUPS = [(1, 1), (4, 1), (4, 2), (3, 3), (9, 3)]  # heads, and those that keys have


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(fused_attention, "SMALL", 0)


def qkv(n, j, heads=4, kv_heads=1, d=32, b=2):
    return [torch.randn(b, h, m, d, requires_grad=True) for h, m in ((heads, n), (kv_heads, j), (kv_heads, j))]


def plain(q, k, v, visible):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def causal_mask(n, j):
    return torch.ones(n, j, dtype=torch.bool).tril(j - n)[None, None]


def close(ours, theirs, tolerance=1e-5):
    """To so much of the largest number, or of 1."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


def agrees(q, k, v, causal, mask=None, tolerance=1e-5):
    """Values and gradients."""
    inputs, n, j = (q, k, v), q.shape[2], k.shape[2]
    added = mask if mask is None or mask.dtype != torch.bool else added_to_scores(mask, q.dtype)
    assert fits(q, k, v, added, causal)
    given = mask if mask is not None and mask.dtype == torch.bool else causal_mask(n, j) if causal else None
    given = mask.double() if mask is not None and mask.dtype != torch.bool else given
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, theirs = fused_attention.fused_attention(q, k, v, added, causal), plain(*exact, given)
    close(ours, theirs, tolerance)
    close(formula(*exact, None if added is None else added.double(), causal), theirs)
    assert ours.transpose(1, 2).is_contiguous()  # heads side by side are a view of it
    weights = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, weights)
    for a, e in zip(found, torch.autograd.grad(theirs, exact, weights.double()), strict=True):
        close(a, e, tolerance)
        assert a.transpose(1, 2).is_contiguous()


@compiles
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 79, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
def test_is_the_formula(heads, kv_heads, n, causal):
    agrees(*qkv(n, n, heads, kv_heads), causal)


@compiles
@pytest.mark.parametrize("d", [16, 32, 48, 64, 128])
def test_heads_of_every_size(d):
    for n in (17, 70):
        agrees(*qkv(n, n, 4, 2, d), True)
        agrees(*qkv(n, n, 4, 2, d), False)


@compiles
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "j"), [(1, 2), (1, 130), (2, 64), (15, 16), (17, 79), (33, 97), (64, 128), (80, 300)])
def test_queries_are_the_last_positions(n, j, causal):
    agrees(*qkv(n, j), causal)
    agrees(*qkv(n, j, 4, 2), causal)


@compiles
def test_more_queries_than_keys():
    agrees(*qkv(40, 7), False)
    assert not fits(*qkv(40, 7), None, True)  # the first would see nothing


@compiles
def test_many_positions():
    agrees(*qkv(517, 517, 8, 1, 64, b=1), True)
    agrees(*qkv(333, 517, 3, 3, 16, b=1), False)


@compiles
@pytest.mark.parametrize("n", [17, 79, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (4, 2), (3, 3)])
def test_masks(heads, kv_heads, n):
    inputs = qkv(n, n, heads, kv_heads)
    documents = (torch.rand(2, n).cumsum(dim=-1) // (n / 7)).long()
    for causal in (True, False):
        agrees(*inputs, False, segment_mask(documents, causal))
    agrees(*inputs, False, window_mask(torch.arange(n)[None], n, 9))  # one for all rows
    scattered = (torch.rand(2, 1, n, n) < 0.2) | torch.eye(n, dtype=torch.bool)
    agrees(*inputs, False, scattered)
    bias = added_to_scores(scattered, torch.float32) + torch.randn(1, 1, n, n)
    agrees(*inputs, False, bias)
    agrees(*inputs, False, bias[:1])


@compiles
def test_a_mask_of_keys_alone():
    q, k, v = qkv(70, 90)
    padded = torch.arange(90) < torch.tensor([[90], [65]])
    visible = padded[:, None, None]
    exact = [t.detach().double() for t in (q, k, v)]
    close(Attention()(q, k, v, padded), plain(*exact, visible.expand(-1, -1, 70, -1)))
    agrees(q, k, v, False, visible)


@compiles
def test_who_sees_nothing_gets_nothing():
    q, k, v = qkv(40, 40)
    visible = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    visible[0, :, 5:38] = False
    out = fused_attention.fused_attention(q, k, v, added_to_scores(visible, torch.float32))
    assert (out[0, :, 5:38] == 0).all() and (out[0, :, 38:] != 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()


@compiles
@pytest.mark.parametrize("size", [1e-3, 30.0, 1e3, 1e4])
def test_scores_of_every_size(size):
    """As near as torch comes in float32: what rounding does to large scores, nobody mends."""
    q, k, v = ((t * size if i == 0 else t).detach().requires_grad_() for i, t in enumerate(qkv(79, 79)))
    visible, weights = causal_mask(79, 79), torch.randn(2, 4, 79, 32)

    def found(attended, *inputs):
        return attended, *torch.autograd.grad(attended, inputs, weights.to(attended.dtype))

    double = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = found(plain(*double, visible), *double)
    theirs = found(plain(q, k, v, visible), q, k, v)
    ours = found(fused_attention.fused_attention(q, k, v, causal=True), q, k, v)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert (a - e).abs().max() <= 8 * (b - e).abs().max() + 1e-6 * e.abs().max()


@compiles
def test_what_is_broken_is_told():
    q, k, v = (t.detach() for t in qkv(20, 20))
    q[0, 0, 3, 5] = torch.nan
    out = fused_attention.fused_attention(q, k, v, causal=True)
    assert out[0, 0, 3].isnan().all() and out.isnan().sum() == 32


@compiles
def test_tensors_are_read_where_they_lie():
    """Of one matrix, as in the block, and of a cache, with features alone side by side."""
    together = torch.randn(2, 79, 7 * 32 + 3)
    q, k, v = (t.unflatten(-1, (-1, 32)).transpose(1, 2) for t in together[..., 3:].split((160, 32, 32), dim=-1))
    agrees(*(t.requires_grad_() for t in (q.detach(), k.detach(), v.detach())), True)
    cache = torch.randn(2, 100, 2, 2, 32)
    k, v = (t[:, :90].transpose(1, 2) for t in cache.unbind(2))
    agrees(torch.randn(2, 4, 79, 32).requires_grad_(), k.requires_grad_(), v.requires_grad_(), True)
    scores = torch.randn(2, 1, 79, 200)[..., 5:84]
    agrees(*qkv(79, 79), False, scores)
    q, k, v = qkv(20, 20)
    expected = torch.autograd.grad(fused_attention.fused_attention(q, k, v), (q, k, v), torch.ones_like(q))
    found = torch.autograd.grad(fused_attention.fused_attention(q, k, v).sum(), (q, k, v))  # a gradient without memory
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@compiles
@pytest.mark.parametrize("chosen", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some(chosen):
    inputs = qkv(33, 33)
    wanted = torch.autograd.grad(fused_attention.fused_attention(*inputs).square().sum(), inputs)
    some = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(inputs)]
    fused_attention.fused_attention(*some).square().sum().backward()
    for i, (t, expected) in enumerate(zip(some, wanted, strict=True)):
        assert torch.equal(t.grad, expected) if i in chosen else t.grad is None


@compiles
def test_gradients_are_differences():
    inputs = qkv(18, 18, d=16, b=1)
    directions, step = [torch.randn_like(t) for t in inputs], 1e-2
    weights = torch.randn(1, 4, 18, 16)

    def loss(at):
        moved = [(t + at * way).detach().requires_grad_() for t, way in zip(inputs, directions, strict=True)]
        return (fused_attention.fused_attention(*moved, causal=True) * weights).sum(), moved

    value, moved = loss(0.0)
    found = sum((g * way).sum() for g, way in zip(torch.autograd.grad(value, moved), directions, strict=True))
    torch.testing.assert_close(found, (loss(step)[0] - loss(-step)[0]) / (2 * step), rtol=1e-2, atol=1e-2)


@compiles
@pytest.mark.parametrize("masked", [True, False])
def test_second_derivatives(masked):
    inputs = qkv(9, 9, 4, 2, 16)
    mask = added_to_scores(segment_mask(torch.tensor([[0] * 4 + [1] * 5]), True), torch.float32) if masked else None

    def second(attended, inputs):
        first = torch.autograd.grad(attended.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    ours = second(FusedAttention.apply(*inputs, mask, not masked), inputs)
    theirs = second(formula(*inputs, mask, not masked), inputs)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-4)


@compiles
@pytest.mark.parametrize(("b", "heads", "kv_heads"), [(1, 8, 1), (3, 4, 2)])
def test_threads_change_nothing(b, heads, kv_heads):
    q, k, v = (t.detach() for t in qkv(150, 150, heads, kv_heads, b=b))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, logs = attend(q, k, v, None, True)
            found.append((out, logs, *attend_backward(q, k, v, None, True, out, logs, q)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.fixture
def ways(monkeypatch):
    """Which way each call went."""
    taken = []
    for module, name in ((attention, "fused_attention"), (F, "scaled_dot_product_attention")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name, **kw: taken.append(name.split("_")[0]) or real(*a, **kw)
        )
    return taken


@compiles
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap
def test_what_takes_torchs_way(ways, monkeypatch):
    q, k, v = (t.detach() for t in qkv(20, 20))
    attend = Attention(causal=True)
    attend(q, k, v)
    attend(q, k[:, 0], v[:, 0])  # the reference's shape of the one shared head
    attend(q, k, v, torch.ones(2, 20, dtype=torch.bool))
    attend(q, k, v, torch.zeros(1, 1, 20, 20))
    assert ways == ["fused"] * 4
    ways.clear()
    attend(*(t.double() for t in (q, k, v)))
    attend(q[..., :8], k[..., :8], v[..., :8])
    attend(*(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)))
    attend(q[:, :, -1:], k, v)  # one query: decoding
    attend(q, k, v, torch.zeros(2, 4, 20, 20))  # a mask for every head
    attend(q, k, v, torch.zeros(1, 1, 20, 20, requires_grad=True))
    Attention(dropout=0.1)(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend(q, k, v)
    torch.func.vmap(attend)(q[None], k[None], v[None])
    monkeypatch.setattr(fused_attention, "SMALL", 2 * 4 * 20 * 20 * 32 + 1)
    attend(q, k, v)
    assert ways == ["scaled"] * 10


def test_without_a_library(ways, monkeypatch):
    inputs = [t.detach() for t in qkv(20, 20)]
    attend = Attention(causal=True)
    ours = attend(*inputs)
    monkeypatch.setattr(fused_attention, "library", lambda name: None)
    torch.testing.assert_close(attend(*inputs), ours)
    assert ways[-1] == "scaled"


@compiles
def test_nothing_of_all_pairs_is_kept():
    q, k, v = qkv(300, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fused_attention.fused_attention(q, k, v, causal=True)
    assert max(kept) == q.numel() and sum(kept) == 2 * q.numel() + 2 * k.numel() + q.numel() // 32


@compiles
@pytest.mark.parametrize(
    ("keywords", "packed"),
    [
        ({}, False),
        ({}, True),
        ({"kv_heads": 2, "sliding_window": 7, "global_layers": [1]}, False),
        ({"causal": False}, False),
        ({"gradient_checkpointing": True}, False),
    ],
)
def test_a_model_learns_the_same(make_palm, ways, monkeypatch, keywords, packed):
    palm = make_palm(dim_head=16, **keywords)
    ids = torch.randint(0, 17, (3, 40))
    documents = {"segment_ids": torch.arange(40).expand(3, -1) // 13} if packed else {}

    def found():
        loss = palm(ids, return_loss=True, **documents)
        return loss, *torch.autograd.grad(loss, list(palm.parameters()), allow_unused=True)

    ours = found()
    assert ways and set(ways) == {"fused"}
    monkeypatch.setattr(attention, "fits", lambda *a: False)
    for a, b in zip(ours, found(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@compiles
def test_a_model_continues_the_same(make_palm, ways):
    palm = make_palm(dim_head=16)
    ids = torch.randint(0, 17, (3, 40))
    with torch.no_grad():
        cache = palm.new_cache(3, 50)
        parts = [palm(part, cache=cache) for part in ids.split((20, 12, 8), dim=1)]
        assert set(ways) == {"fused"}
        torch.testing.assert_close(torch.cat(parts, dim=1), palm(ids), atol=1e-5, rtol=1e-4)
