import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from tiny import (
    PROMPTS,
    ROLL,
    TRAIN,
    count_even,
    made_up,
    rolled,
    shake,
    tiny_actor_critic,
    tiny_palm,
    tiny_ppo,
    tiny_trainer,
)

from palm_rlhf_pytorch import ImplicitPRM, RLHFTrainer
from palm_rlhf_pytorch.algorithms.ppo import PPO
from palm_rlhf_pytorch.algorithms.returns import generalized_advantages, token_rewards
from palm_rlhf_pytorch.keyword_trainer import KeywordTrainer
from palm_rlhf_pytorch.trainer import Learner
from palm_rlhf_pytorch.value_loss import ClippedRegression, HLGauss


def test_advantages_by_hand():
    # r = (0, 0, 1), V = (0.5, 0.25, 0.5), gamma 1, lambda 0.5, behind one prompt token:
    # delta = (-0.25, 0.25, 0.5), A_3 = 0.5, A_2 = 0.25 + 0.25 = 0.5, A_1 = -0.25 + 0.25 = 0
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.0]])
    values = torch.tensor([[9.0, 0.5, 0.25, 0.5, 9.0]])  # what stands outside the mask is not looked at
    mask = torch.tensor([[False, True, True, True, False]])
    advantages = generalized_advantages(rewards, values, mask, 1.0, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]]))


