"""Tokens drawn in C++ are those that torch's operations draw of the same random numbers."""

import ctypes
from functools import partial

import pytest
import torch

from palm_rlhf_pytorch import native_draw, utils
from palm_rlhf_pytorch.generation import Sampling
from palm_rlhf_pytorch.native import library
from palm_rlhf_pytorch.native_draw import Kept

pytestmark = pytest.mark.skipif(library("draw") is None, reason="there is no C++ compiler to be found")

SAMPLINGS = {
    "plain": Sampling(),
    "hot": Sampling(1.7),
    "cold": Sampling(0.05),
    "greedy": Sampling(0.0),
    "the reference's top_k": Sampling(filter_logits=partial(utils.top_k, thres=0.9)),
    "the reference's top_k, one left": Sampling(filter_logits=partial(utils.top_k, thres=1.0)),
    "the reference's top_p, warm": Sampling(1.5, partial(utils.top_p, thres=0.3)),
    "top_k": Sampling(0.7, top_k=5),
    "top_k of all": Sampling(0.7, top_k=10**6),
    "top_p": Sampling(1.3, top_p=0.8),
    "hardly a top_p": Sampling(top_p=0.999999),
    "both": Sampling(0.7, top_k=20, top_p=0.6),
    "two counts": Sampling(0.7, partial(utils.top_k, thres=0.9), top_k=7),
    "greedy, filtered": Sampling(0.0, top_k=4, top_p=0.7),
}


def by_torch(monkeypatch, sampling, logits, generator=None):
    with monkeypatch.context() as patch:
        patch.setattr(native_draw, "fits", lambda _: False)
        return sampling.draw(logits, generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocab", [1, 3, 50, 256, 257, 3001])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_the_same_tokens_and_log_probs(monkeypatch, sampling, vocab):
    logits = 3 * torch.randn(40, vocab, generator=seeded(vocab))
    logits[::3, vocab // 2 + 1 :: 2] = -torch.inf
    tokens, log_probs = sampling.draw(logits, seeded())
    expected = by_torch(monkeypatch, sampling, logits, seeded())
    assert sampling.kept(vocab) is not None and (tokens.dtype, log_probs.dtype) == (torch.long, torch.float32)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(log_probs, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(0.8), Sampling(0.8, top_k=7), Sampling(0.8, top_p=0.7)])
def test_evenly_spread_numbers_draw_each_token_as_often_as_it_is_likely(sampling):
    logits, many = torch.randn(30, generator=seeded(3)), 20_000
    uniform = (torch.arange(many, dtype=torch.float64) + 0.5) / many
    kept = sampling.kept(30)
    tokens, log_probs = native_draw.drawn(logits.expand(many, -1), uniform, kept)
    probs = sampling.shape(logits[None])[0].softmax(dim=-1)
    torch.testing.assert_close(tokens.bincount(minlength=30) / many, probs, atol=2 / many, rtol=0)
    torch.testing.assert_close(log_probs.exp(), probs[tokens])
    assert (tokens.diff() >= 0).all()


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 17)])
def test_the_smallest_and_the_largest_number_draw_what_has_a_probability(uniform, token):
    logits = torch.randn(20_000, 20, generator=seeded())
    logits[:, [0, 18, 19]] = -torch.inf
    uniform = torch.full((20_000,), uniform, dtype=torch.float64)
    assert (native_draw.drawn(logits, uniform, Kept(1.0, 20))[0] == token).all()


