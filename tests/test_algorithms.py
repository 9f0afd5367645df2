import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from run_readme import code_blocks
from tiny import PROMPTS, ROLL, TOKENS, TRAIN, first_is_even, made_up, shake, tiny_actor_critic, tiny_palm
from torch.optim import SGD, AdamW

from palm_rlhf_pytorch import ops
from palm_rlhf_pytorch.actor import Actor, PolicyOutput
from palm_rlhf_pytorch.algorithm import Algorithm
from palm_rlhf_pytorch.algorithms import ALGORITHMS, algorithm_class
from palm_rlhf_pytorch.algorithms.dapo import DAPO
from palm_rlhf_pytorch.algorithms.dr_grpo import DrGRPO
from palm_rlhf_pytorch.algorithms.flowrl import FlowRL
from palm_rlhf_pytorch.algorithms.groups import standardised
from palm_rlhf_pytorch.algorithms.grpo import GRPO
from palm_rlhf_pytorch.algorithms.gspo import GSPO, per_token_mean
from palm_rlhf_pytorch.algorithms.max_rl import MaxRL, over_success
from palm_rlhf_pytorch.algorithms.policy_gradient import clipped, entropy_shaped
from palm_rlhf_pytorch.algorithms.reinforce_pp import ReinforcePP, ReinforcePPBaseline, k2
from palm_rlhf_pytorch.algorithms.rloo import RLOO, leave_one_out, of_sequence
from palm_rlhf_pytorch.algorithms.spo import SPO, penalised
from palm_rlhf_pytorch.algorithms.tpo import TPO, z_scores
from palm_rlhf_pytorch.experience import Experience, padded
from palm_rlhf_pytorch.prompts import Prompts
from palm_rlhf_pytorch.trainer import Learner, LearnOptions, OnPolicyTrainer, by_token


def tensor(*values):
    return torch.tensor(values)


def grouped(scores, responses=(3, 1, 4, 2), group_ids=None, seed=0):
    """Made-up experience, by default of one group."""
    e = made_up(responses, (2, 3, 1, 2)[: len(responses)] if len(responses) <= 4 else (2,) * len(responses), seed)
    ids = torch.zeros(len(e), dtype=torch.long) if group_ids is None else torch.tensor(group_ids)
    return replace(e, scores=torch.tensor(scores), group_ids=ids)


def policy_of(log_probs, entropy=None):
    return PolicyOutput(log_probs, torch.zeros_like(log_probs) if entropy is None else entropy, None)


def reduced(algorithm, log_probs, e):
    losses, _ = algorithm.loss(policy_of(log_probs), e)
    return (by_token(losses) * ops.token_shares(e.response_mask, algorithm.normalization)).sum()


def gradient(algorithm, e, log_probs=None):
    log_probs = (e.log_probs if log_probs is None else log_probs).clone().requires_grad_()
    return torch.autograd.grad(reduced(algorithm, log_probs, e), log_probs)[0]


# (h) what shares and groups are


def test_token_shares_by_hand():
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    cases = {
        "token": [[0, 1 / 4, 1 / 4, 1 / 4], [0, 0, 1 / 4, 0]],
        "sequence": [[0, 1 / 6, 1 / 6, 1 / 6], [0, 0, 1 / 2, 0]],  # 1 / (2 sequences * length)
        5: [[0, 0.1, 0.1, 0.1], [0, 0, 0.1, 0]],  # 1 / (2 * 5)
    }
    for normalization, expected in cases.items():
        torch.testing.assert_close(ops.token_shares(mask, normalization), torch.tensor(expected))


def test_groups_go_there_and_back():
    ids, values = torch.tensor([7, 2, 7, 2, 9, 9]), torch.arange(6.0)
    groups = ops.to_groups(values, ids)
    assert groups.tolist() == [[1.0, 3.0], [0.0, 2.0], [4.0, 5.0]]
    assert torch.equal(ops.from_groups(groups, ids), values)
    with pytest.raises(ValueError, match="do not split groups"):
        ops.to_groups(values[:5], ids[:5])


# (a) advantages and surrogates


def test_grpo_compares_within_groups():
    scores = [1.0, 5.0, 2.0, 2.0, 0.0, 2.0]
    ids = [0, 1, 0, 1, 0, 1]
    e = grouped(scores, (3, 1, 4, 2, 2, 1), ids)
    a = GRPO(kl=0.0).target(e).advantages
    first = torch.stack([row[m][0] for row, m in zip(a, e.response_mask, strict=True)])
    # group 0: (1, 2, 0), mean 1, std 1; group 1: (5, 2, 2), mean 3, std sqrt(3); over std + 1e-4
    s = math.sqrt(3)
    expected = tensor(0.0, 2 / (s + 1e-4), 1 / 1.0001, -1 / (s + 1e-4), -1 / 1.0001, -1 / (s + 1e-4))
    torch.testing.assert_close(first, expected)
    assert (a[~e.response_mask] == 0).all() and (a[2][e.response_mask[2]] == a[2].max()).all()


