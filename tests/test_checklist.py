"""The RLHF checklist's checks 1 to 25 (PPO, reward models, LoRA, numerics), one test each, named after its number.

Where the others are tested:

26 GRPO's advantages       test_algorithms::test_grpo_sums_to_zero_and_knows_no_units
                           test_algorithms::test_a_flat_group_teaches_nothing
27 RLOO's advantages       test_algorithms::test_rloo_is_k_over_k_less_one_times_centred
                           test_algorithms::test_rloo_has_the_kl_in_the_reward
28 Dr. GRPO and length     test_algorithms::test_dr_grpo_gives_each_token_the_same_gradient
29 accumulation            test_algorithms::test_micro_batches_change_nothing
                           test_trainer::test_micro_batches_are_the_whole_minibatch
30 k3 >= 0, E[k1] is KL    test_algorithms::test_kl_estimates
                           test_algorithms::test_the_mean_of_k1_is_the_exact_kl
31 DPO                     test_dpo::test_ln_2_where_the_policy_is_the_reference
                           test_preference::test_only_places_before_response_tokens_get_gradient
32 TPO's gradient          test_algorithms::test_tpo_has_the_gradient_p_less_q
                           test_algorithms::test_tpo_counts_prompts_the_same_and_learns_nothing_from_a_flat_one
33 FlowRL's optimum        test_algorithms::test_flowrl_is_at_rest_at_its_optimum
34 MaxRL                   test_algorithms::test_max_rl_by_hand
35 implicit PRM            test_implicit_process_reward::test_raising_the_likelihood_of_positives_lowers_the_loss
                           test_implicit_process_reward::test_a_model_that_is_its_reference_gives_zero_and_ln_2
36 best of n               test_rejection::test_the_best_of_each_prompt_is_kept
                           test_rejection::test_the_best_comes_as_often_as_it_should
37 half precision          test_vocabulary::test_log_softmax_is_float32_and_finite_at_a_gap_of_200
                           test_vocabulary::test_half_precision_weights_have_float32_logits
38 the entropy's sign      test_ppo::test_an_entropy_bonus_raises_entropy
39 cached is uncached      test_kv_cache::test_cached_is_uncached_at_every_position
40 the next step resumed   test_trainer::test_a_resumed_run_takes_the_same_next_step
                           test_algorithms::test_a_resumed_run_takes_the_same_next_step
                           test_algorithms::test_log_z_is_saved
"""

import re
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    EOS,
    LENGTHS,
    PROMPTS,
    ROLL,
    TOKENS,
    TRAIN,
    made_up,
    rolled,
    shake,
    tiny_actor_critic,
    tiny_palm,
    tiny_ppo,
    tiny_trainer,
)

from palm_rlhf_pytorch import ActorCritic, ImplicitPRM, RewardModel
from palm_rlhf_pytorch.algorithms.policy_gradient import clipped
from palm_rlhf_pytorch.algorithms.returns import generalized_advantages, token_rewards
from palm_rlhf_pytorch.generation import Generation
from palm_rlhf_pytorch.ops import whiten
from palm_rlhf_pytorch.reward import bradley_terry_loss
from palm_rlhf_pytorch.rollout import RolloutOptions, Scorer
from palm_rlhf_pytorch.trainer import Learner
from palm_rlhf_pytorch.value_loss import ClippedRegression


