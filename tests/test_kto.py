import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf_pytorch.algorithms.kto import KTO, mismatched
from palm_rlhf_pytorch.data import Labelled
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

# log-ratios: of own responses 3, -1 and 0; of others' 2, 0 and 1, so that z0 is 1
LOG_PROBS = torch.tensor([[-2.0, -6.0, -4.0], [-7.0, -8.0, -9.0]])
REFERENCE = torch.tensor([[-5.0, -5.0, -4.0], [-9.0, -8.0, -10.0]])
LENGTHS = torch.ones(2, 3)
LABELS = torch.tensor([True, True, False])


def sigma(x):
    return 1 / (1 + math.exp(-x))


def test_losses_by_hand():
    objective = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    losses, _ = objective(LOG_PROBS, REFERENCE, LENGTHS, LABELS)
    # lambda - lambda sigma(beta (r - z0)), and of the undesirable sigma(beta (z0 - r))
    expected = [2 - 2 * sigma(0.5 * (3 - 1)), 2 - 2 * sigma(0.5 * (-1 - 1)), 3 - 3 * sigma(0.5 * (1 - 0))]
    assert losses.tolist() == pytest.approx(expected)


def test_the_kl_is_never_below_0():
    _, numbers = KTO()(REFERENCE, LOG_PROBS, LENGTHS, LABELS)  # log-ratios of others' -2, 0 and -1
    assert numbers["kl"] == 0
    assert KTO()(LOG_PROBS, REFERENCE, LENGTHS, LABELS)[1]["kl"] == 1


def test_the_kl_has_no_gradient():
    log_probs = LOG_PROBS.clone().requires_grad_()
    losses, numbers = KTO(beta=0.5)(log_probs, REFERENCE, LENGTHS, LABELS)
    losses.sum().backward()
    # d/dr of -sigma(beta (r - z0)) is -beta sigma (1 - sigma); of the undesirable it is the other way round
    slopes = [0.5 * sigma(x) * (1 - sigma(x)) for x in (1.0, -1.0, 0.5)]
    torch.testing.assert_close(log_probs.grad[0], torch.tensor([-slopes[0], -slopes[1], slopes[2]]))
    assert torch.equal(log_probs.grad[1], torch.zeros(3))
    assert not any(number.requires_grad for number in numbers.values())


def test_numbers_by_hand():
    _, numbers = KTO(beta=0.5)(LOG_PROBS, REFERENCE, LENGTHS, LABELS)
    assert {name: number.item() for name, number in numbers.items()} == pytest.approx(
        {
            "accuracy": 2 / 3,  # r > z0 = 1: yes, no, no
            "kl": 1.0,
            "desirable_reward": 0.5,  # half of 3 and -1, on average
            "undesirable_reward": 0.0,
            "desirable_log_prob": -4.0,
            "undesirable_log_prob": -4.0,
        }
    )


def test_a_batch_of_one_kind_has_no_number_of_the_other():
    losses, numbers = KTO()(LOG_PROBS, REFERENCE, LENGTHS, torch.ones(3, dtype=torch.bool))
    assert losses.isfinite().all() and numbers["undesirable_reward"].isnan() and numbers["desirable_reward"] > 0


def test_half_the_weight_where_the_policy_is_the_reference():
    losses, _ = KTO(desirable_weight=2.0)(REFERENCE, REFERENCE, LENGTHS, LABELS)
    assert losses.tolist() == [1.0, 1.0, 0.5]


def test_a_beta_of_0_is_refused():
    with pytest.raises(ValueError, match="beta must be above 0, got 0.0"):
        KTO(beta=0.0)


# mismatched pairs


def test_mismatched_responses_are_the_next_longer_to_another_prompt():
    responses = [Labelled("a", "12345", True), Labelled("b", "1", True), Labelled("b", "12", False)]
    # in order of length 1 (b), 2 (b), 5 (a): both b take a's, and the longest the shortest
    assert mismatched([*responses]) == [1, 0, 0]


def test_mismatched_pairs_are_encoded():
    tokenizer = ByteTokenizer()
    own, foreign, labels = KTO().answers([Labelled("a", "xy", True), Labelled("b", "z", False)], tokenizer, 9)
    text = [tokenizer.decode(ids) for ids, _ in (*own, *foreign)]
    assert text == ["axy", "bz", "az", "bxy"] and labels.tolist() == [True, False]
    assert [length for _, length in (*own, *foreign)] == [2] * 4 and own[0][0][-1] == tokenizer.eos_id


def test_one_prompt_is_refused():
    for count in (1, 3):
        with pytest.raises(ValueError, match="needs at least two prompts, got 1"):
            mismatched([Labelled("p", "x" * i, True) for i in range(count)])


# TRL


@pytest.mark.parametrize("labels", [[True, False, True, False], [True] * 4, [False] * 4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_losses_are_trls(labels, sign):
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    log_probs = -20 * torch.rand(2, 4)
    reference = log_probs - sign * torch.rand(2, 4)  # so that the KL is above 0, or clamped
    zeros, labels = torch.zeros(4, 1), torch.tensor(labels)
    own = log_probs[0][:, None]  # one response token each
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: log_probs[1],
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.ones(4, 2, dtype=torch.long),
        "attention_mask": torch.ones(4, 2),
        "completion_mask": torch.tensor([[0, 1]] * 4),
        "label": labels,
        "ref_logps": reference[0],
        "ref_KL_logps": reference[1],
    }
    outputs = SimpleNamespace(log_probs=own, entropy=zeros, mean_logits=zeros)
    theirs = kto_trainer.KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    objective = KTO(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    losses, numbers = objective(log_probs, reference, torch.ones(2, 4), labels)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    logged = trainer._metrics["train"]
    assert numbers["kl"].item() == pytest.approx(logged["kl"][0]) and (numbers["kl"] > 0) == (sign > 0)
    if labels.any():
        assert numbers["desirable_reward"].item() == pytest.approx(logged["rewards/chosen"][0], rel=1e-5)