def test_grpo_sums_to_zero_and_knows_no_units():
    rewards = torch.randn(5, 6)
    torch.testing.assert_close(standardised(rewards).sum(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardised(3 * rewards + 7), standardised(rewards), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(standardised(-rewards), standardised(rewards))


@pytest.mark.parametrize("cls", [GRPO, DrGRPO, RLOO, DAPO, GSPO, MaxRL])
def test_a_flat_group_teaches_nothing(cls):
    algorithm = cls(kl=0.0)
    for scores, moves in (([1.0] * 4, False), ([1.0, 0.0, 0.0, 1.0], True)):
        e = algorithm.target(grouped(scores))
        assert bool(gradient(algorithm, e).abs().sum() > 1e-4) is moves


def test_rloo_is_k_over_k_less_one_times_centred():
    torch.testing.assert_close(leave_one_out(tensor(3.0, 0.0, 0.0)), tensor(3.0, -1.5, -1.5))  # 3 - 0, 0 - 3 / 2
    rewards = torch.randn(4, 5)
    torch.testing.assert_close(leave_one_out(rewards), 5 / 4 * (rewards - rewards.mean(-1, keepdim=True)))


def test_rloo_has_the_kl_in_the_reward():
    e = grouped([1.0, 0.0, 0.0, 0.0])
    rewards = e.scores - 0.5 * (e.log_probs - e.ref_log_probs).sum(-1)
    a = RLOO(kl=0.5).target(e).advantages
    torch.testing.assert_close(a.amax(-1) + a.amin(-1), leave_one_out(rewards))  # one of the two is the mask's 0


def test_dr_grpo_gives_each_token_the_same_gradient():
    scores = [1.0, -1.0, 1.0, -1.0]  # A = R, the mean being 0
    for cls, same in ((DrGRPO, True), (GRPO, False)):
        algorithm = cls(kl=0.0, **({"max_response": 10} if same else {}))
        e = algorithm.target(grouped(scores))
        sizes = gradient(algorithm, e)[e.response_mask].abs()
        assert torch.allclose(sizes, sizes[0]) is same
        if same:
            assert sizes[0].item() == pytest.approx(1 / 40)  # |A| / (4 sequences * 10)


def test_dr_grpo_s_constant_is_the_room():
    """Not the longest response, which would make a token's worth depend on the others'."""
    trainer = build("dr_grpo", learn={"minibatch_size": 100})
    e = trainer.algorithm.target(trainer.roll_out(8, 8, replace(ROLL, max_seq_len=40)))
    room = 40 - int(trainer.prompts.lengths.min())
    assert trainer.room == room == 39 and int(e.lengths.max()) < room
    shares = trainer._shares(e.response_mask)
    assert shares[e.response_mask].unique().tolist() == pytest.approx([1 / (len(e) * room)])
    # without an engine: the longest of the batch
    mask = torch.tensor([[False, True, True], [False, True, False]])
    torch.testing.assert_close(ops.token_shares(mask, "constant"), mask / 4.0)


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "gspo"])
def test_what_the_loss_is_a_mean_over_is_no_option_where_the_paper_settles_it(name):
    """RLOO's and GSPO's responses are one action each: by token, a long one would count for more."""
    cls = algorithm_class(name)
    assert "normalization" not in {field.name for field in fields(cls.Options)}
    with pytest.raises(TypeError, match="normalization"):
        cls(normalization="token")
    assert cls().normalization == ("constant" if name == "dr_grpo" else "sequence")


def test_the_kl_stands_in_one_place():
    e = grouped([1.0, 0.0, 0.0, 1.0])
    none, loss, reward = (GRPO(kl=kl, kl_in=where) for kl, where in ((0.0, "loss"), (0.5, "loss"), (0.5, "reward")))
    torch.testing.assert_close(none.target(e).advantages, loss.target(e).advantages)
    assert not torch.allclose(none.target(e).advantages, reward.target(e).advantages)
    e = none.target(e)
    d = e.ref_log_probs - e.log_probs
    added = 0.5 * (d.exp() - d - 1)
    shares = ops.token_shares(e.response_mask, "sequence")
    expected = reduced(none, e.log_probs, e) + (added * shares).sum()
    torch.testing.assert_close(reduced(loss, e.log_probs, e), expected)
    torch.testing.assert_close(reduced(reward, e.log_probs, e), reduced(none, e.log_probs, e))