def gradients(loss, actor_critic):
    """The gradient of a loss in all that is trained, as one vector."""
    parameters = [*actor_critic.actor_parameters(), *actor_critic.critic_parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def only_response(experience, t):
    return t[experience.response_mask]


def test_every_check_has_a_test_and_those_named_above_exist():
    here = re.findall(r"^def test_(\d\d)_", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    elsewhere = re.findall(r"^(\d\d) ", __doc__, re.MULTILINE)
    assert sorted({*here, *elsewhere}) == [f"{number:02}" for number in range(1, 41)]
    for file, name in re.findall(r"(test_\w+)::(test_\w+)", __doc__):
        assert f"\ndef {name}(" in Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"), (file, name)


@pytest.mark.parametrize("lora", [True, False])
def test_01_reference_unchanged(lora):
    """Updates leave the reference's bits alone; KL to it is 0 at step 0 (but for rounding: sampling computes a token
    at a time) and not afterwards.
    """
    trainer = tiny_trainer(actor_lora=lora, critic_lora=lora, epochs=2)
    reference = trainer.actor_critic.reference_palm
    before = [p.clone() for p in reference.palm_parameters()]
    answer = reference(PROMPTS)
    trainer.train(24, **TRAIN)
    assert all(torch.equal(p, q) for p, q in zip(before, reference.palm_parameters(), strict=True))
    assert torch.equal(answer, reference(PROMPTS))
    kl = [row["kl"] for row in trainer.history]
    assert abs(kl[0]) < 1e-6 and all(abs(k) > 1e-6 for k in kl[1:])
    fresh = rolled(trainer.actor_critic)
    assert (fresh.kl != 0).all()


def test_02_first_epoch_is_on_policy():
    """One minibatch of everything: ratio 1, approximate KL 0, nothing clipped, policy loss 0."""
    trainer = tiny_trainer(minibatch_size=100, eps_clip=1e-4)
    shake([*trainer.actor_critic.actor_parameters(), *trainer.actor_critic.critic_parameters()])
    trainer.train(8, **TRAIN, temperature=0.7)
    row = trainer.history[0]
    assert abs(row["policy_loss"]) < 1e-6 and abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0
    assert row["kl"] != 0


def test_03_token_rewards_sum_to_the_score_less_the_kl():
    """At gamma 1 the rewards of a response add up to R - beta sum k1, and one place alone carries R."""
    e = made_up()
    torch.testing.assert_close(token_rewards(e, 0.3).sum(dim=-1), e.scores - 0.3 * e.kl)
    alone = token_rewards(e, 0.0)
    assert (alone != 0).sum(dim=-1).tolist() == [1, 1, 1]
    assert alone.nonzero()[:, 1].tolist() == [4, 3, 4]  # prompts of 2, 3, 1 and responses of 3, 1, 4 tokens
    assert torch.equal(alone.sum(dim=-1), e.scores)


def test_04_tokens_after_eos_reach_nothing():
    """Other tokens in place of padding change no reward, log-prob, value, advantage, loss or gradient."""
    actor_critic, ppo = tiny_actor_critic(), tiny_ppo()
    reward = RewardModel(tiny_palm(3, causal=False))
    shake(reward.finetune_parameters())
    e = rolled(actor_critic, reward)
    assert e.finished.any() and not e.finished.all()
    real = e.prompt_mask | e.response_mask

    def everything(sequence):
        generated = Generation(sequence, e.prompt_mask, e.response_mask)
        with torch.no_grad():
            judged = replace(
                e,
                sequence=sequence,
                scores=Scorer(reward)(generated),
                log_probs=actor_critic.log_probs(sequence, e.response_mask).log_probs,
                ref_log_probs=actor_critic.reference_log_probs(sequence, e.response_mask),
            )
            judged = ppo.target(ppo.judge(actor_critic, judged))
        loss, _ = Learner(actor_critic, ppo)(judged, 1.0)
        return [judged.scores, judged.log_probs, judged.values, judged.advantages, loss, gradients(loss, actor_critic)]

    other = torch.where(real, e.sequence, torch.full_like(e.sequence, 7))
    assert not torch.equal(other, e.sequence)
    for one, two in zip(everything(e.sequence), everything(other), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_05_gae_is_the_double_sum(gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_(t+k), term by term; lambda 1 gives returns - V, lambda 0 gives delta."""
    e = made_up()
    rewards = token_rewards(e, 0.1)
    found = generalized_advantages(rewards, e.values, e.response_mask, gamma, lam)
    for i, mask in enumerate(e.response_mask):
        r, v = rewards[i][mask], torch.cat((e.values[i][mask], torch.zeros(1)))
        delta = r + gamma * v[1:] - v[:-1]
        steps = range(len(r))
        expected = torch.stack([sum((gamma * lam) ** (k - t) * delta[k] for k in steps if k >= t) for t in steps])
        torch.testing.assert_close(found[i][mask], expected)
        if lam == 1:
            returns = torch.stack([sum(gamma ** (k - t) * r[k] for k in steps if k >= t) for t in steps])
            torch.testing.assert_close(found[i][mask], returns - v[:-1])
        if lam == 0:
            torch.testing.assert_close(found[i][mask], delta)
    assert (found[~e.response_mask] == 0).all()


def test_06_returns_do_not_know_of_whitening():
    """Returns are advantages + values before advantages are whitened."""
    e = made_up()
    on, off = (tiny_ppo(whiten_advantages=flag).target(e) for flag in (True, False))
    assert torch.equal(on.returns, off.returns) and not torch.allclose(on.advantages, off.advantages)
    torch.testing.assert_close(only_response(e, off.returns), only_response(e, off.advantages + e.values))


def test_07_whitening_is_over_the_masked_batch():
    """Mean 0 and variance 1 over response tokens of the whole batch, whatever the padding holds."""
    torch.manual_seed(0)
    mask = torch.rand(5, 7) < 0.5
    t = torch.randn(5, 7) * 3 + 2
    white = whiten(t, mask)
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[mask].var(correction=0), torch.tensor(1.0))
    padded = F.pad(torch.where(mask, t, torch.tensor(1e6)), (0, 3), value=-1e6)
    torch.testing.assert_close(whiten(padded, F.pad(mask, (0, 3)))[:, :7], white)


def test_08_a_better_score_is_a_better_advantage():
    """Adding c to one sequence's score raises its mean advantage, so whitening is not by sequence."""
    e = made_up()
    ppo = tiny_ppo()

    def mean(scores):
        return ppo.target(replace(e, scores=scores)).advantages[0][e.response_mask[0]].mean()

    assert mean(e.scores + torch.tensor([2.0, 0.0, 0.0])) > mean(e.scores) + 0.1


def test_09_old_quantities_have_no_graph():
    """Nothing that the loss is measured against can be differentiated."""
    actor_critic, ppo = tiny_actor_critic(), tiny_ppo()
    trainer = tiny_trainer(palm=actor_critic.actor_palm, actor_critic=actor_critic)
    e = ppo.target(trainer.roll_out(4, 2, ROLL))
    assert {"advantages", "returns", "log_probs", "ref_log_probs", "values", "scores"} <= set(e.tensors())
    assert not any(t.requires_grad for t in e.tensors().values())
    with_graph = replace(made_up(), values=made_up().values.requires_grad_())
    target = ppo.target(with_graph)
    assert not target.advantages.requires_grad and not target.returns.requires_grad


def test_10_clip_stops_only_what_went_too_far():
    """The gradient is 0 where A > 0 and rho > 1 + eps or A < 0 and rho < 1 - eps, and nowhere else."""
    log_ratio = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.1, 0.9]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    loss = clipped(log_ratio.exp(), advantages, 0.2, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.8, 1.3, -0.7, -1.1, 0.9]))
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 1.3, -0.7, -1.1, 0.9]))  # - A rho