def test_token_rewards_by_hand():
    e = made_up()
    zeros = torch.zeros_like(e.log_probs)
    ref = zeros.clone()
    ref[0, 2] = -0.5  # log p - log p_ref = 0.5 at the first response token
    e = replace(e, log_probs=zeros, ref_log_probs=ref, scores=torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.zeros(3, 5)
    expected[0, 2], expected[0, 4], expected[1, 3], expected[2, 4] = -0.1, 1.0, 2.0, 3.0
    torch.testing.assert_close(token_rewards(e, 0.2), expected)


def test_loss_by_hand():
    actor_critic, ppo = tiny_actor_critic(), tiny_ppo(entropy=0.5, eps_clip=0.1)
    e = ppo.target(ppo.judge(actor_critic, rolled(actor_critic)))
    shake(actor_critic.actor_parameters(), seed=7, std=0.05)
    loss, numbers = Learner(actor_critic, ppo)(e, 1.0)
    policy = actor_critic.log_probs(e.sequence, e.response_mask)
    values = actor_critic.values(e.sequence, e.response_mask)
    total = clipped = surrogate = squared = kl = 0.0
    for i, t in e.response_mask.nonzero().tolist():
        ratio = (policy.log_probs[i, t] - e.log_probs[i, t]).exp().item()
        a = e.advantages[i, t].item()
        surrogate += -min(a * ratio, a * min(max(ratio, 0.9), 1.1))
        clipped += abs(ratio - 1) > 0.1
        kl += ratio - 1 - torch.tensor(ratio).log().item()
        squared += 0.5 * (values[i, t - 1] - e.returns[i, t]).item() ** 2
        total += 1
    entropy = policy.entropy.sum().item() / total
    assert not any(value.requires_grad for value in numbers.values())
    numbers = {name: value[e.response_mask].mean() for name, value in numbers.items()}
    assert numbers["policy_loss"].item() == pytest.approx(surrogate / total, abs=1e-5)
    assert numbers["clip_fraction"].item() == pytest.approx(clipped / total) and 0 < clipped < total
    assert numbers["approx_kl"].item() == pytest.approx(kl / total, abs=1e-5)
    assert numbers["value_loss"].item() == pytest.approx(squared / total, abs=1e-5)
    assert numbers["entropy"].item() == pytest.approx(entropy, abs=1e-5)
    assert loss.item() == pytest.approx((surrogate + squared) / total - 0.5 * entropy, abs=1e-4)


@pytest.mark.parametrize("pooled", [False, True])
def test_the_critic_judges_prefixes_of_response_tokens_alone(feedforward_rows, pooled):
    actor_critic, ppo, e = tiny_actor_critic(pooled_values=pooled), tiny_ppo(), made_up()
    values = actor_critic.values(e.sequence, e.response_mask).roll(1, dims=1).masked_fill(~e.response_mask, 0.0)
    feedforward_rows.clear()
    judged = ppo.judge(actor_critic, e)
    torch.testing.assert_close(judged.values, values)
    ppo.critic_loss(actor_critic, ppo.target(judged))
    whole, some = e.sequence.numel(), int(e.response_mask.sum())
    assert feedforward_rows == [whole, some] * 2


def test_the_kl_penalty_is_in_what_is_learned():
    e = made_up()
    with_kl, without = (tiny_ppo(kl=beta, whiten_advantages=False).target(e) for beta in (0.5, 0.0))
    first = e.response_mask & (e.response_mask.cumsum(-1) == 1)
    torch.testing.assert_close((without.returns - with_kl.returns)[first].mean(), 0.5 * e.kl.mean(), atol=0.2, rtol=0.2)
    exact = [tiny_ppo(kl=b, gae_lambda=1.0, whiten_advantages=False).target(e) for b in (0.5, 0.0)]
    torch.testing.assert_close((exact[1].returns - exact[0].returns)[first], 0.5 * e.kl)


def test_an_entropy_bonus_raises_entropy():
    entropies = {}
    for beta in (10.0, -10.0):
        trainer = tiny_trainer(beta_s=beta, minibatch_size=100)
        e = trainer.algorithm.target(trainer.roll_out(8, 8, ROLL))
        before = trainer.actor_critic.log_probs(e.sequence, e.response_mask).entropy.sum()
        trainer._take_step(e, 1.0)
        entropies[beta] = (trainer.actor_critic.log_probs(e.sequence, e.response_mask).entropy.sum() - before).item()
    assert entropies[10.0] > 0 > entropies[-10.0]


@pytest.mark.parametrize("bins", [1, 21])
def test_a_critic_learns(bins):
    """The policy stands still and the first token decides: later values can know, explained variance rises from 0."""
    trainer = tiny_trainer(
        reward_model=lambda prompts, responses: [float(r[0] % 2 == 0) for r in responses],
        critic_num_pred_bins=bins,
        hl_gauss_loss_kwargs={"min_value": -0.5, "max_value": 1.5},
        actor_lr=0.0,
        kl_div_loss_weight=0.0,
        value_clip=10.0,
        critic_lr=2e-2,
        epochs=6,
    )
    trainer.train(12 * 32, max_timesteps=1, update_timesteps=32, max_batch_size=32, max_seq_len=9)
    explained = [row["explained_variance"] for row in trainer.history]
    assert abs(explained[0]) < 0.05 and sum(explained[-6:]) / 6 > 0.15
    assert trainer.history[-1]["value_loss"] < trainer.history[0]["value_loss"]


def probability(trainer, token):
    logits, _ = trainer.actor_critic(torch.tensor([[2, 3]]), return_values=False)
    return logits[0, -1].softmax(-1)[token].item()


def forced_token(shuffled, seed=0, lora=True):
    """One prompt, one rewarded next token; the control shuffles the rewards among the answers."""
    generator = torch.Generator().manual_seed(seed)

    def reward(prompts, responses):
        scores = torch.tensor([float(r[0] == 7) for r in responses])
        return scores[torch.randperm(len(scores), generator=generator)] if shuffled else scores

    trainer = tiny_trainer(
        palm=tiny_palm(std=0.4),
        prompt_token_ids=torch.tensor([[2, 3]]),
        reward_model=reward,
        seed=seed,
        kl_div_loss_weight=0.01,
        beta_s=0.0,
        actor_lora=lora,
        critic_lora=lora,
    )
    before = probability(trainer, 7)
    trainer.train(24 * 32, max_timesteps=1, update_timesteps=32, max_batch_size=32, max_seq_len=3)
    return before, probability(trainer, 7)


@pytest.mark.parametrize("lora", [True, False])
def test_ppo_learns_a_forced_token(lora):
    before, after = forced_token(shuffled=False, lora=lora)
    assert before < 0.2 and after > 0.9


def test_ppo_does_not_learn_from_shuffled_rewards():
    after = [forced_token(shuffled=True, seed=seed)[1] for seed in range(3)]
    assert sum(after) / 3 < 0.4


def test_an_implicit_critic_trains():
    critic = ImplicitPRM(tiny_palm(1))
    before = [p.clone() for p in critic.ref_model.parameters()]
    trainer = tiny_trainer(critic=critic, critic_num_pred_bins=6).train(24, **TRAIN)
    assert isinstance(trainer.algorithm.value_loss, ClippedRegression)
    assert all(torch.equal(p, q) for p, q in zip(before, critic.ref_model.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(before, critic.model.parameters(), strict=True))
    assert len(trainer.history) == 3


def test_returns_out_of_range_are_warned_about():
    e = made_up()
    ppo = tiny_ppo(HLGauss(6, 0.0, 5.0))
    with pytest.warns(UserWarning, match=r"100% of returns .* lie outside the critic's bins \[0.0, 5.0\]"):
        ppo.target(replace(e, scores=torch.full((3,), -20.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppo.target(replace(e, scores=torch.full((3,), 3.0), values=e.values * 0, log_probs=e.ref_log_probs))
        tiny_ppo().target(replace(e, scores=torch.full((3,), -20.0)))  # a scalar critic has no range


def test_keywords_reach_what_they_name():
    trainer = tiny_trainer(
        eps_clip=0.3,
        value_clip=0.5,
        beta_s=0.02,
        kl_div_loss_weight=0.3,
        gamma=0.9,
        gae_lambda=0.8,
        actor_lr=3e-3,
        critic_lr=4e-3,
        actor_wd=0.1,
        critic_wd=0.2,
        betas=(0.8, 0.9),
        actor_lora_r=2,
        critic_lora_r=3,
        critic_pooled_values=False,
        minibatch_size=5,
        micro_batch_size=2,
        epochs=3,
        max_norm=0.5,
        kl_stop=0.1,
        missing_eos_penalty=2.0,
    )
    o = trainer.algorithm.options
    assert (o.eps_clip, o.entropy, o.kl, o.gamma, o.gae_lambda) == (0.3, 0.02, 0.3, 0.9, 0.8)
    assert trainer.algorithm.value_loss == ClippedRegression(0.5)
    actor, critic = trainer.optimizer.param_groups
    assert (actor["lr"], actor["weight_decay"], actor["betas"]) == (3e-3, 0.1, (0.8, 0.9))
    assert (critic["lr"], critic["weight_decay"], critic["betas"]) == (4e-3, 0.2, (0.8, 0.9))
    assert actor["params"][0].shape[1] == 2 and critic["params"][0].shape[1] == 3
    assert not trainer.actor_critic.pooled_values and trainer.missing_eos_penalty == 2.0
    learn = trainer.options
    assert (learn.minibatch_size, learn.micro_batch_size, learn.epochs, learn.max_norm) == (5, 2, 3, 0.5)
    assert learn.kl_stop == 0.1
    binned = tiny_trainer(critic_num_pred_bins=7, hl_gauss_loss_kwargs={"min_value": -1.0, "max_value": 2.0})
    assert binned.algorithm.value_loss == HLGauss(7, -1.0, 2.0)
    assert tiny_trainer(actor_critic=tiny_actor_critic(critic_dim_out=3)).algorithm.value_loss.num_bins == 3


def test_the_width_of_hl_gauss_is_the_papers_and_can_be_the_references():
    """The README's table says so: the reference 0.8 takes 1."""
    ours, theirs = (
        tiny_trainer(critic_num_pred_bins=6, hl_gauss_loss_kwargs=keywords).algorithm.value_loss
        for keywords in (None, {"sigma_to_bin_ratio": 1.0})
    )
    assert ours == HLGauss(6, sigma_to_bin_ratio=0.75) and theirs == HLGauss(6, sigma_to_bin_ratio=1.0)


def test_defaults_are_the_references():
    known = dict(
        actor_lr=1e-4,
        critic_lr=1e-4,
        actor_wd=0.0,
        critic_wd=0.0,
        actor_lora=True,
        critic_lora=True,
        actor_lora_r=8,
        critic_lora_r=8,
        critic_pooled_values=True,
        actor_dropout=0.0,
        critic_dropout=0.0,
        betas=(0.9, 0.999),
        max_norm=None,
        eps_clip=0.2,
        value_clip=0.4,
        beta_s=0.01,
        pad_value=0.0,
        minibatch_size=16,
        epochs=1,
        kl_div_loss_weight=0.1,
        critic_num_pred_bins=6,
    )
    ours = inspect.signature(RLHFTrainer).parameters
    assert {name: ours[name].default for name in known} == known
    train = inspect.signature(RLHFTrainer.train).parameters
    assert [(n, p.default) for n, p in train.items()][1:8] == [
        ("num_episodes", 50000),
        ("max_timesteps", 500),
        ("update_timesteps", 5000),
        ("max_batch_size", 16),
        ("max_seq_len", 2048),
        ("eos_token", None),
        ("temperature", 1.0),
    ]


def test_old_keywords_warn_and_work():
    critic = tiny_palm(1)
    with pytest.warns(DeprecationWarning) as caught:
        trainer = tiny_trainer(critic_palm=critic, actor_adam_eps=1e-3, critic_adam_eps=1e-2, use_lion=False)
    assert [str(w.message) for w in caught] == [
        "critic_palm has moved: use critic",
        "critic_adam_eps has moved: use critic_eps",
        "actor_adam_eps has moved: use actor_eps",
        "use_lion has moved: use optimizer_class",
    ]
    assert trainer.actor_critic.critic_palm is critic
    assert [g["eps"] for g in trainer.optimizer.param_groups] == [1e-3, 1e-2]
    with pytest.warns(DeprecationWarning) as caught:
        RLHFTrainer(palm=tiny_palm(), reward_model=len, prompt_token_ids=PROMPTS, actor_adam_eps=1e-3)
    assert caught[0].filename == __file__  # where python shows deprecations to the one who can act on them


def test_lion_by_its_old_name(monkeypatch):
    class Lion(torch.optim.SGD):
        def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    module = type("lion_pytorch", (), {"Lion": Lion})
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", module)
    with pytest.warns(DeprecationWarning, match="use_lion has moved: use optimizer_class"):
        trainer = tiny_trainer(use_lion=True)
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), Lion)
    monkeypatch.setitem(__import__("sys").modules, "lion_pytorch", None)
    with pytest.warns(DeprecationWarning), pytest.raises(ImportError, match="this needs lion_pytorch"):
        tiny_trainer(use_lion=True)


def test_the_value_s_form_is_an_option():
    assert PPO(value_clip=0.3).value_loss == ClippedRegression(0.3)
    ppo = PPO(value_bins=7, value_min=-1.0, value_max=2.0)
    assert ppo.value_loss == HLGauss(7, -1.0, 2.0) and ppo.new_actor(tiny_palm()).value_dim == 7
    assert PPO(HLGauss(6), value_clip=0.3).value_loss == HLGauss(6)
    with pytest.raises(ValueError, match="a histogram needs 2 bins or more, got 1"):
        PPO(value_bins=1)


@pytest.mark.parametrize("value_loss, outputs", [(None, 1), (HLGauss(6, 0.0, 5.0), 6)])
@pytest.mark.parametrize("lora", [True, False])
def test_ppo_makes_its_own_critic(value_loss, outputs, lora):
    keywords = {"actor_lora": lora, "actor_lora_r": 2, "seed": 0}
    trainer = KeywordTrainer(
        PPO(value_loss), palm=tiny_palm(), reward_model=count_even, prompt_token_ids=PROMPTS, **keywords
    )
    actor_critic = trainer.actor_critic
    assert actor_critic.value_dim == outputs and (actor_critic.critic_lora_scope is not None) is lora
    assert (actor_critic.critic_palm is actor_critic.actor_palm) is lora
    assert "value_loss" in trainer.train(8, **TRAIN).history[0]
