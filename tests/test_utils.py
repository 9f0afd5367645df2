import pytest
import torch
from torch import nn

from palm_rlhf_pytorch import utils

PROBS = torch.tensor([[0.1, 0.4, 0.05, 0.25, 0.2]])  # in order: 1 (.4), 3 (.65), 4 (.85), 0 (.95), 2


def kept(logits: torch.Tensor) -> set[int]:
    return set((logits[0] > -torch.inf).nonzero().flatten().tolist())


@pytest.mark.parametrize("thres, count", [(0.9, 1), (0.61, 2), (0.5, 3), (0.0, 5), (1.0, 1)])
def test_top_k_keeps_the_reference_share(thres, count):
    filtered = utils.top_k(PROBS.log(), thres=thres)
    assert kept(filtered) == set([1, 3, 4, 0, 2][:count])
    assert torch.equal(filtered[filtered > -torch.inf], PROBS.log()[filtered > -torch.inf])


def test_top_k_of_a_large_vocabulary_is_the_ceiling():
    assert len(kept(utils.top_k(torch.randn(1, 101), thres=0.9))) == 11


@pytest.mark.parametrize("mass, count", [(0.01, 1), (0.39, 1), (0.5, 2), (0.7, 3), (0.86, 4), (0.96, 5), (1.0, 5)])
def test_nucleus_keeps_the_smallest_set_above_the_mass(mass, count):
    assert kept(utils.nucleus(PROBS.log(), mass)) == set([1, 3, 4, 0, 2][:count])
    # the reference's name has the opposite convention: thres 0.9 keeps 10 % of the mass
    assert kept(utils.top_p(PROBS.log(), thres=1 - mass)) == set([1, 3, 4, 0, 2][:count])


def test_the_whole_mass_keeps_every_token_despite_rounding():
    logits = torch.linspace(0, -20, 2000)[None]  # in float32 the sum passes 1 long before the end
    assert torch.equal(utils.nucleus(logits, 1.0), logits)


def test_nucleus_in_bfloat16_sums_in_float32():
    # 3001 of 10000 equal tokens have more than 0.3 of the mass; a sum of bfloat16 probabilities would take 3014
    assert len(kept(utils.nucleus(torch.zeros(1, 10_000).bfloat16(), 0.3))) == pytest.approx(3001, abs=1)


def test_filters_leave_more_dimensions_alone():
    logits = torch.randn(2, 3, 10)
    for name, thres in (("top_k", 0.7), ("nucleus", 0.4)):
        whole, row = (getattr(utils, name)(t, thres) for t in (logits, logits[1, 2]))
        assert torch.equal(whole[1, 2], row)


def test_gumbel_sample_follows_the_softmax_at_temperature():
    draws = utils.gumbel_sample(PROBS.log().expand(40_000, -1), temperature=2.0)
    expected = (PROBS[0] ** 0.5 / (PROBS[0] ** 0.5).sum()) * 40_000
    chi_square = ((torch.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # the 0.1 % point with 4 degrees of freedom


def test_gumbel_sample_at_zero_is_greedy_and_never_draws_what_is_filtered_out():
    logits = torch.tensor([[1.0, 3.0, -torch.inf]]).expand(2000, -1)
    assert (utils.gumbel_sample(logits, temperature=0.0) == 1).all()
    assert set(utils.gumbel_sample(logits, temperature=50.0).tolist()) == {0, 1}
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    one, two = (utils.gumbel_sample(logits, 1.0, generator=g) for g in generators)
    assert torch.equal(one, two)
    assert utils.gumbel_noise(torch.zeros(100, 1000).bfloat16()).isfinite().all()


@pytest.mark.parametrize("mode", [True, False])
def test_eval_decorator_puts_the_mode_back(mode):
    class Module(nn.Module):
        @utils.eval_decorator
        def method(self, fail=False):
            assert not self.training
            if fail:
                raise KeyError
            return 3

    module = Module().train(mode)
    assert module.method() == 3
    assert module.training is mode
    with pytest.raises(KeyError):
        module.method(fail=True)
    assert module.training is mode


def test_masked_mean_is_the_one_of_ops():
    from palm_rlhf_pytorch import ops

    assert utils.masked_mean is ops.masked_mean


def test_inverse_cdf_sample_follows_the_distribution_and_never_draws_what_has_none():
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.6, 0.15, 0.0]).log().expand(40_000, -1)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn, again = (utils.inverse_cdf_sample(log_probs, generator=g) for g in generators)
    assert torch.equal(drawn, again)
    frequencies = drawn.bincount(minlength=6) / 40_000
    torch.testing.assert_close(frequencies, log_probs[0].exp(), atol=0.01, rtol=0)
    assert (frequencies[[0, 2, 5]] == 0).all()


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 17)])
def test_inverse_cdf_sample_at_the_ends(monkeypatch, uniform, token):
    """The smallest and largest numbers that torch.rand gives draw the first and last token that have a probability,
    whatever their probabilities add up to.
    """
    torch.manual_seed(0)
    log_probs = torch.randn(20_000, 20).log_softmax(dim=-1)
    log_probs[:, [0, 18, 19]] = -torch.inf
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, uniform, dtype=torch.float64))
    assert (utils.inverse_cdf_sample(log_probs) == token).all()
