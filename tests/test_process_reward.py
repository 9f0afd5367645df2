"""What each token is worth, and PRIME's implicit reward that learns along."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import ROLL, TOKENS, TRAIN, count_even, made_up, shake, tiny_palm, tiny_trainer

from palm_rlhf_pytorch import ImplicitPRM, RewardModel
from palm_rlhf_pytorch.algorithms.dr_grpo import DrGRPO
from palm_rlhf_pytorch.algorithms.flowrl import FlowRL
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.max_rl import MaxRL
from palm_rlhf_pytorch.algorithms.ppo import PPO
from palm_rlhf_pytorch.algorithms.reinforce_pp import ReinforcePP
from palm_rlhf_pytorch.algorithms.returns import token_rewards
from palm_rlhf_pytorch.algorithms.rloo import RLOO
from palm_rlhf_pytorch.algorithms.score_centering import ScoreCentering
from palm_rlhf_pytorch.algorithms.tpo import TPO
from palm_rlhf_pytorch.process_reward import OnlineProcessReward, ProcessReward
from palm_rlhf_pytorch.value_loss import ClippedRegression


def tiny_prm(beta=0.3, shaken=True):
    prm = ImplicitPRM(tiny_palm(5), beta=beta)
    if shaken:
        shake(prm.model.parameters())
    return prm


def tiny_reward_model(bins=0, **keywords):
    model = RewardModel(tiny_palm(3, **keywords), num_binned_output=bins, dropout=0.1)
    shake(model.finetune_parameters())
    return model.train()


def test_implicit_rewards_by_hand():
    prm, e = tiny_prm(), made_up()
    filled = ProcessReward(prm, weight=2.0)(e)
    assert filled.token_rewards.dtype == torch.float32 and not filled.token_rewards.requires_grad
    for i, row in enumerate(e.sequence):
        ids = row[e.mask[i]]
        gap = (prm.model(ids[None]).log_softmax(-1) - prm.ref_model(ids[None]).log_softmax(-1))[0]
        for t in range(len(row)):
            expected = 2 * 0.3 * gap[t - 1, row[t]].item() if e.response_mask[i, t] else 0.0
            assert filled.token_rewards[i, t].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bins", [0, 5])
def test_prefix_scores_are_scores_of_prefixes(bins):
    model, e = tiny_reward_model(bins), made_up()
    found = model.prefix_scores(e.sequence, e.prompt_mask, e.mask)
    assert found.shape == e.sequence.shape and model.training
    for i in range(len(e)):
        for t in range(int(e.mask[i].sum())):
            row = slice(i, i + 1), slice(0, t + 1)
            torch.testing.assert_close(found[i, t], model.score(e.sequence[row], e.prompt_mask[row])[0])


@pytest.mark.parametrize("bins", [0, 5])
@pytest.mark.parametrize("max_tokens", [None, 5])
def test_a_reward_models_rewards_sum_to_the_score_less_the_prompts(bins, max_tokens, monkeypatch):
    monkeypatch.setattr("palm_rlhf_pytorch.ops.LEAST_TOKENS", {"cpu": 1})
    model, e = tiny_reward_model(bins), made_up()
    rewards = ProcessReward(model)(e, max_tokens).token_rewards
    assert (rewards[~e.response_mask] == 0).all()
    assert (rewards[e.response_mask] != 0).all()
    prompts = torch.stack(
        [
            model.score(e.sequence[i : i + 1, :n], e.prompt_mask[i : i + 1, :n])[0]
            for i, n in enumerate(e.prompt_mask.sum(-1))
        ]
    )
    outcome = model.score(e.sequence, e.prompt_mask, e.mask)
    torch.testing.assert_close(rewards.sum(-1), outcome - prompts, atol=1e-5, rtol=1e-5)


def test_what_is_refused():
    encoder = RewardModel(tiny_palm(causal=False))
    with pytest.raises(ValueError, match="causal reward model, got an encoder"):
        ProcessReward(encoder)
    with pytest.raises(ValueError, match="causal reward model, got an encoder"):
        encoder.prefix_scores(torch.ones(1, 2).long(), torch.tensor([[True, False]]))
    with pytest.raises(TypeError, match="needs an ImplicitPRM or a RewardModel, got PaLM"):
        ProcessReward(tiny_palm())
    with pytest.raises(TypeError, match="the weight of the process reward must be a finite number, got 'a'"):
        ProcessReward(tiny_prm(), "a")
    with pytest.raises(TypeError, match="only an ImplicitPRM learns from outcomes"):
        OnlineProcessReward(RewardModel(tiny_palm()))
    with pytest.raises(TypeError, match="process_reward is a ProcessReward"):
        tiny_trainer(process_reward=tiny_prm())
    with pytest.raises(ValueError, match="the process reward knows 5 tokens, but the policy writes 11"):
        tiny_trainer(process_reward=ProcessReward(ImplicitPRM(tiny_palm(num_tokens=5))))
    palm = tiny_palm()
    with pytest.raises(ValueError, match="shares weights with the policy"):
        tiny_trainer(palm=palm, process_reward=OnlineProcessReward(ImplicitPRM(palm)))
    with pytest.raises(ValueError, match="nothing to train"):
        OnlineProcessReward(ImplicitPRM(tiny_palm().requires_grad_(False)))
    with pytest.raises(ValueError, match="in half precision small steps would be lost"):
        OnlineProcessReward(ImplicitPRM(tiny_palm().bfloat16()))


def test_a_trainer_rolls_out_with_process_rewards():
    process = ProcessReward(tiny_prm(), 0.5)
    trainer = tiny_trainer(process_reward=process)
    e = trainer.roll_out(8, 4, ROLL)
    torch.testing.assert_close(e.token_rewards, process.rewards(e), atol=1e-6, rtol=1e-5)
    row = trainer.train(8, **TRAIN).history[0]
    assert row["process_reward"] != 0 and "prm_loss" not in row
    assert "process_reward" not in tiny_trainer().train(8, **TRAIN).history[0]


# PRIME


def outcomes():
    return replace(made_up(), scores=torch.tensor([1.0, 0.0, 0.6]))


def test_the_loss_and_accuracy_are_those_before_the_step():
    prm, e = tiny_prm(), outcomes()
    totals = ProcessReward(prm).rewards(e).sum(-1)
    labels = torch.tensor([1.0, 0.0, 1.0])
    loss = -(labels * totals.sigmoid().log() + (1 - labels) * (-totals).sigmoid().log()).mean()
    online = OnlineProcessReward(prm, lr=1e-3)
    online(e)
    assert online.metrics["prm_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert online.metrics["prm_accuracy"] == pytest.approx(((totals > 0) == labels.bool()).float().mean().item())


@pytest.mark.parametrize("max_tokens", [None, 5])
def test_one_step_is_adamws_on_the_clipped_gradient(max_tokens, monkeypatch):
    monkeypatch.setattr("palm_rlhf_pytorch.ops.LEAST_TOKENS", {"cpu": 1})
    prm, e = tiny_prm(beta=50.0), outcomes()
    plain = deepcopy(prm)
    seq = e.sequence.masked_fill(~e.mask, -1)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.0)
    plain(seq, torch.tensor([1.0, 0.0, 1.0]), e.prompt_mask).backward()
    assert torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0) > 1.0
    optimizer.step()
    filled = OnlineProcessReward(prm, lr=1e-2)(e, max_tokens)
    for p, q in zip(prm.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-4)
        assert p.grad is None
    # the rewards are those of the model after its step
    torch.testing.assert_close(filled.token_rewards, ProcessReward(prm).rewards(e), atol=1e-4, rtol=1e-4)


def test_in_reduced_precision_too_the_rewards_are_of_the_new_weights():
    prm, e = tiny_prm(), outcomes()
    with torch.autocast("cpu", torch.bfloat16):
        before = ProcessReward(prm)(e).token_rewards
    with torch.autocast("cpu", torch.bfloat16):
        given = OnlineProcessReward(prm, lr=1e-1)(e).token_rewards
    with torch.autocast("cpu", torch.bfloat16):
        fresh = ProcessReward(prm)(e).token_rewards
    assert torch.equal(given, fresh) and not torch.allclose(before, fresh, atol=1e-2)


def test_steps_tell_right_from_wrong_and_leave_the_reference():
    prm, e = tiny_prm(shaken=False), outcomes()
    before = [p.clone() for p in prm.ref_model.parameters()]
    online = OnlineProcessReward(prm, lr=1e-2)
    losses = []
    for _ in range(10):
        sums = online(e).token_rewards.sum(-1)
        losses.append(online.metrics["prm_loss"])
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item()) and losses[-1] < losses[0]
    assert min(sums[0], sums[2]) > 0 > sums[1] and online.metrics["prm_accuracy"] == 1
    assert all(map(torch.equal, before, prm.ref_model.parameters()))


def test_processes_put_their_gradients_together():
    prm, e = tiny_prm(), outcomes()
    before = deepcopy(prm.state_dict())
    online = OnlineProcessReward(prm, lr=1e-2)
    assert online.learn(e, over_processes=torch.zeros_like) == {"prm_loss": 0.0, "prm_accuracy": 0.0}
    assert all(torch.equal(t, before[name]) for name, t in prm.state_dict().items())


def prime(**keywords):
    online = OnlineProcessReward(tiny_prm(shaken=False), lr=1e-2, threshold=1.5)
    return tiny_trainer(process_reward=online, reward_model=count_even, **keywords)


def test_the_label_is_of_the_score_as_given():
    """Scaled scores would be right and wrong otherwise."""
    labels = []
    for normalize in (False, True):
        trainer = prime(normalize_reward=normalize)
        inner = trainer.process_reward.learn
        trainer.process_reward.learn = lambda e, *rest, inner=inner: (labels.append(e.scores > 1.5), inner(e, *rest))[1]
        trainer.roll_out(8, 4, ROLL)
    assert torch.equal(*labels) and 0 < labels[0].sum() < 8


def test_an_update_that_learns_nothing_logs_no_old_loss():
    trainer = prime().train(8, **TRAIN)
    trainer.algorithm.keep = lambda e: torch.zeros(len(e), dtype=torch.bool)
    row = trainer.train(8, **TRAIN).history[-1]
    assert "prm_loss" in trainer.history[0] and "reward" in row and "prm_loss" not in row


def test_a_resumed_run_takes_the_same_next_step(tmp_path):
    one = prime().train(16, **TRAIN)
    assert [set(row) >= {"prm_loss", "prm_accuracy"} for row in one.history] == [True, True]
    one.save(tmp_path / "c.pt")
    two = prime().load(tmp_path / "c.pt")
    for trainer in (one, two):
        trainer.train(8, **TRAIN)
    timings = ("tokens_per_second", "rollout_seconds", "learn_seconds")
    rows = [{k: v for k, v in t.history[-1].items() if k not in timings} for t in (one, two)]
    assert rows[0] == rows[1]
    states = [t.process_reward.model.state_dict() for t in (one, two)]
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    moved = F.mse_loss(states[0]["model.token_emb.weight"], states[0]["ref_model.token_emb.weight"])
    assert moved > 0 and states[0]["model.token_emb.weight"].shape[0] == TOKENS


def test_another_process_reward_is_refused_and_nothing_changed(tmp_path):
    prime().train(8, **TRAIN).save(tmp_path / "online.pt")
    tiny_trainer().train(8, **TRAIN).save(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="another process reward: one of the two learns"):
        tiny_trainer().load(tmp_path / "online.pt")
    trainer = prime()
    with pytest.raises(ValueError, match="another process reward: one of the two learns"):
        trainer.load(tmp_path / "none.pt")
    other = tiny_trainer(process_reward=OnlineProcessReward(ImplicitPRM(tiny_palm(6))))
    with pytest.raises(ValueError, match="its reference has other weights"):
        other.load(tmp_path / "online.pt")
    deeper = tiny_trainer(process_reward=OnlineProcessReward(ImplicitPRM(tiny_palm(5, depth=1))))
    with pytest.raises(ValueError, match="for one, model.* differs"):
        deeper.load(tmp_path / "online.pt")
    assert trainer.step == other.step == 0
    fixed = tiny_trainer(process_reward=ProcessReward(tiny_prm()))
    assert fixed.load(tmp_path / "none.pt").step == 1  # it does not learn: nothing of it is in a checkpoint


# what algorithms make of it


def two_of_a_prompt(token_rewards, **fields):
    """Two samples of a prompt, of two tokens and of one, at places 1 and 2."""
    e = replace(made_up((2, 1), (1, 1)), group_ids=torch.zeros(2, dtype=torch.long), scores=torch.zeros(2))
    zeros = torch.zeros_like(e.log_probs)
    rewards = torch.tensor([[0.0, *token_rewards[0]], [0.0, *token_rewards[1]]])
    return replace(e, log_probs=zeros, ref_log_probs=zeros, values=zeros, token_rewards=rewards, **fields)


@pytest.mark.parametrize("cls", [GRPO, RLOO, DrGRPO, MaxRL, ScoreCentering])
def test_groups_take_what_is_to_come_less_the_others_mean(cls):
    # the mean over tokens of the other: 4 for the first, (1 + 3) / 2 for the second; 1 - 4 + 3 - 4 = -4, 3 - 4 = -1
    a = cls(samples_per_prompt=2, kl=0.0).target(two_of_a_prompt(((1.0, 3.0), (4.0, 0.0)))).advantages
    torch.testing.assert_close(a, torch.tensor([[0.0, -4.0, -1.0], [0.0, 2.0, 0.0]]))


def test_ppo_and_reinforce_pp_take_each_token_s_reward():
    e = two_of_a_prompt(((1.0, 3.0), (4.0, 0.0)))
    e.scores = torch.tensor([10.0, 20.0])
    torch.testing.assert_close(token_rewards(e, 0.5), torch.tensor([[0.0, 1.0, 13.0], [0.0, 24.0, 0.0]]))
    returns = PPO(ClippedRegression(), gae_lambda=1.0).target(e).returns
    torch.testing.assert_close(returns, torch.tensor([[0.0, 14.0, 13.0], [0.0, 24.0, 0.0]]))
    # 14, 13 and 24 less their mean 17, over their standard deviation sqrt((9 + 16 + 49) / 3)
    std = math.sqrt(74 / 3)
    expected = torch.tensor([[0.0, -3 / std, -4 / std], [0.0, 7 / std, 0.0]])
    torch.testing.assert_close(ReinforcePP().target(e).advantages, expected)


def test_tpo_and_flowrl_take_their_sum():
    e = two_of_a_prompt(((1.0, 3.0), (2.0, 0.0)))  # 4 and 2: z-scores 1 and -1
    q = TPO(samples_per_prompt=2).target(e).extra["tpo_target"]
    assert q.tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    normed = FlowRL(8, samples_per_prompt=2, z_hidden=4).target(e).extra["flow_reward"]
    assert normed.tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)], abs=1e-5)  # 1 / the std of (4, 2)


def test_weights_that_the_policy_trains_are_refused():
    palm = tiny_palm()
    shared = ProcessReward(ImplicitPRM(deepcopy(palm), ref_model=palm))
    with pytest.raises(ValueError, match="shares weights that the policy trains"):
        tiny_trainer(palm=palm, actor_lora=False, process_reward=shared)
    palm = tiny_palm()
    tiny_trainer(palm=palm, process_reward=ProcessReward(ImplicitPRM(deepcopy(palm), ref_model=palm)))  # frozen
