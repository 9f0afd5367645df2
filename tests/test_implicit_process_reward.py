import math

import pytest
import torch

from palm_rlhf_pytorch import vocabulary
from palm_rlhf_pytorch.implicit_process_reward import ImplicitPRM

X = torch.randint(0, 17, (3, 8), generator=torch.Generator().manual_seed(2))
PADDED = X.masked_fill(torch.arange(8) >= torch.tensor([[8], [5], [6]]), -1)
PROMPT = torch.arange(8) < torch.tensor([[2], [3], [1]])
LABELS = torch.tensor([1.0, 0.0, 1.0])


@pytest.fixture
def make_prm(make_palm):
    return lambda **keywords: ImplicitPRM(make_palm(logit_scale=0.5), make_palm(logit_scale=0.5), **keywords)


@pytest.mark.parametrize("rows_at_once", [None, 3])
def test_rewards_by_hand(make_prm, monkeypatch, rows_at_once):
    prm = make_prm(beta=0.3)
    if rows_at_once:
        monkeypatch.setattr(vocabulary, "LOGITS_PER_CHUNK", 17 * rows_at_once)
        monkeypatch.setattr(vocabulary, "ROWS_PER_CHUNK", 1)
    rewards = prm(PADDED)
    assert rewards.shape == (3, 7)
    for i, row in enumerate(PADDED):
        ids = row[row >= 0]
        gap = (prm.model(ids[None]).log_softmax(-1) - prm.ref_model(ids[None]).log_softmax(-1))[0]
        for t in range(7):
            expected = 0.3 * gap[t, ids[t + 1]].item() if t + 1 < len(ids) else 0.0
            assert rewards[i, t].item() == pytest.approx(expected, abs=1e-5)


def test_left_padding_gives_the_same_rewards(make_prm):
    prm = make_prm()
    alone = prm(X[:1, :5])
    left = torch.nn.functional.pad(X[:1, :5], (3, 0), value=-1)
    rewards = prm(left)
    assert (rewards[:, :3] == 0).all()
    torch.testing.assert_close(rewards[:, 3:], alone, atol=1e-5, rtol=1e-5)


def test_loss_by_hand_over_the_response(make_prm):
    prm = make_prm(beta=0.3)
    rewards = prm(PADDED)
    total = torch.stack([rewards[i, int(PROMPT[i].sum()) - 1 :].sum() for i in range(3)])
    expected = -(LABELS * total.sigmoid().log() + (1 - LABELS) * (-total).sigmoid().log()).mean()
    torch.testing.assert_close(prm(PADDED, LABELS, PROMPT), expected)
    torch.testing.assert_close(prm(PADDED, LABELS.long(), PROMPT), expected)


def test_prompt_tokens_have_no_part_in_the_loss(make_prm):
    prm = make_prm()
    rewards = []
    prm._reference = lambda seq: torch.zeros(3, 7)
    prm._log_probs = lambda palm, seq: rewards[-1]
    for prompt_value in (0.0, 50.0):
        rewards.append(torch.where(PROMPT[:, 1:], prompt_value, 1.0).requires_grad_())
    losses = []
    for r in list(rewards):
        rewards.append(r)
        losses.append(prm(X, LABELS, PROMPT))
    assert losses[0] == losses[1]
    losses[1].backward()
    assert ((rewards[-1].grad == 0) == PROMPT[:, 1:]).all()


def test_a_model_that_is_its_reference_gives_zero_and_ln_2(make_palm):
    prm = ImplicitPRM(make_palm())
    assert (prm(PADDED) == 0).all()
    assert prm(PADDED, LABELS, PROMPT).item() == pytest.approx(math.log(2))


def test_raising_the_likelihood_of_positives_lowers_the_loss(make_palm):
    prm = ImplicitPRM(make_palm())
    optimizer = torch.optim.SGD(prm.model.parameters(), lr=0.05)
    start = prm(X, LABELS, PROMPT)
    positive, negative = X[[0, 2]], X[[1]]
    for _ in range(5):  # plain language modelling of the positives
        optimizer.zero_grad()
        (prm.model(positive, return_loss=True) - prm.model(negative, return_loss=True)).backward()
        optimizer.step()
    assert prm(X, LABELS, PROMPT) < start
    assert prm(X, 1 - LABELS, PROMPT) > start


def test_learning_the_loss_separates_right_from_wrong(make_palm):
    prm = ImplicitPRM(make_palm())
    reference = [p.clone() for p in prm.ref_model.parameters()]
    optimizer = torch.optim.Adam(prm.model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        prm(PADDED, LABELS, PROMPT).backward()
        optimizer.step()
    totals = prm(PADDED).masked_fill(PROMPT[:, 1:], 0).sum(-1)
    assert min(totals[0], totals[2]) > 0 > totals[1]
    assert all(map(torch.equal, reference, prm.ref_model.parameters()))
    assert all(p.grad is None and not p.requires_grad for p in prm.ref_model.parameters())


def test_the_reference_stays_in_eval_mode(make_palm):
    model = make_palm(attn_dropout=0.5, ff_dropout=0.5).train()
    prm = ImplicitPRM(model)
    assert prm.train() is prm and prm.model.training and not prm.ref_model.training
    assert torch.equal(prm._reference(X), prm._reference(X))
    assert not torch.equal(prm(X), prm(X))  # the model itself has its dropout
    assert not prm.eval().model.training
    assert all(p.requires_grad for p in model.parameters())


def test_encoders_are_refused(make_palm):
    with pytest.raises(ValueError, match="needs causal models"):
        ImplicitPRM(make_palm(causal=False))