def test_reinforce_pp_baseline_s_kl_is_k2():
    algorithm = ReinforcePPBaseline(samples_per_prompt=4, kl=0.5)
    e = algorithm.target(grouped([1.0, 0.0, 0.0, 1.0]))
    _, numbers = algorithm.loss(policy_of(e.log_probs), e)
    torch.testing.assert_close(numbers["kl_loss"], 0.5 * (e.log_probs - e.ref_log_probs) ** 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"samples_per_prompt": 1}, "samples_per_prompt must be 2 or more, got 1"),
        ("tpo", {"eta": 0.0}, "eta must be 1e-06 or more, got 0.0"),
        ("ppo", {"kl_in": "rewards"}, "kl_in is one of loss, reward, got 'rewards'"),
        ("grpo", {"normalization": "Token"}, "normalization is one of sequence, token, got 'Token'"),
        ("ppo", {"eps_clip": -0.1}, "eps_clip must be 0 or more, got -0.1"),
        ("rloo", {"kl": math.nan}, "kl must be 0 or more, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        algorithm_class(name)(**options)


def test_an_extra_of_another_width_is_refused():
    e = grouped([1.0, 0.0, 0.0, 1.0])
    kept = e.with_extra(a=torch.ones(4), b=torch.ones(4, 1, 7), c=torch.ones(4, e.sequence.shape[1], 2))
    assert set(kept.extra) == {"a", "b", "c"}
    for wrong in (torch.ones(3), torch.ones(4, 20), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="'wrong' has shape"):
            e.with_extra(wrong=wrong)


def test_max_rl_by_hand():
    # (1,0,0,0): mean 1/4, so (3/4)/(1/4) = 3 and -1; (1,1,0,0): 1 and -1; nothing where all are alike
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    expected = torch.tensor([[3.0, -1, -1, -1], [1, 1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(over_success(rewards), expected, atol=2e-5, rtol=0)
    # the gradient: the mean score of the successes less that of all; one-token answers, score of i = e_i
    for row in rewards[:2]:
        e = grouped(row.tolist(), (1, 1, 1, 1))
        algorithm = MaxRL()
        found = -gradient(algorithm, algorithm.target(e))[e.response_mask]
        torch.testing.assert_close(found, row / row.sum() - 1 / 4, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="rewards of 0 or 1"):
        MaxRL().target(grouped([0.5, 0.0, 1.0, 1.0]))


def test_max_rl_weighs_long_and_short_answers_alike():
    """The score of a response is the sum over its tokens; but for one factor the gradient is that of `by_hand`."""
    e, algorithm = grouped([1.0, 0.0, 0.0, 1.0]), MaxRL()
    found = -gradient(algorithm, algorithm.target(e))
    weights = found.sum(dim=-1) / e.lengths
    expected = torch.tensor([1 / 2, 0, 0, 1 / 2]) - 1 / 4  # mean of the successes less mean of all
    torch.testing.assert_close(weights / weights[0], expected / expected[0])


@pytest.mark.parametrize(
    "keywords",
    [{"missing_eos_penalty": 0.5}, {"overlong_buffer": 2}, {"learn_options": LearnOptions(normalize_reward=True)}],
)
def test_max_rl_takes_rewards_as_they_are(keywords):
    with pytest.raises(ValueError, match="MaxRL needs scores as the reward gives them: leave out missing_eos_penalty"):
        OnPolicyTrainer(Actor(tiny_palm()), MaxRL(), first_is_even, Prompts(PROMPTS), **keywords)
    with pytest.raises(ValueError, match="a KL in them is neither: take kl_in='loss'"):
        MaxRL(kl=0.01, kl_in="reward")


def test_reinforce_pp_is_whitened_over_the_batch():
    e = replace(made_up((2, 1), (1, 1)), scores=tensor(1.0, 0.0))
    e.log_probs = torch.tensor([[0.0, 0.2, 0.4], [0.0, 0.0, 0.0]])
    e.ref_log_probs = torch.zeros(2, 3)
    # with beta 0.5: 1 - 0.5 (0.2 + 0.4) = 0.7, 1 - 0.5 * 0.4 = 0.8, 0; mean 0.5, variance (0.04 + 0.09 + 0.25) / 3
    std = math.sqrt(0.38 / 3)
    expected = torch.tensor([[0.0, 0.2 / std, 0.3 / std], [0.0, -0.5 / std, 0.0]])
    torch.testing.assert_close(ReinforcePP(kl=0.5).target(e).advantages, expected)
    # with a baseline: 0.5, 0.5, -0.5; mean 1/6, variance 2/9: (1/3) / sqrt(2/9) = 1 / sqrt 2, -2 / sqrt 2
    e.group_ids = torch.tensor([3, 3])
    r = 1 / math.sqrt(2)
    expected = torch.tensor([[0.0, r, r], [0.0, -2 * r, 0.0]])
    torch.testing.assert_close(ReinforcePPBaseline(samples_per_prompt=2).target(e).advantages, expected)


def test_spo_by_hand():
    # A rho - |A| (rho - 1)^2 / (2 * 0.2): 2 * 1.2 - 2 * 0.04 / 0.4 = 2.2; 2; -0.8 - 0.04 / 0.4 = -0.9
    loss = penalised(tensor(1.2, 1.0, 0.8), tensor(2.0, 2.0, -1.0), 0.2, 0.2)
    torch.testing.assert_close(loss, tensor(-2.2, -2.0, 0.9))
    # the slope is -(A - |A| (rho - 1) / eps): 0 at 1 + sign(A) eps, also of two ranges; at 1.5 -(2 - 2 * 0.5 / 0.2) = 3
    ratio = tensor(1.3, 0.8, 1.5).requires_grad_()
    ranges = ((0.2, 0.3), (0.2, 0.3), (0.2, 0.2))
    advantages = (3.0, -0.7, 2.0)
    losses = [penalised(r, torch.tensor(a), *lh) for r, a, lh in zip(ratio, advantages, ranges, strict=True)]
    torch.testing.assert_close(torch.autograd.grad(sum(losses), ratio)[0], tensor(0.0, 0.0, 3.0), atol=1e-5, rtol=1e-5)


def test_clip_higher_by_hand():
    ratio, a = tensor(1.25, 1.5, 0.7, 1.5, 0.7), tensor(1.0, 1.0, -1.0, -1.0, 1.0)
    torch.testing.assert_close(clipped(ratio, a, 0.2, 0.28), tensor(-1.25, -1.28, 0.8, 1.5, -0.7))
    with pytest.raises(ValueError, match=r"SPO divides by eps_clip, which must be above 0, got \(0.0, 0.0\)"):
        SPO(eps_clip=0.0)
    e = grouped([1.0, 0.0, 0.0, 1.0])
    assert "clip_fraction" not in SPO(kl=0.0).loss(policy_of(e.log_probs), SPO(kl=0.0).target(e))[1]
    assert DAPO().options.clip_range == (0.2, 0.28) and GRPO().options.clip_range == (0.2, 0.2)
    assert DAPO().normalization == "token" and not DAPO().needs_reference


def test_ratios_of_responses_by_hand():
    log_ratio = torch.tensor([[0.0, 0.1, 0.3, 0.0], [0.0, -0.6, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    # GSPO: means 0.4 / 2, -0.6 / 3; RLOO: sums
    assert per_token_mean(log_ratio, mask)[:, 1].tolist() == pytest.approx([0.2, -0.2])
    assert of_sequence(log_ratio, mask)[:, 1].tolist() == pytest.approx([0.4, -0.6])
    assert GSPO().options.clip_range == (3e-4, 4e-4)


@pytest.mark.parametrize("of_response", [per_token_mean, of_sequence])
def test_a_response_s_ratio_has_the_gradient_of_the_plain_formula(of_response):
    e = grouped([1.0, 0.0, 0.0, 2.0])
    mask, weights = e.response_mask, torch.tensor([1.0, -2.0, 0.5, 3.0])[:, None]
    log_ratio = (0.3 * torch.randn(mask.shape) * mask).requires_grad_()
    whole = ops.masked_mean(log_ratio, mask, keepdim=True) if of_response is per_token_mean else log_ratio.sum(-1, True)
    shares = ops.token_shares(mask, "sequence")
    losses = [(weights * ratio.exp() * shares).sum() for ratio in (of_response(log_ratio, mask), whole)]
    torch.testing.assert_close(*losses)
    ours, plain = (torch.autograd.grad(loss, log_ratio)[0][mask] for loss in losses)
    torch.testing.assert_close(ours, plain)
    assert plain.abs().min() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "spo", "max_rl", "gspo", "dapo", "score_centering"])
def test_what_a_process_reward_says_of_a_token_moves_that_token(name):
    """Of a response whose tokens' advantages differ, the gradient by each log-prob is in proportion to its own."""
    algorithm = algorithm_class(name)(kl=0.0)
    if name == "score_centering":  # what it takes off the scores is no part of this
        algorithm.policy_loss = lambda policy, log_ratio, advantages, e: -advantages * policy.log_probs
    e = grouped([1.0, 0.0, 0.0, 1.0])
    torch.manual_seed(1)
    e = algorithm.target(replace(e, token_rewards=torch.randn(e.log_probs.shape) * e.response_mask))
    found = -gradient(algorithm, e)
    for row, advantages, mask in zip(found, e.advantages, e.response_mask, strict=True):
        torch.testing.assert_close(row[mask], row[mask].sum() * advantages[mask] / advantages[mask].sum())
    assert e.advantages[0][e.response_mask[0]].std() > 0.1 and found.abs().sum() > 0.1


def test_gspo_loss_by_hand():
    e = grouped([1.0, 0.0], (2, 1), [0, 0])
    algorithm = GSPO(kl=0.0, eps_clip=0.1, eps_clip_high=0.15)
    e = algorithm.target(e)
    log_probs = e.log_probs + torch.tensor([0.2, 0.5])[:, None] * e.response_mask
    # A = +-0.5 / (sqrt 0.5 + 1e-4); s = e^0.2 is clipped to 1.15, e^0.5 is not (A < 0): the mean of the two
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert reduced(algorithm, log_probs, e).item() == pytest.approx((-a * 1.15 + a * math.exp(0.5)) / 2)


def test_entropy_shaping_by_hand():
    entropy = torch.ones(4, requires_grad=True)
    shaped = entropy_shaped(tensor(1.0, -1.0, 0.1, 0.0), entropy, 0.4, 2.0)
    # min(0.4, |A| / 2): 0.4, 0.4, 0.05, 0
    torch.testing.assert_close(shaped, tensor(1.4, -0.6, 0.15, 0.0))
    assert not shaped.requires_grad
    algorithm = GRPO(kl=0.0, entropy_advantage=0.4)
    e = algorithm.target(grouped([1.0, 0.0, 0.0, 0.0]))
    loss, _ = algorithm.loss(policy_of(e.log_probs, e.response_mask.float()), e)
    expected = -(e.advantages + (e.advantages.abs() / 2).clamp(max=0.4))  # the ratio is 1
    torch.testing.assert_close(loss[e.response_mask], expected[e.response_mask])


def test_kl_estimates():
    d = torch.tensor(math.log(2))
    assert ops.k3(torch.tensor(0.0), d).item() == pytest.approx(2 - 1 - math.log(2))
    assert k2(torch.tensor(0.0), d).item() == pytest.approx(math.log(2) ** 2 / 2)
    p, ref = torch.randn(7).softmax(-1), torch.randn(7).softmax(-1)
    exact = (p * (p / ref).log()).sum()
    torch.testing.assert_close((p * ops.k3(p.log(), ref.log())).sum(), exact)
    assert (ops.k3(p.log(), ref.log()) >= 0).all()
    # with samples of p held fixed, k2's gradient is that of KL(p || ref)
    logits = torch.randn(7).requires_grad_()
    p = logits.softmax(-1)
    wanted = torch.autograd.grad((p * (p / ref).log()).sum(), logits)[0]
    p = logits.softmax(-1)
    found = torch.autograd.grad((p.detach() * k2(logits.log_softmax(-1), ref.log())).sum(), logits)[0]
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_the_mean_of_k1_is_the_exact_kl():
    """All answers of one token, each weighed by its probability."""
    actor = Actor(tiny_palm())
    shake(actor.actor_parameters())
    sequence = torch.stack((torch.full((TOKENS,), 3), torch.arange(TOKENS)), dim=-1)
    mask = torch.tensor([False, True]).expand_as(sequence)
    e = replace(
        made_up((1,) * TOKENS, (1,) * TOKENS),
        sequence=sequence,
        response_mask=mask,
        log_probs=actor.log_probs(sequence, mask).log_probs,
        ref_log_probs=actor.reference_log_probs(sequence, mask),
    )
    scopes = (actor.actor_lora_scope, None)
    p, ref = (actor.actor_palm(sequence[:1, :1], finetune_scope=s)[0, -1].log_softmax(-1) for s in scopes)
    exact = (p.exp() * (p - ref)).sum()
    torch.testing.assert_close((p.exp() * e.kl).sum(), exact)
    assert exact > 0.01 and not torch.allclose(e.kl, e.kl[0])


# trainers


def build(name, optimizer_class=AdamW, lr=1e-2, reward=first_is_even, seed=0, learn=None, algorithm=None, **options):
    optim = {"lr": lr}
    if algorithm is None:
        if name != "ppo":
            options.setdefault("samples_per_prompt", 1 if name == "reinforce_pp" else 4)
        if name == "reinforce_pp":
            options.pop("samples_per_prompt")
        if name == "flowrl":
            options.setdefault("z_hidden", 8)
        algorithm = algorithm_class(name).for_policy(tiny_palm(), actor_optim=optim, own_optim=optim, **options)
    if name == "ppo":
        actor = tiny_actor_critic()
    else:
        actor = Actor(tiny_palm())
        shake(actor.actor_parameters())
    learn = LearnOptions(**{"minibatch_size": 16, **(learn or {})})
    prompts = Prompts(PROMPTS.repeat(3, 1))
    return OnPolicyTrainer(
        actor, algorithm, reward, prompts, optimizer_class=optimizer_class, seed=seed, learn_options=learn
    )


def parameters(trainer):
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def step_of(trainer, e):
    """What a step of SGD at rate 1 takes off, the weights put back."""
    before = [p.detach().clone() for p in parameters(trainer)]
    trainer._take_step(e, 1.0)
    moved = [b - p.detach() for b, p in zip(before, parameters(trainer), strict=True)]
    with torch.no_grad():
        for p, b in zip(parameters(trainer), before, strict=True):
            p.copy_(b)
    return moved


def off_policy(name, **kwargs):
    """A trainer and experience of a policy that it has since moved from."""
    trainer = build(name, SGD, lr=1.0, learn={"minibatch_size": 100}, **kwargs)
    e = trainer.roll_out(8, 8, ROLL)
    assert len(e.lengths.unique()) > 2
    shake(trainer.actor_critic.actor_parameters(), seed=5, std=0.03)
    return trainer, e


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)
    assert sum(b.abs().sum() for b in theirs) > 1e-3


def untimed(history):
    return [{k: v for k, v in row.items() if "second" not in k} for row in history]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_takes_the_same_next_step(name, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer = build(name, learn={"epochs": 2})
    before = [p.detach().clone() for p in parameters(trainer)]
    trainer.train(8, **TRAIN)
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert all(math.isfinite(value) for value in trainer.history[0].values())
    trainer.save(path)
    trainer.train(8, **TRAIN)
    resumed = build(name, learn={"epochs": 2}, seed=99)
    resumed.load(path)
    resumed.train(8, **TRAIN)
    assert untimed(resumed.history) == untimed(trainer.history) and len(resumed.history) == 2
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(trainer), strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_change_nothing(name, monkeypatch):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", 1)
    trainer, e = off_policy(name)
    e = trainer.algorithm.target(e)
    calls, forward = [], Learner.forward
    monkeypatch.setattr(Learner, "forward", lambda s, e, *rest: calls.append(len(e)) or forward(s, e, *rest))
    found = {}
    for micro in (None, 1, 3):
        trainer.options = replace(trainer.options, micro_batch_size=micro)
        monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", 10**6 if micro is None else 1)
        calls.clear()
        found[micro] = step_of(trainer, e), len(calls)
    parts = len(trainer.learner.parts)
    assert found[None][1] == parts and found[1][1] > 2 * parts
    assert_close(found[1][0], found[None][0])
    assert_close(found[3][0], found[None][0])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_padding_changes_nothing(name):
    trainer, e = off_policy(name)
    wider = Experience.of({key: padded(t, t.shape[1] + 3) if t.ndim > 1 else t for key, t in e.tensors().items()})
    assert wider.sequence.shape[1] == e.sequence.shape[1] + 3
    losses, gradients = [], []
    for one in (e, wider):
        loss, _ = trainer.learner(trainer.algorithm.target(one), 1.0)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, parameters(trainer), allow_unused=True)
        gradients.append([torch.zeros(()) if g is None else g for g in grads])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-5)
    assert_close(gradients[1], gradients[0])


def test_dapo_replaces_refused_groups():
    """Of four prompts two score the same whatever is answered: others are drawn in their place."""
    rounds = []
    for seed in range(4):
        count = 0

        def reward(prompts, responses):
            nonlocal count
            scores = []
            for prompt in prompts:
                scores.append(0.0 if int(prompt[0]) in (2, 6) else float(count % 2))
                count += 1
            return scores

        trainer = build("dapo", reward=reward, seed=seed, samples_per_prompt=2)
        trainer.prompts = Prompts(PROMPTS)
        e = trainer.roll_out(2, 8, ROLL)
        assert len(e) == 4 and trainer.algorithm.keep(e).all()
        assert set(e.sequence[:, 0].tolist()) <= {8, 9} and len(e.group_ids.unique()) == 2
        rounds.append(count // 4)
    assert max(rounds) > 1
    seen = []
    trainer = build("dapo", reward=lambda p, r: seen.extend(r) or [1.0] * len(r), samples_per_prompt=2)
    e = trainer.roll_out(2, 8, ROLL)
    assert len(e) == 0
    assert len(seen) == 4 * trainer.algorithm.sampling_rounds == 16
    before = [p.detach().clone() for p in trainer.actor_critic.actor_parameters()]
    row = trainer.train(1, 2, 2, 8, 8).history[0]  # nothing is learned, and what was seen is logged
    assert row["reward"] == 1.0 and "policy_loss" not in row
    assert all(map(torch.equal, before, trainer.actor_critic.actor_parameters()))


def test_dapo_refuses_by_what_the_reward_gave():
    """Where all answers are right, penalties alone tell them apart: eq. 11 is of what is right."""
    trainer = build("dapo", reward=lambda prompts, responses: [1.0] * len(responses))
    options = replace(ROLL, missing_eos_penalty=0.5, overlong_buffer=6)
    e = trainer._roll_out(3, replace(options, max_batch=8))
    assert len(e.scores.unique()) > 1 and (e.raw_scores == 1).all()
    assert not trainer.algorithm.keep(e).any()
    assert trainer.algorithm.keep(replace(e, raw_scores=e.scores)).any()
    assert len(trainer.roll_out(3, 8, options)) == 0
    assert trainer._roll_out(3, replace(ROLL, max_batch=8)).raw_scores is None


def test_kl_stop_serves_every_algorithm():
    for name in ("tpo", "flowrl", "score_centering"):
        trainer = build(name, lr=1e-1, learn={"epochs": 20, "kl_stop": 1e-4})
        steps = []
        taken = trainer._take_step
        trainer._take_step = lambda *a, taken=taken, steps=steps: (steps.append(1), taken(*a))[1]
        trainer.train(8, **TRAIN)
        assert 0 < len(steps) < 20


# (b) TPO


def test_tpo_has_the_gradient_p_less_q():
    tpo = TPO(samples_per_prompt=3, eta=0.5)
    e = grouped([0.0, 1.0, 2.0], (3, 1, 4))
    target = tpo.target(e)
    moved = e.log_probs + 0.3 * torch.randn(e.log_probs.shape) * e.response_mask
    u = tensor(-1.0, 0.0, 1.0) * math.sqrt(1.5)  # population variance 2 / 3
    torch.testing.assert_close(z_scores(e.scores[None])[0], u)
    q = e.log_probs.sum(-1).softmax(-1) * (u / 0.5).exp()
    q, p = q / q.sum(), moved.sum(-1).softmax(-1)
    torch.testing.assert_close(target.extra["tpo_target"], q)
    found = gradient(tpo, target, moved)
    for row, mask, expected in zip(found, e.response_mask, p - q, strict=True):
        torch.testing.assert_close(row[mask], expected.expand(int(mask.sum())))
    numbers = tpo.loss(policy_of(moved), target)[1]
    torch.testing.assert_close(numbers["kl_to_target"], (q * (q / p).log()).sum().expand(3))  # KL(q || p) of the group


def test_losses_are_logged_as_they_count_and_groups_by_sequence():
    """Lengths differ: means over tokens would be other numbers."""
    trainer, e = off_policy("tpo")
    e = trainer.algorithm.target(e)
    policy = trainer.actor_critic.log_probs(e.sequence, e.response_mask)
    losses, numbers = trainer.algorithm.loss(policy, e)
    row = trainer._take_step(e, 1.0)
    assert (
        row["kl_to_target"] == pytest.approx(float(numbers["kl_to_target"].detach().mean()), abs=1e-5)
        and row["kl_to_target"] > 0
    )
    assert row["policy_loss"] == pytest.approx(float(losses.detach().mean()), abs=1e-5)
    assert row["entropy"] == pytest.approx(float(policy.entropy.detach()[e.response_mask].mean()), abs=1e-5)
    trainer, e = off_policy("grpo", kl=0.0)
    e = trainer.algorithm.target(e)
    policy = trainer.actor_critic.log_probs(e.sequence, e.response_mask)
    loss = (trainer.algorithm.loss(policy, e)[0] * ops.token_shares(e.response_mask, "sequence")).sum()
    assert trainer._take_step(e, 1.0)["policy_loss"] == pytest.approx(float(loss.detach()), abs=1e-5)


def test_tpo_counts_prompts_the_same_and_learns_nothing_from_a_flat_one():
    tpo = TPO(samples_per_prompt=2)
    e = tpo.target(grouped([1.0, 1.0, 0.0, 1.0], group_ids=[0, 0, 1, 1]))
    found = gradient(tpo, e)
    assert found[:2].abs().max() < 1e-6 < found[2:].abs().max()
    p = e.log_probs[2:].sum(-1).softmax(-1)
    assert found[2][e.response_mask[2]][0].item() == pytest.approx(float(p[0] - e.extra["tpo_target"][2]) / 2)


def test_tpo_keeps_groups_whole(monkeypatch):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", 1)
    trainer, e = off_policy("tpo")
    e = trainer.algorithm.target(e)
    for rows in e.parts(1, trainer.algorithm.whole_groups):
        assert (e.group_ids[rows].unique(return_counts=True)[1] == 4).all()
    assert len(e.parts(1, trainer.algorithm.whole_groups)) > 1


# (c) FlowRL


def bandit():
    """Three answers of one token; the starting policy is (0.5, 0.3, 0.2), rewards in standard deviations -1, 0, 1."""
    e = grouped([0.0, 1.0, 2.0], (1, 1, 1))
    start = tensor(0.5, 0.3, 0.2)
    flow = FlowRL(4, beta=1.0, z_hidden=4, samples_per_prompt=3)
    ref = torch.zeros_like(e.log_probs)
    ref[e.response_mask] = start.log()
    e = replace(e, ref_log_probs=ref).with_extra(prompt_state=torch.randn(1, 1, 4).expand(3, 1, 4))
    weight = start * tensor(-1.0, 0.0, 1.0).exp()  # pi = ref e^R / Z
    best = torch.zeros_like(e.log_probs)
    best[e.response_mask] = (weight / weight.sum()).log()
    return flow, replace(flow.target(e), log_probs=best), best, weight.sum().log()


def test_flowrl_is_at_rest_at_its_optimum():
    flow, e, best, log_z = bandit()
    assert reduced(flow, best, e).item() == pytest.approx(float(log_z) ** 2, rel=1e-3)  # its own starts at 0
    with torch.no_grad():
        flow.partition_function.layers[-1].bias.fill_(log_z)
    assert reduced(flow, best, e).item() < 1e-10
    assert gradient(flow, e, best).abs().max() < 1e-5
    # one log-prob higher by 0.1: the residual is 0.1, w = e^0.1, a mean of three
    off = best.clone()
    off[0, 2] += 0.1
    assert reduced(flow, off, e).item() == pytest.approx(math.exp(0.1) * 0.01 / 3, rel=1e-3)
    off[0, 2] += 0.4  # the weight is clipped at 1.2
    assert reduced(flow, off, e).item() == pytest.approx(1.2 * 0.25 / 3, rel=1e-3)


def test_what_log_z_reads_does_not_learn():
    trainer = build("flowrl")
    e = trainer.roll_out(4, 8, ROLL)
    state = e.extra["prompt_state"]
    assert state.shape == (16, 1, 16) and not state.requires_grad
    row = e.sequence[5][e.prompt_mask[5]]
    with torch.no_grad():
        alone = trainer.palm(row[None], return_only_embedding=True, finetune_scope="actor").mean(1)
    torch.testing.assert_close(state[5], alone, atol=1e-5, rtol=1e-4)
    e = trainer.algorithm.target(e)
    policy = trainer.actor_critic.log_probs(e.sequence, e.response_mask)
    _, numbers = trainer.algorithm.loss(policy, e)
    numbers["log_z"].sum().backward()
    assert all(p.grad is None for p in trainer.actor_critic.actor_parameters())
    assert trainer.algorithm.partition_function.layers[-1].bias.grad.item() == 16


def test_log_z_is_saved(tmp_path):
    trainer = build("flowrl").train(8, **TRAIN)
    trainer.save(tmp_path / "checkpoint.pt")
    again = build("flowrl").load(tmp_path / "checkpoint.pt")
    ours, theirs = (t.algorithm.partition_function.state_dict() for t in (again, trainer))
    assert ours and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert theirs["layers.6.weight"].abs().sum() > 0


# (f) an algorithm of one's own


@pytest.fixture(scope="module")
def own():
    """What the example of docs/design.md defines and trains, run as it stands there."""
    ((_, code),) = code_blocks((Path(__file__).parent.parent / "docs" / "design.md").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    namespace = {"__name__": "design"}
    exec(code, namespace)
    return namespace


def test_the_algorithm_of_the_design_document_learns(own):
    rewards = [row["reward"] for row in own["trainer"].history]
    assert len(rewards) == 10 and rewards[0] < 0.3 and rewards[-1] > 0.9
    assert all(math.isfinite(row["policy_loss"]) for row in own["trainer"].history)


def test_what_is_not_worth_it_is_not_learned_from(own):
    class Choosy(own["Reinforce"]):
        def keep(self, experience):
            return experience.group_ids == experience.group_ids[0]

    trainer = build("", algorithm=Choosy(actor_optim={"lr": 1e-2}))
    e = trainer.roll_out(3, 8, ROLL)
    assert len(e) == 4 and len(e.group_ids.unique()) == 1
    assert trainer.sampled["reward"] != float(e.scores.mean())  # which is of all that sampled
    assert trainer.learn(e)["reward"] == float(e.scores.mean())
    seen = []
    count_all = trainer.scorer.rewards[""][0]
    trainer.scorer.rewards[""] = (lambda p, r: seen.extend(count_all(p, r)) or seen[-len(r) :], 1.0)
    row = trainer.train(1, 3, 3, 8, 8).history[0]
    assert row["reward"] == pytest.approx(sum(seen) / 12) and "policy_loss" in row


def test_an_algorithm_must_say_what_it_learns():
    with pytest.raises(NotImplementedError, match=r"Algorithm needs a target\(experience\)"):
        Algorithm().target(None)
    with pytest.raises(NotImplementedError, match=r"Algorithm needs a loss\(policy, experience\)"):
        Algorithm().loss(None, None)


@pytest.mark.parametrize("name", ["grpo", "tpo", "flowrl"])
def test_nothing_goes_backward_through_an_entropy_without_weight(name):
    """Its gradient would be 0, and cost a pass over the vocabulary."""
    for weight in (0.0, 0.1):
        e = replace(made_up((3, 2), (1, 1)), group_ids=torch.zeros(2, dtype=torch.long))
        options = {"samples_per_prompt": 2, "entropy": weight}
        algorithm = algorithm_class(name)(*([4] if name == "flowrl" else []), **options)
        e = algorithm.target(e.with_extra(prompt_state=torch.ones(2, 1, 4)))
        entropy = torch.rand(e.sequence.shape, requires_grad=True)
        policy = PolicyOutput(e.log_probs.clone().requires_grad_(), entropy, None)
        losses, _ = algorithm.loss(policy, e)
        (gradient,) = torch.autograd.grad(losses.sum(), entropy, allow_unused=True)
        assert (gradient is None) == (weight == 0)