def test_11_value_clip_acts_only_beyond_its_range():
    """Within eps of the old value the loss is plain regression; past it on the way to the return, the gradient is 0."""
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    values = torch.tensor([0.3, -0.3, 0.5, -0.5], requires_grad=True)
    returns = torch.full((4,), 2.0)
    loss = ClippedRegression(0.4)(values, old, returns)
    torch.testing.assert_close(loss, torch.tensor([1.7, 2.3, 1.6, 2.5]) ** 2 / 2)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([-1.7, -2.3, 0.0, -2.5]))  # the last went the wrong way


@pytest.mark.parametrize("critic", ["last", "pooled", "implicit"])
def test_12_values_do_not_see_what_they_judge(critic):
    """V_t stays as it is whatever y_t and the tokens after it are."""
    other = ImplicitPRM(tiny_palm(1), tiny_palm(2)) if critic == "implicit" else None
    actor_critic, ppo = tiny_actor_critic(critic=other, pooled_values=critic == "pooled"), tiny_ppo()
    e = made_up(responses=(5, 5), prompts=(2, 2))
    values = ppo.prefix_values(actor_critic, e)
    assert values[:, 3:].unique().numel() == 8  # they do see what came before
    for t in range(2, 7):
        changed = e.sequence.clone()
        changed[:, t:] = (changed[:, t:] + 3) % TOKENS
        found = ppo.prefix_values(actor_critic, replace(e, sequence=changed))
        torch.testing.assert_close(found[:, 2 : t + 1], values[:, 2 : t + 1])
        if t < 6:
            assert not torch.allclose(found[:, t + 1 :], values[:, t + 1 :])


