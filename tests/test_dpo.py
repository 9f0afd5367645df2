import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf_pytorch.algorithms.dpo import DPO
from palm_rlhf_pytorch.data import Pair
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

# log-ratios: chosen 1 and -1, rejected -2 and 1, so that h / beta is 3 and -2;
# by token: chosen 1/2 and -1/4, rejected -2/4 and 1/5, so that h / beta is 1 and -0.45
LOG_PROBS = torch.tensor([[-4.0, -9.0], [-6.0, -5.0]])
REFERENCE = torch.tensor([[-5.0, -8.0], [-4.0, -6.0]])
LENGTHS = torch.tensor([[2, 4], [4, 5]])


def softplus(x):
    """-log sigma(-x)"""
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    "objective, expected",
    [
        (DPO(beta=0.5), [softplus(-1.5), softplus(1.0)]),
        (
            DPO(beta=0.5, label_smoothing=0.1),
            [0.9 * softplus(-1.5) + 0.1 * softplus(1.5), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0)],
        ),
        (DPO(beta=2.0, length_normalised=True), [softplus(-2.0), softplus(0.9)]),
        (DPO(loss="ipo", beta=0.5), [(3 - 1) ** 2, (-2 - 1) ** 2]),  # 1 / (2 tau) = 1
        (DPO(loss="ipo", beta=0.5, length_normalised=True), [0.0, (-0.45 - 1) ** 2]),
        # log-probs by token: chosen -2 and -9/4, rejected -6/4 and -1; times 2: h = -1 and -2.5, less gamma
        (DPO(loss="simpo", beta=2.0, gamma=0.5), [softplus(1.5), softplus(3.0)]),
    ],
)
def test_losses_by_hand(objective, expected):
    losses, _ = objective(LOG_PROBS, REFERENCE, LENGTHS)
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_numbers_by_hand():
    log_probs = LOG_PROBS.clone().requires_grad_()
    _, numbers = DPO(beta=0.5)(log_probs, REFERENCE, LENGTHS)
    assert not any(number.requires_grad for number in numbers.values())
    assert {name: number.item() for name, number in numbers.items()} == pytest.approx(
        {
            "accuracy": 0.5,  # margins 1.5 and -1
            "margin": 0.25,
            "chosen_reward": 0.0,
            "rejected_reward": -0.25,
            "chosen_log_prob": -6.5,
            "rejected_log_prob": -5.5,
        }
    )


def test_ln_2_where_the_policy_is_the_reference():
    for objective in (DPO(), DPO(label_smoothing=0.2), DPO(length_normalised=True)):
        losses, numbers = objective(REFERENCE, REFERENCE, LENGTHS)
        assert losses.tolist() == pytest.approx([math.log(2)] * 2)
        assert numbers["margin"] == 0 and numbers["accuracy"] == 0  # a tie is not right
    losses, _ = DPO(loss="ipo", beta=0.25)(REFERENCE, REFERENCE, LENGTHS)
    assert losses.tolist() == [4.0, 4.0]  # 1 / (2 tau) squared


def test_the_gradient_is_that_of_the_paper():
    # 2305.18290, section 4: beta sigma(-h) up for the chosen, down for the rejected; h = 1.5 and -1
    log_probs = LOG_PROBS.clone().requires_grad_()
    DPO(beta=0.5)(log_probs, REFERENCE, LENGTHS)[0].sum().backward()
    pull = [0.5 / (1 + math.exp(1.5)), 0.5 / (1 + math.exp(-1.0))]
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-p for p in pull], pull]))


def test_ipo_is_least_at_its_margin():
    log_probs = torch.tensor([[2.0], [-3.0]], requires_grad=True)  # h / tau = 5 = 1 / (2 tau)
    losses, _ = DPO(loss="ipo", beta=0.1)(log_probs, torch.zeros(2, 1), torch.ones(2, 1))
    losses.sum().backward()
    assert losses.item() == pytest.approx(0, abs=1e-9) and log_probs.grad.abs().max() < 1e-4


def test_simpo_knows_no_reference():
    objective = DPO(loss="simpo")
    assert not objective.needs_reference and DPO().needs_reference
    alone, _ = objective(LOG_PROBS, torch.zeros(2, 2), LENGTHS)
    assert torch.equal(objective(LOG_PROBS, REFERENCE, LENGTHS)[0], alone)


