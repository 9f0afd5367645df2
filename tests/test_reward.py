import math

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.reward import RewardModel, bradley_terry_loss

X = torch.randint(0, 17, (3, 9), generator=torch.Generator().manual_seed(1))
PROMPT = torch.arange(9) < torch.tensor([[2], [4], [3]])
REAL = torch.arange(9) < torch.tensor([[9], [6], [7]])


@pytest.fixture
def make_reward(make_palm):
    def make(causal=True, kv_heads=1, bins=5, **keywords) -> RewardModel:
        model = RewardModel(make_palm(causal=causal, kv_heads=kv_heads), num_binned_output=bins, **keywords)
        with torch.no_grad():
            for p in model.finetune_parameters():
                p.add_(torch.randn_like(p) * 0.3)
        return model

    return make


BOTH_KINDS = pytest.mark.parametrize("bins", [5, 0], ids=["binned", "scalar"])
BOTH_TRUNKS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "encoder"])


# scores


@BOTH_KINDS
@BOTH_TRUNKS
def test_score_by_hand_over_response_tokens_alone(make_reward, causal, bins):
    model = make_reward(causal, bins=bins).eval()
    scores = model.score(X, PROMPT, REAL)
    for i in range(3):
        ids = X[i : i + 1, : int(REAL[i].sum())]
        prompt = PROMPT[i : i + 1, : ids.shape[1]]
        extra = torch.where(prompt[..., None], model.prompt_embed, model.response_embed)
        embeds = model.palm(ids, extra_embed=extra, return_only_embedding=True, finetune_scope="reward")
        pooled = embeds[0, int(PROMPT[i].sum()) :].mean(dim=0)
        if bins:
            expected = (torch.arange(5.0) * model.to_pred(pooled).softmax(-1)).sum()
        else:
            expected = model.to_pred[0].weight[0] @ pooled
        assert scores[i].item() == pytest.approx(expected.item(), abs=1e-4)


@BOTH_KINDS
@BOTH_TRUNKS
def test_what_the_mask_hides_cannot_reach_score_or_gradient(make_reward, causal, bins):
    model = make_reward(causal, bins=bins).eval()
    other = torch.where(REAL, X, torch.randint(0, 17, X.shape))
    negative = X.masked_fill(~REAL, -1)
    gradients = []
    for x in (X, other, negative):
        model.zero_grad()
        ratings = model.rate(x, PROMPT, REAL)
        ratings.sum().backward()
        gradients.append([ratings.detach(), *(p.grad.clone() for p in model.finetune_parameters())])
    for changed in gradients[1:]:
        assert all(map(torch.equal, gradients[0], changed))
    torch.testing.assert_close(model.score(negative, PROMPT), gradients[0][0])  # without a mask ids tell
    wider = (F.pad(X, (0, 4), value=7), F.pad(PROMPT, (0, 4)), F.pad(REAL, (0, 4)))
    torch.testing.assert_close(model.score(*wider), gradients[0][0])


@BOTH_TRUNKS
def test_left_padding_and_holes_are_no_different(make_reward, causal):
    model = make_reward(causal).eval()
    expected = model.score(X, PROMPT, REAL)
    lengths = REAL.sum(-1).tolist()
    left = [torch.stack([F.pad(t[i, :n], (11 - n, 0)) for i, n in enumerate(lengths)]) for t in (X, PROMPT, REAL)]
    torch.testing.assert_close(model.score(*left), expected, atol=1e-4, rtol=1e-4)
    hole = REAL.clone()
    hole[:, 5] = False
    changed = X.clone()
    changed[:, 5] = 16 - changed[:, 5]
    torch.testing.assert_close(model.score(X, PROMPT, hole), model.score(changed, PROMPT, hole))
    assert not torch.allclose(model.score(X, PROMPT, hole), expected)


def test_an_empty_response_has_a_finite_score(make_reward):
    assert make_reward().score(X, REAL, REAL).isfinite().all()


@BOTH_KINDS
@pytest.mark.parametrize("training", [True, False])
def test_score_is_deterministic_and_restores_the_mode(make_reward, bins, training):
    model = make_reward(bins=bins, dropout=0.5).train(training)
    one, two = model.score(X, PROMPT, REAL), model.score(X, PROMPT, REAL)
    assert torch.equal(one, two) and not one.requires_grad
    assert model.training is training and model.palm.training is training
    assert torch.equal(one, model.eval().score(X, PROMPT, REAL))
    assert not torch.equal(model.train().rate(X, PROMPT, REAL), model.rate(X, PROMPT, REAL))  # there was dropout


def test_bin_values(make_reward):
    model = make_reward(bins=3, bin_values=[1.0, 10.0, 100.0]).eval()
    probs = model.predict(X.masked_fill(~REAL, -1), REAL & ~PROMPT, PROMPT).softmax(-1)
    torch.testing.assert_close(model.score(X, PROMPT, REAL), probs @ torch.tensor([1.0, 10.0, 100.0]))
    assert "bin_values" not in model.state_dict()  # the reference's names and no more
    with pytest.raises(ValueError, match="one value for each of the 3 bins, got 2"):
        make_reward(bins=3, bin_values=[1.0, 2.0])