def test_13_response_log_probs_are_the_language_models():
    """Their sum is minus the summed cross-entropy of the response tokens: nothing is off by one."""
    actor_critic = tiny_actor_critic()
    e = rolled(actor_critic)
    logits, _ = actor_critic(e.sequence, return_values=False)
    for i in range(len(e)):
        m, p = int(e.lengths[i]), int(e.prompt_mask[i].sum())
        loss = F.cross_entropy(logits[i, p - 1 : p + m - 1], e.sequence[i, p : p + m], reduction="sum")
        torch.testing.assert_close(e.log_probs[i].sum(), -loss, atol=1e-5, rtol=1e-5)


def test_14_a_ragged_batch_is_its_rows():
    """Log-probs, loss and gradient of a batch are those of each row alone, weighted by its tokens."""
    actor_critic, ppo = tiny_actor_critic(), tiny_ppo()
    learner = Learner(actor_critic, ppo)
    e = ppo.target(ppo.judge(actor_critic, rolled(actor_critic)))
    shake(actor_critic.actor_parameters(), seed=5, std=0.02)
    assert len(e.lengths.unique()) > 1
    log_probs = actor_critic.log_probs(e.sequence, e.response_mask).log_probs
    loss, _ = learner(e, 1.0)
    rows = [e[i : i + 1] for i in range(len(e))]
    assert len({row.sequence.shape[1] for row in rows}) > 1
    shares = e.lengths / e.lengths.sum()
    losses = [learner(row, 1.0)[0] for row in rows]
    for i, row in enumerate(rows):
        alone = actor_critic.log_probs(row.sequence, row.response_mask).log_probs
        torch.testing.assert_close(log_probs[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, (torch.stack(losses) * shares).sum())
    parts = [gradients(loss, actor_critic) * share for loss, share in zip(losses, shares, strict=True)]
    torch.testing.assert_close(gradients(loss, actor_critic), sum(parts), atol=1e-5, rtol=1e-4)


def test_15_left_padding_is_right_padding():
    """The log-probs of real tokens do not depend on the side of the padding."""
    palm = tiny_palm()
    right = PROMPTS
    mask = torch.arange(5) < LENGTHS[:, None]
    left, left_mask = torch.full_like(right, 3), torch.zeros_like(mask)
    for i, n in enumerate(LENGTHS.tolist()):
        left[i, 5 - n :], left_mask[i, 5 - n :] = right[i, :n], True
    from_right, from_left = palm(right)[mask], palm(left, mask=left_mask)[left_mask]
    torch.testing.assert_close(from_left.log_softmax(-1), from_right.log_softmax(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_16_samples_follow_the_log_probs(temperature):
    """How often a token is drawn matches exp of the recorded log-probs (chi-square, no filter, one temperature)."""
    actor_critic = tiny_actor_critic()
    e = rolled(actor_critic, options=RolloutOptions(max_seq_len=5, temperature=temperature), times=1200)
    drawn = e[torch.arange(0, len(e), 4)]  # one token after the first prompt, which has 5
    assert (drawn.lengths == 1).all()
    logits, _ = actor_critic(PROMPTS[:1], return_values=False)
    probabilities = (logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(drawn.sequence[:, 5], minlength=TOKENS)
    chi_square = ((counts - 1200 * probabilities) ** 2 / (1200 * probabilities)).sum()
    assert chi_square < 35.6  # the 99.99 % quantile at 10 degrees of freedom
    torch.testing.assert_close(drawn.log_probs[:, 5].exp(), probabilities[drawn.sequence[:, 5]], atol=1e-5, rtol=1e-4)
    ref = (actor_critic.reference_palm(PROMPTS[:1])[0, -1] / temperature).log_softmax(-1)
    torch.testing.assert_close(drawn.ref_log_probs[:, 5], ref[drawn.sequence[:, 5]], atol=1e-5, rtol=1e-4)


def test_17_learning_forwards_repeat_bit_by_bit():
    """Two forwards in the mode that learning uses are equal, also of a model pretrained with dropout."""
    trainer = tiny_trainer(palm=tiny_palm(attn_dropout=0.5, ff_dropout=0.5))
    e = trainer.algorithm.target(trainer.roll_out(4, 4, ROLL))
    trainer.learner.train()
    one, two = (trainer.learner(e, 1.0)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_18_an_eos_in_the_prompt_ends_nothing():
    """A prompt that holds EOS gets its answer, and its response mask is intact."""
    e = rolled(tiny_actor_critic(), times=4)
    second = e[torch.arange(1, len(e), 4)]
    assert (second.sequence[:, 1] == EOS).all() and (second.prompt_mask.sum(-1) == 3).all()
    assert second.lengths.max() > 1
    for sequence, mask, finished in zip(second.sequence, second.response_mask, second.finished, strict=True):
        response = sequence[mask].tolist()
        assert finished == (response[-1] == EOS) and EOS not in response[:-1]
        assert finished or len(response) == 6  # max_seq_len 9 less 3


def test_19_the_first_eos_is_learned_when_it_is_also_padding():
    """With pad = EOS a response keeps its first EOS, with a log-prob that gradient flows through."""
    actor_critic = tiny_actor_critic()
    e = rolled(actor_critic, options=replace(ROLL, pad_value=EOS), times=8)
    done = e[e.finished]
    assert len(done)
    last = (done.prompt_mask | done.response_mask).sum(-1) - 1
    rows = torch.arange(len(done))
    assert (done.sequence[rows, last] == EOS).all() and done.response_mask[rows, last].all()
    log_probs = actor_critic.log_probs(done.sequence, done.response_mask).log_probs[rows, last]
    assert (log_probs < 0).all() and log_probs.requires_grad
    same = rolled(actor_critic, times=8)  # padding with another token changes nothing
    assert torch.equal(same.response_mask, e.response_mask) and torch.equal(same.log_probs, e.log_probs)


def test_20_missing_eos_penalty_falls_on_unfinished_rows():
    """The penalty alters exactly the scores of responses that have no EOS."""
    actor_critic = tiny_actor_critic()
    plain, fined = (rolled(actor_critic, options=replace(ROLL, missing_eos_penalty=p)) for p in (0.0, 3.0))
    assert plain.finished.any() and not plain.finished.all()
    torch.testing.assert_close(plain.scores - fined.scores, 3.0 * (~plain.finished).float())


def test_21_a_new_value_head_says_zero():
    """V = 0 everywhere at step 0; in bins, the middle of their range."""
    trainer = tiny_trainer(critic_num_pred_bins=1)
    assert (trainer.roll_out(8, 4, ROLL).values == 0).all()
    trainer = tiny_trainer(critic_num_pred_bins=6, hl_gauss_loss_kwargs={"min_value": -2, "max_value": 4})
    e = trainer.roll_out(8, 4, ROLL)
    torch.testing.assert_close(only_response(e, e.values), torch.ones(int(e.lengths.sum())))


def test_22_adam_epsilon_arrives():
    """actor_eps and critic_eps reach the optimiser: a first step is lr g / (|g| + eps), and AdamW's own."""
    trainer = tiny_trainer(actor_eps=0.01, critic_eps=0.03, minibatch_size=100)
    groups = {g["name"]: g for g in trainer.optimizer.param_groups}
    assert groups["actor"]["eps"] == 0.01 and groups["critic"]["eps"] == 0.03
    e = trainer.algorithm.target(trainer.roll_out(8, 4, ROLL))
    loss, _ = trainer.learner(e, 1.0)
    for group in groups.values():
        before = [p.detach().clone() for p in group["params"]]
        found = torch.autograd.grad(loss, group["params"], retain_graph=True, allow_unused=True)
        group["expected"] = [
            p if g is None else p - 1e-2 * g / (g.abs() + group["eps"]) for p, g in zip(before, found, strict=True)
        ]
        twins = [p.clone().requires_grad_() for p in before]
        for twin, g in zip(twins, found, strict=True):
            twin.grad = g
        torch.optim.AdamW(twins, lr=1e-2, eps=group["eps"], weight_decay=0.0).step()
        group["twins"] = twins
    trainer._take_step(e, 1.0)
    for group in groups.values():
        for p, expected, twin in zip(group["params"], group["expected"], group["twins"], strict=True):
            torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(p, twin, atol=1e-7, rtol=1e-6)


def test_23_bradley_terry():
    """ln 2 at ties, blind to a common shift, and L(w, l) - L(l, w) = r_l - r_w."""
    chosen, rejected = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.7])
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(log(2))
    loss = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen + 3, rejected + 3), loss)
    torch.testing.assert_close(loss - bradley_terry_loss(rejected, chosen), -(chosen - rejected).mean())
    assert bradley_terry_loss(chosen, rejected, margin=1.0) > loss


def test_24_normalised_rewards_and_repeatable_scores():
    """Scores of the starting policy's rollouts get mean 0 and std 1, by a scale then kept; scoring has no noise."""
    trainer = tiny_trainer(normalize_reward=True)
    first = trainer.roll_out(16, 4, ROLL).scores
    assert abs(float(first.mean())) < 1e-5 and abs(float(first.std(correction=0)) - 1) < 1e-5
    kept = trainer.score_shift, trainer.score_scale
    trainer.step = 1
    later = trainer.roll_out(16, 4, ROLL).scores
    assert (trainer.score_shift, trainer.score_scale) == kept != (0.0, 1.0)
    raw = later * kept[1] + kept[0]
    torch.testing.assert_close(raw, raw.round())  # counts of even tokens, as `count_even` gave them

    reward = RewardModel(tiny_palm(), dropout=0.5, num_binned_output=5).train()
    x, mask = PROMPTS.repeat(1, 2), torch.ones(4, 10, dtype=torch.bool)
    prompt_mask = (torch.arange(10) < 4).expand(4, 10)
    assert torch.equal(reward.score(x, prompt_mask, mask), reward.score(x, prompt_mask, mask)) and reward.training


def test_25_lora():
    """B = 0 is the base; adapters off are the reference after training; merged = unmerged; the base has no gradient."""
    palm = tiny_palm()
    base = palm(PROMPTS)
    actor_critic = ActorCritic(palm, critic_dim_out=1)
    assert torch.equal(actor_critic(PROMPTS)[0], base)
    trainer = tiny_trainer(palm=palm, actor_critic=actor_critic).train(16, **TRAIN)
    adapted = trainer.actor_critic(PROMPTS)[0]
    assert not torch.allclose(adapted, base, atol=1e-3)
    assert torch.equal(palm(PROMPTS), base) and torch.equal(actor_critic.reference_palm(PROMPTS), base)
    with palm.merged("actor"):
        torch.testing.assert_close(palm(PROMPTS), adapted, atol=1e-5, rtol=1e-4)
    assert torch.equal(palm(PROMPTS), base)
    loss, _ = trainer.learner(trainer.algorithm.target(trainer.roll_out(4, 4, ROLL)), 1.0)
    loss.backward()
    assert all(p.grad is None for p in palm.palm_parameters())
    assert any(p.grad is not None for p in actor_critic.actor_parameters())