def test_beta_follows_from_the_loss():
    kinds = [DPO(), DPO(length_normalised=True), DPO(loss="ipo"), DPO(loss="ipo", length_normalised=True)]
    assert [objective.strength for objective in (*kinds, DPO(loss="simpo"))] == [0.1, 5.0, 0.1, 0.1, 2.0]
    assert DPO(loss="simpo", beta=0.3).strength == 0.3
    assert DPO(loss="simpo").lead == 1.0 and DPO(loss="simpo", gamma=0.0).lead == 0.0 and DPO().lead == 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "hinge"}, "one of sigmoid, ipo, simpo, got 'hinge'"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"beta": math.nan}, "beta must be above 0, got nan"),
        ({"label_smoothing": 0.5}, "below 0.5, got 0.5"),
        ({"label_smoothing": -0.1}, "at least 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "ipo has no label smoothing"),
        ({"gamma": 0.5}, "the loss sigmoid has none"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPO(**options)


def test_answers_are_encoded_like_any_response():
    tokenizer = ByteTokenizer()
    chosen, rejected, labels = DPO().answers([Pair("ab", "c", "de")], tokenizer, 9)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert chosen == [([bos, 100, 101, 102, eos], 3)] and rejected == [([bos, 100, 101, 103, 104, eos], 3)]
    assert labels is None


# TRL


def tokens_of(sums, lengths):
    """Log-probs of tokens that add up to sums (b,), with a mask (b, n + 1) whose first place is the prompt's."""
    n = int(lengths.max())
    mask = torch.arange(n) < lengths[:, None]
    shares = torch.rand(len(sums), n) * mask
    prompt = torch.zeros(len(sums), 1, dtype=torch.bool)
    return shares / shares.sum(dim=-1, keepdim=True) * sums[:, None], torch.cat((prompt, mask), dim=1)


def trl_loss(log_probs, reference, lengths, loss_type, beta):
    """What `DPOTrainer` makes of the same log-probs, and what it logs."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    per_token, mask = tokens_of(log_probs.flatten(), lengths.flatten())
    zeros = torch.zeros_like(per_token)
    outputs = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda t: t, gather=lambda t: t),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": mask.long(),
        "attention_mask": mask.long(),
        "completion_mask": mask.long(),
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def random_pairs():
    return -20 * torch.rand(2, 6), -20 * torch.rand(2, 6), torch.randint(1, 9, (2, 6))


@pytest.mark.parametrize(
    "loss_type, objective",
    [
        ("sigmoid", DPO(beta=0.3)),
        ("sigmoid_norm", DPO(beta=0.3, length_normalised=True)),
        ("ipo", DPO(loss="ipo", beta=0.3, length_normalised=True)),
    ],
)
def test_losses_are_trls(loss_type, objective):
    log_probs, reference, lengths = random_pairs()
    theirs, logged = trl_loss(log_probs, reference, lengths, loss_type, 0.3)
    losses, numbers = objective(log_probs, reference, lengths)
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert numbers["chosen_log_prob"].item() == pytest.approx(logged["logps/chosen"], rel=1e-5)
    if loss_type == "sigmoid":  # TRL logs rewards of sums, whatever the loss
        assert numbers["margin"].item() == pytest.approx(logged["rewards/margins"], rel=1e-5)
        assert numbers["accuracy"].item() == pytest.approx(logged["rewards/accuracies"])
        assert numbers["rejected_reward"].item() == pytest.approx(logged["rewards/rejected"], rel=1e-5)


def test_smoothing_and_simpo_are_trls():
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    log_probs, reference, lengths = random_pairs()

    def theirs(values, **options):
        trainer = SimpleNamespace(alpha=0.0, accelerator=SimpleNamespace(device="cpu"), **options)
        return cpo_trainer.CPOTrainer.cpo_loss(trainer, *values)[0]

    # CPO's loss is DPO's without a reference, so it gets the log-ratios
    smoothed = theirs(log_probs - reference, loss_type="sigmoid", beta=0.3, label_smoothing=0.2)
    torch.testing.assert_close(DPO(beta=0.3, label_smoothing=0.2)(log_probs, reference, lengths)[0], smoothed)
    simpo = theirs(log_probs / lengths, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.1)
    ours = DPO(loss="simpo", beta=2.0, gamma=0.7, label_smoothing=0.1)
    torch.testing.assert_close(ours(log_probs, reference, lengths)[0], simpo)
