import pytest
import torch

from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss


def test_clipped_regression_is_the_larger_loss():
    loss = ClippedRegression(0.4)(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.5]))
    # (1 - 2)^2 = 1 < (0.4 - 2)^2 = 2.56;  (1 - 0.5)^2 = 0.25 > (0.4 - 0.5)^2 = 0.01
    torch.testing.assert_close(loss, torch.tensor([1.28, 0.125]))
    assert torch.equal(ClippedRegression().decode(loss), loss)


def test_bins_stand_at_the_ends_of_the_range():
    critic = HLGauss(6, 0.0, 5.0)
    one_hot = torch.eye(6) * 200 - 100
    torch.testing.assert_close(critic.decode(one_hot), torch.arange(6.0))
    torch.testing.assert_close(critic.decode(torch.zeros(2, 3, 6)), torch.full((2, 3), 2.5))


def test_probabilities_by_hand():
    # three bins at 0, 1, 2, sigma 0.75: for a target of 1 the middle holds Phi(2/3) - Phi(-2/3) = 0.4950 of a total
    # Phi(2) - Phi(-2) = 0.9545
    middle = 0.495015 / 0.954500
    expected = torch.tensor([(1 - middle) / 2, middle, (1 - middle) / 2])
    torch.testing.assert_close(HLGauss(3, 0.0, 2.0).probabilities(torch.tensor(1.0)), expected, atol=1e-5, rtol=0)
    wide = HLGauss(3, 0.0, 2.0, sigma_to_bin_ratio=1.0).probabilities(torch.tensor(1.0))
    torch.testing.assert_close(HLGauss(3, 0.0, 2.0, sigma=1.0).probabilities(torch.tensor(1.0)), wide)
    assert wide[1] < middle


@pytest.mark.parametrize("bins, low, high", [(6, 0.0, 5.0), (41, -3.0, 7.0)])
def test_probabilities_sum_to_one_and_decode_to_the_target(bins, low, high):
    critic = HLGauss(bins, low, high)
    beyond = torch.linspace(low - 2, high + 2, 200)
    p = critic.probabilities(beyond)
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(200))
    assert (p >= 0).all()
    assert torch.equal(p[0], critic.probabilities(torch.tensor(low)))  # beyond the range is its end
    inside = torch.linspace(low + 2.5 * critic.width, high - 2.5 * critic.width, 50)
    decoded = critic.decode(critic.probabilities(inside).log())
    torch.testing.assert_close(decoded, inside, atol=0.02 * critic.width, rtol=0)
    ends = critic.decode(critic.probabilities(torch.tensor([low, high])).clamp(min=1e-30).log())
    assert ((ends - torch.tensor([low, high])).abs() < 0.4 * critic.width).all()


def test_loss_is_least_at_the_target_distribution():
    critic, returns = HLGauss(6), torch.tensor([1.3, 4.0])
    best = critic.probabilities(returns).clamp(min=1e-30).log().requires_grad_()
    loss = critic(best, None, returns)
    (gradient,) = torch.autograd.grad(loss.sum(), best)
    torch.testing.assert_close(gradient, torch.zeros(2, 6), atol=1e-6, rtol=0)
    assert (critic(torch.zeros(2, 6), None, returns) > loss).all()


def test_the_references_keywords_and_what_is_refused():
    HLGauss(
        6, min_value=0.0, max_value=5.0, min_max_value_on_bin_center=True, clamp_to_range=True, sigma_to_bin_ratio=1.0
    )
    for wrong in ({"num_bins": 1}, {"num_bins": 4, "min_value": 5.0}, {"num_bins": 4, "clamp_to_range": False}):
        with pytest.raises(ValueError):
            HLGauss(**wrong)