@BOTH_KINDS
def test_a_bfloat16_trunk_works_and_scores_in_float32(make_palm, bins):
    model = RewardModel(make_palm().bfloat16(), num_binned_output=bins)
    converted = RewardModel(make_palm(), num_binned_output=bins).bfloat16()
    labels = torch.tensor([0, 2, 1])
    for some in (model, converted):
        assert some.score(X, PROMPT, REAL).dtype == torch.float32
        loss = some(X, prompt_mask=PROMPT, labels=labels)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()


# the reference's interface


@BOTH_KINDS
@BOTH_TRUNKS
def test_forward_pools_the_mask_or_everything(make_reward, causal, bins):
    model = make_reward(causal, bins=bins).eval()
    extra = torch.where(PROMPT[..., None], model.prompt_embed, model.response_embed)
    embeds = model.palm(X, extra_embed=extra, return_only_embedding=True, finetune_scope="reward")
    whole = model(X, prompt_mask=PROMPT, sample=False)
    torch.testing.assert_close(whole, model.to_pred(embeds.mean(1)))
    torch.testing.assert_close(model(X, prompt_lengths=PROMPT.sum(-1), sample=False), whole)
    pooled = (embeds * REAL[..., None]).sum(1) / REAL.sum(-1, keepdim=True)
    pred = model(X, mask=REAL, prompt_mask=PROMPT, sample=False)
    torch.testing.assert_close(pred, model.to_pred(pooled))
    if bins:
        labels = torch.tensor([4, 0, 1])
        expected = -pred.log_softmax(-1)[torch.arange(3), labels].mean()
    else:
        labels = torch.tensor([4.0, 0.5, 1.0])
        expected = ((pred - labels) ** 2).mean()
        assert pred.shape == (3,)
    torch.testing.assert_close(model(X, mask=REAL, prompt_mask=PROMPT, labels=labels), expected)


@BOTH_TRUNKS
def test_only_what_is_pooled_is_computed(make_reward, feedforward_rows, causal):
    model = make_reward(causal).eval()
    pooled = REAL & ~PROMPT
    pooled[1] = False  # where there is nothing to pool, the head judges 0
    pred = model.predict(X, pooled, PROMPT)
    assert feedforward_rows == [X.numel(), pooled.sum()]
    torch.testing.assert_close(pred[1], model.to_pred(torch.zeros(1, model.palm.dim))[0])
    model.prefix_scores(X, PROMPT, REAL) if causal else model.score(X, PROMPT, REAL)
    assert feedforward_rows[2:] == [X.numel(), (REAL & ~PROMPT).sum()]
    torch.testing.assert_close(model.predict(X, REAL[:1]), model.predict(X, REAL[:1].expand_as(X)))


def test_forward_without_prompt_adds_no_embedding(make_reward):
    model = make_reward().eval()
    embeds = model.palm(X, return_only_embedding=True, finetune_scope="reward")
    torch.testing.assert_close(model(X, sample=False), model.to_pred(embeds.mean(1)))
    disabled = model(X, sample=False, disable_lora=True)
    torch.testing.assert_close(disabled, model.to_pred(model.palm(X, return_only_embedding=True).mean(1)))


def test_binned_predictions_are_drawn_classes_or_logits(make_reward):
    model = make_reward().eval()
    logits = model(X[:1], sample=False)
    assert logits.shape == (1, 5)
    draws = model(X[:1].expand(4000, -1))
    assert draws.shape == (4000,) and draws.dtype == torch.long
    expected = logits.softmax(-1)[0] * 4000
    count = torch.bincount(draws, minlength=5)
    assert ((count - expected) ** 2 / expected).sum() < 18.5  # the 0.1 % point with 4 degrees of freedom
    assert (model(X[:1].expand(50, -1), sample_temperature=0.0) == logits.argmax()).all()

    silent = make_reward(sample_from_bins=False)
    assert silent(X).shape == (3, 5) and silent(X, sample=True).shape == (3,)
    cold = make_reward(sample_temperature=0.0).eval()
    assert torch.equal(cold(X), cold(X, sample=False).argmax(-1))


def test_scalar_predictions_are_never_drawn(make_reward):
    model = make_reward(bins=0).eval()
    assert model(X).shape == (3,) and torch.equal(model(X), model(X))


@pytest.mark.parametrize("bins", [1, -2])
def test_impossible_bins_are_refused(make_palm, bins):
    with pytest.raises(ValueError, match="at least 2 bins"):
        RewardModel(make_palm(), num_binned_output=bins)


def test_bad_labels_and_doubled_prompts_are_refused(make_reward):
    model = make_reward()
    with pytest.raises(TypeError, match="bin indices"):
        model(X, labels=torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="not both"):
        model(X, prompt_mask=PROMPT, prompt_lengths=PROMPT.sum(-1))


# pairs