@pytest.mark.parametrize("level", [0.0, -3.0, 2.5, -0.0])
def test_of_equal_logits_the_first_are_kept(level):
    logits = torch.full((1, 600), level).index_fill(1, torch.tensor([500]), level + 1).expand(1000, -1)
    uniform = torch.rand(1000, dtype=torch.float64, generator=seeded())
    tokens, log_probs = native_draw.drawn(logits, uniform, Kept(1.0, 4))
    assert tokens.unique().tolist() == [0, 1, 2, 500]
    assert log_probs[0].exp() == pytest.approx(1 / (3 + torch.e) if tokens[0] < 500 else torch.e / (3 + torch.e))
    even = torch.full((1000, 8), level)
    assert native_draw.drawn(even, uniform, Kept(1.0, 8, 0.5))[0].unique().tolist() == [0, 1, 2, 3, 4]  # more than half
    assert native_draw.drawn(even, None, Kept(0.0, 8))[0].unique().tolist() == [0]


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
def test_logits_of_any_size(monkeypatch, scale):
    logits = scale * torch.randn(20, 300, generator=seeded())
    # the smallest all have one probability: how many make a half is then a matter of rounding
    for sampling in (Sampling(), Sampling(top_k=9), Sampling(top_p=0.5 if scale > 1e-30 else 0.501), Sampling(0.0)):
        tokens, log_probs = sampling.draw(logits, seeded())
        expected = by_torch(monkeypatch, sampling, logits, seeded())
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(log_probs, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_logits_that_are_no_numbers_are_not_hidden(sampling, broken):
    logits = torch.randn(3, 600, generator=seeded())
    logits[1, 300] = broken
    tokens, log_probs = sampling.draw(logits)
    assert log_probs.isnan().tolist() == [False, True, False]
    assert ((tokens >= 0) & (tokens < 600)).all()


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_nothing_to_draw_from_is_not_hidden(sampling):
    tokens, log_probs = sampling.draw(torch.full((3, 70), -torch.inf))
    assert log_probs.isnan().all() and ((tokens >= 0) & (tokens < 70)).all()


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 1e-300])
def test_hardly_any_temperature_is_greedy(temperature):
    logits = torch.randn(5, 600, generator=seeded())
    tokens, log_probs = Sampling(temperature).draw(logits)
    assert torch.equal(tokens, logits.argmax(dim=-1)) and not log_probs.any()


def test_a_number_at_the_border_draws_what_comes_behind_it():
    uniform = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    for vocab in (4, 1024):  # in one block, and blocks
        tokens, _ = native_draw.drawn(torch.zeros(4, vocab), uniform, Kept(1.0, vocab))
        assert torch.equal(tokens, (uniform * vocab).long())


def test_what_is_unlikely_is_drawn_too():
    """A running sum in float32 would pass over the first of the two unlikely ones, or never reach it."""
    logits = torch.zeros(1, 600).index_fill(1, torch.tensor([598, 599]), -20.0)
    weight = logits.double().exp()[0, 598]
    uniform = (598 + weight / 2) / (598 + 2 * weight)
    assert native_draw.drawn(logits, uniform[None], Kept(1.0, 600))[0].item() == 598


@pytest.mark.parametrize("top_k", [2**63, 2**64 + 1, float("inf")])
def test_any_count_beyond_the_vocabulary_is_all_of_it(top_k):
    logits = torch.randn(9, 50, generator=seeded())
    assert torch.equal(Sampling(top_k=top_k).draw(logits, seeded())[0], Sampling().draw(logits, seeded())[0])


def test_rows_may_lie_apart(monkeypatch):
    logits = torch.randn(6, 100, generator=seeded())[::2, 3:90]
    assert native_draw.fits(logits)
    expected = by_torch(monkeypatch, Sampling(), logits, seeded())
    assert torch.equal(Sampling().draw(logits, seeded())[0], expected[0])


def test_what_does_not_fit_is_torchs():
    assert not native_draw.fits(torch.randn(3, 4).bfloat16()) and not native_draw.fits(torch.randn(4, 3).t())
    assert not native_draw.fits(torch.randn(3, 4, 5)) and not native_draw.fits(torch.randn(3, 4, requires_grad=True))
    filters = [lambda x: x, partial(utils.top_k), partial(lambda x, thres: x, thres=0.9)]
    assert all(Sampling(filter_logits=one).kept(9) is None for one in filters)
    by_mass = partial(utils.top_p, thres=0.9)
    assert all(Sampling(1.0, by_mass, **own).kept(9) is None for own in ({"top_k": 3}, {"top_p": 0.5}))
    logits = torch.zeros(50, 9)
    tokens, log_probs = Sampling(filter_logits=lambda x: x.index_fill(1, torch.tensor([0, 3]), 9.0)).draw(logits)
    assert tokens.shape == log_probs.shape == (50,) and ((tokens == 0) | (tokens == 3)).float().mean() > 0.9


def test_nobody_draws_for_no_rows():
    tokens, log_probs = Sampling().draw(torch.zeros(0, 5))
    assert tokens.shape == log_probs.shape == (0,)


def test_the_likeliest_token_takes_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Sampling(0.0).draw(torch.randn(3, 9, generator=seeded()))
    assert torch.equal(torch.rand(1), expected)


def test_both_sides_mean_the_same_struct():
    assert library("draw").size_of_call() == ctypes.sizeof(native_draw.Call)