def test_bradley_terry_by_hand():
    zero = torch.zeros(4)
    assert bradley_terry_loss(zero, zero).item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    expected = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(3.0))) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)
    torch.testing.assert_close(bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected))
    difference = bradley_terry_loss(chosen, rejected) - bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(difference, -(chosen - rejected).mean())
    with_margin = (math.log1p(math.exp(-0.5 + 2)) + math.log1p(math.exp(3.0 + 1))) / 2
    assert bradley_terry_loss(chosen, rejected, torch.tensor([2.0, 1.0])).item() == pytest.approx(with_margin)
    assert bradley_terry_loss(torch.tensor([200.0]), torch.tensor([0.0])).item() == 0
    assert bradley_terry_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == 200


@BOTH_KINDS
@BOTH_TRUNKS
def test_pair_loss_compares_ratings(make_reward, causal, bins):
    model = make_reward(causal, bins=bins).eval()
    chosen, rejected = (X, PROMPT, REAL), (X.flip(0), PROMPT.flip(0), REAL.flip(0))
    r, s = model.score(*chosen), model.score(*rejected)
    torch.testing.assert_close(model.pair_loss(chosen, rejected, 0.5), F.softplus(-(r - s - 0.5)).mean())
    assert model.pair_loss(chosen, chosen).item() == pytest.approx(math.log(2))


@BOTH_KINDS
def test_learning_from_pairs_puts_the_chosen_first(make_palm, bins):
    model = RewardModel(make_palm(), dropout=0.0, num_binned_output=bins)
    optimizer = torch.optim.Adam(model.finetune_parameters(), lr=0.02)
    chosen, rejected = (X, PROMPT, REAL), ((X + 3) % 17, PROMPT, REAL)
    for _ in range(15):
        optimizer.zero_grad()
        model.pair_loss(chosen, rejected).backward()
        optimizer.step()
    assert (model.score(*chosen) > model.score(*rejected)).all()


# what is trained


@BOTH_KINDS
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "whole"])
def test_finetune_parameters_are_what_moves(make_palm, bins, lora):
    palm = make_palm()
    before = {name: p.clone() for name, p in palm.named_parameters()}
    model = RewardModel(palm, 0.0, bins, use_lora=lora)
    parameters = model.finetune_parameters()
    trained = {id(p) for p in parameters}
    assert len(trained) == len(parameters) == sum(p.requires_grad for p in model.parameters())
    assert {id(model.prompt_embed), id(model.response_embed)} <= trained
    start = {name: p.clone() for name, p in model.named_parameters()}
    labels = torch.tensor([1, 0, 2])
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):  # with B = 0 the first step moves only B
        optimizer.zero_grad()
        model(X, mask=REAL, prompt_mask=PROMPT, labels=labels).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert (id(p) in trained) is not torch.equal(p, start[name]), name
        assert (id(p) in trained) is (p.grad is not None), name
    assert all(torch.equal(p, before[name]) for name, p in palm.named_parameters())  # it works on a copy


def test_the_palm_given_keeps_its_dropout_and_its_gradients(make_palm):
    palm = make_palm(attn_dropout=0.25)
    model = RewardModel(palm, dropout=0.5)
    assert palm.layers[0].fn.attend.attn_dropout.p == 0.25 and all(p.requires_grad for p in palm.parameters())
    assert model.palm.layers[0].fn.attend.attn_dropout.p == 0.5


def test_adapters_that_are_already_there_are_trained(make_palm):
    model = RewardModel(make_palm(finetune_scopes=["reward", "other"]))
    assert all(p.requires_grad for p in model.finetune_parameters())
    assert not any(p.requires_grad for p in model.palm.finetune_parameters("other"))
    again = RewardModel(model.palm, reward_lora_scope="second")
    assert not any(p.requires_grad for p in again.palm.finetune_parameters("reward"))


def test_learning_from_ratings_ranks_them(make_palm):
    model = RewardModel(make_palm(), dropout=0.0, num_binned_output=3)
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.Adam(model.finetune_parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        model(X, mask=REAL & ~PROMPT, prompt_mask=PROMPT, labels=labels).backward()
        optimizer.step()
    scores = model.score(X, PROMPT, REAL)
    assert scores[0] < scores[1] < scores[2]


def test_what_bins_are_worth_comes_with_the_weights(tmp_path):
    palm = PaLM(num_tokens=7, dim=8, depth=1, heads=2, dim_head=4)
    saved = RewardModel(palm, num_binned_output=3, bin_values=[1, 2, 5])
    saved.save(tmp_path / "reward.safetensors")
    loaded = RewardModel(palm, num_binned_output=3).load(tmp_path / "reward.safetensors")
    assert loaded.bin_values.tolist() == [1, 2, 5]
    loaded.save(tmp_path / "again.safetensors")
    assert RewardModel.from_checkpoint(tmp_path / "again.safetensors").bin_values.tolist() == [1, 2, 5]


def test_labels_beyond_the_bins_are_refused():
    model = RewardModel(PaLM(num_tokens=7, dim=8, depth=1, heads=2, dim_head=4), num_binned_output=5)
    with pytest.raises(ValueError, match="bin indices from 0 to 4, got 1 to 5"):
        model(torch.ones(2, 3, dtype=torch.long), labels=torch.tensor([1, 5]))
