from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import EOS, LENGTHS, PROMPTS, ROLL, count_even, rolled, shake, tiny_actor_critic, tiny_palm

from palm_rlhf_pytorch import ActorCritic, RewardModel, ops
from palm_rlhf_pytorch.generation import Generation
from palm_rlhf_pytorch.ops import lengths_to_mask
from palm_rlhf_pytorch.rollout import RolloutOptions, Scorer, ends_with_eos, roll_out
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

SEQUENCE = torch.tensor([[5, 6, 7, 1], [8, 9, 0, 0]])
PROMPT_MASK = torch.tensor([[True, True, False, False], [True, False, False, False]])
RESPONSE_MASK = torch.tensor([[False, False, True, True], [False, True, False, False]])
GENERATED = Generation(SEQUENCE, PROMPT_MASK, RESPONSE_MASK)


def test_a_callable_over_tokens_sees_prompts_and_responses():
    seen = []

    def reward(prompts, responses):
        seen.extend([[p.tolist() for p in prompts], [r.tolist() for r in responses]])
        return [1, 2]

    scores = Scorer(reward)(GENERATED)
    assert seen == [[[5, 6], [8]], [[7, 1], [9]]]
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 2.0]


def test_a_callable_over_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer(["hello", "a"])
    sequence = torch.cat((ids[:, :1], ids[:, 1:], torch.tensor([[tokenizer.eos_id], [0]])), dim=1)
    prompt_mask = torch.arange(6).expand(2, 6) < torch.tensor([[2], [1]])
    response_mask = lengths_to_mask(torch.tensor([6, 1]), 6) & ~prompt_mask
    generated = Generation(sequence, prompt_mask, response_mask)
    seen = []
    scorer = Scorer(lambda p, r: seen.extend([p, r]) or [0.0, 0.0], tokenizer)
    scorer(generated)
    assert seen == [["he", "a"], ["llo", ""]]
    over_tokens = Scorer(lambda p, r: [float(len(x)) for x in r], tokenizer, over="tokens")
    assert over_tokens(generated).tolist() == [4.0, 0.0]


@pytest.mark.parametrize(
    "returned",
    [[1.0, 2.0], (1, 2), torch.tensor([1.0, 2.0], requires_grad=True), np.array([1.0, 2.0]), torch.tensor([1, 2])],
)
def test_what_a_reward_may_return(returned):
    scores = Scorer(lambda p, r: returned)(GENERATED)
    assert scores.tolist() == [1.0, 2.0] and scores.dtype == torch.float32 and not scores.requires_grad


@pytest.mark.parametrize(
    "returned, error, sentence",
    [
        ([1.0], ValueError, "one number for each of 2 responses, got shape"),
        ([[1.0], [2.0]], ValueError, r"got shape \(2, 1\)"),
        (1.0, ValueError, r"got shape \(\)"),
        ([1.0, float("nan")], ValueError, "not finite"),
        ([1.0, float("inf")], ValueError, "not finite"),
        (None, TypeError, "got a NoneType"),
        ([[1.0], [2.0, 3.0]], TypeError, "got a list"),
        (["good", "bad"], TypeError, "got a list"),
    ],
)
def test_what_a_reward_may_not_return(returned, error, sentence):
    with pytest.raises(error, match=sentence):
        Scorer(lambda p, r: returned)(GENERATED)


def test_reward_over():
    with pytest.raises(ValueError, match="got 'words'"):
        Scorer(count_even, over="words")
    with pytest.raises(ValueError, match="needs a tokenizer with a decode method"):
        Scorer(count_even, over="text")
    with pytest.raises(ValueError, match=r"names \['y'\], but there are functions \['x'\]"):
        Scorer({"x": count_even}, over={"y": "tokens"})
    with pytest.raises(ValueError, match="no names: give the rewards as"):
        Scorer(count_even, over={"y": "tokens"})
    model = RewardModel(tiny_palm(3, causal=False), num_binned_output=5)
    with pytest.raises(
        ValueError, match=r"names \['m'\], but there are functions \['x'\]"
    ):  # a model reads what it reads
        Scorer({"x": count_even, "m": model}, over={"m": "tokens"})
    with pytest.raises(ValueError, match="got 'words'"):
        Scorer(model, over="words")
    with pytest.raises(ValueError, match="needs a tokenizer with a decode method"):
        Scorer({"x": count_even, "y": count_even}, over={"y": "text"})


def test_rewards_over_text_and_over_tokens_at_once():
    seen = {}

    def keeps(name):
        return lambda prompts, responses: seen.update({name: (prompts, responses)}) or [1.0, 2.0]

    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("a") + i) for i in ids)

    rewards = {"written": keeps("written"), "spoken": (keeps("spoken"), 2.0), "counted": (keeps("counted"), -1.0)}
    scores = Scorer(rewards, Letters(), over={"counted": "tokens", "spoken": None})(GENERATED)
    assert scores.tolist() == [2.0, 4.0]
    assert seen["written"] == seen["spoken"] == (["fg", "i"], ["hb", "j"])
    assert [[row.tolist() for row in rows] for rows in seen["counted"]] == [[[5, 6], [8]], [[7, 1], [9]]]
    assert seen["counted"][0][0].untyped_storage().nbytes() == 2 * 8  # its own: no batch goes with it


def test_a_reward_model_scores_response_tokens():
    reward = RewardModel(tiny_palm(3, causal=False), num_binned_output=5)
    shake(reward.finetune_parameters())
    scores = Scorer(reward)(GENERATED)
    torch.testing.assert_close(scores, reward.score(SEQUENCE, PROMPT_MASK, PROMPT_MASK | RESPONSE_MASK))
    alone = Generation(SEQUENCE[1:, :2], PROMPT_MASK[1:, :2], RESPONSE_MASK[1:, :2])
    torch.testing.assert_close(Scorer(reward)(alone), scores[1:])
    assert 0 <= scores.min() and scores.max() <= 4


def test_ends_with_eos():
    mask = PROMPT_MASK | RESPONSE_MASK
    assert ends_with_eos(SEQUENCE, mask, 1).tolist() == [True, False]
    assert ends_with_eos(SEQUENCE, mask, (1, 9)).tolist() == [True, True]
    assert ends_with_eos(SEQUENCE, mask, 0).tolist() == [False, False]  # padding is no EOS
    assert ends_with_eos(SEQUENCE, mask, None).tolist() == [False, False]


def test_what_is_recorded():
    actor_critic = tiny_actor_critic()
    e = rolled(actor_critic, options=replace(ROLL, temperature=0.7))
    assert torch.equal(e.prompt_mask.sum(-1), LENGTHS.repeat(2))
    for row, prompt, length in zip(e.sequence, PROMPTS.repeat(2, 1), LENGTHS.repeat(2), strict=True):
        assert torch.equal(row[:length], prompt[:length])
    assert not (e.prompt_mask & e.response_mask).any() and (e.lengths >= 1).all()
    policy = actor_critic.log_probs(e.sequence, e.response_mask, 0.7).log_probs
    torch.testing.assert_close(e.log_probs, policy)  # those of sampling are those of learning
    reference = actor_critic.reference_log_probs(e.sequence, e.response_mask, 0.7)
    torch.testing.assert_close(e.ref_log_probs, reference)
    assert not torch.allclose(e.log_probs, e.ref_log_probs)
    assert e.scores.tolist() == count_even(None, [s[m] for s, m in zip(e.sequence, e.response_mask, strict=True)])


def test_rows_answer_as_they_would_alone():
    """Greedy, so that no noise is shared: batches and padding change nothing."""
    actor_critic = tiny_actor_critic()
    options = replace(ROLL, temperature=1e-4)
    together = rolled(actor_critic, options=options, times=1)
    for i in range(4):
        alone = roll_out(
            actor_critic,
            Scorer(count_even),
            PROMPTS[i : i + 1, : LENGTHS[i]],
            LENGTHS[i : i + 1],
            torch.zeros(1, dtype=torch.long),
            options,
        )
        row = together[i : i + 1]
        assert torch.equal(alone.sequence, row.sequence) and torch.equal(alone.response_mask, row.response_mask)
        assert alone.scores == row.scores


def test_the_policy_comes_back_as_it_was():
    actor_critic = tiny_actor_critic()
    before = [p.clone() for p in actor_critic.parameters()]
    rolled(actor_critic)
    assert all(torch.equal(p, q) for p, q in zip(before, actor_critic.parameters(), strict=True))


def test_seeds_reproduce():
    actor_critic = tiny_actor_critic()
    one, two, other = (rolled(actor_critic, seed=seed).sequence for seed in (1, 1, 2))
    assert torch.equal(one, two) and not (one.shape == other.shape and torch.equal(one, other))


def test_max_seq_len_counts_the_prompt_and_one_token_is_always_drawn():
    e = rolled(tiny_actor_critic(), options=RolloutOptions(max_seq_len=4))
    assert torch.equal(e.lengths, (4 - LENGTHS.repeat(2)).clamp(min=1))
    assert not e.finished.any()


def test_several_eos():
    e = rolled(tiny_actor_critic(), options=replace(ROLL, eos_token=(EOS, 4)), times=6)
    last = (e.prompt_mask | e.response_mask).sum(-1) - 1
    ends = e.sequence[torch.arange(len(e)), last]
    assert torch.equal(e.finished, (ends == EOS) | (ends == 4)) and {1, 4} <= set(ends[e.finished].tolist())


# log-probs of sampling, or of a forward pass


@pytest.fixture
def forwards(monkeypatch) -> list[str]:
    """Which forward passes over whole sequences the log-probs took."""
    seen = []
    for name in ("log_probs", "reference_log_probs"):
        whole = getattr(ActorCritic, name)
        monkeypatch.setattr(ActorCritic, name, lambda *args, w=whole, n=name: seen.append(n) or w(*args))
    return seen


@pytest.mark.parametrize("max_batch", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_of_sampling_are_kept(forwards, temperature, max_batch):
    actor_critic = tiny_actor_critic()
    e = rolled(actor_critic, options=replace(ROLL, temperature=temperature, max_batch=max_batch))
    assert forwards == ["reference_log_probs"]
    expected = actor_critic.log_probs(e.sequence, e.response_mask, temperature).log_probs
    torch.testing.assert_close(e.log_probs, expected, atol=1e-5, rtol=1e-5)
    assert (e.log_probs[e.response_mask] < 0).all() and (e.log_probs[~e.response_mask] == 0).all()


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_in_reduced_precision_they_are_those_of_learning(forwards, precision):
    actor_critic = tiny_actor_critic()
    actor_critic = actor_critic.bfloat16() if precision == "bfloat16" else actor_critic
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        e = rolled(actor_critic, options=replace(ROLL, temperature=0.7))
        assert forwards == ["log_probs", "reference_log_probs"]
        expected = actor_critic.log_probs(e.sequence, e.response_mask, 0.7).log_probs
    assert torch.equal(e.log_probs, expected) and e.log_probs.dtype == torch.float32
    assert (e.log_probs[e.response_mask] < 0).all()


def test_a_reference_that_nobody_wants_is_not_computed(forwards):
    actor_critic = tiny_actor_critic()
    scopes = []
    actor_critic.actor_palm.register_forward_pre_hook(
        lambda _, args, kwargs: scopes.append(kwargs.get("finetune_scope")) if "cache" not in kwargs else None,
        with_kwargs=True,
    )
    e = rolled(actor_critic, options=replace(ROLL, reference=False))
    assert e.ref_log_probs is None and e.kl is None and not forwards and not scopes
    assert rolled(actor_critic).ref_log_probs is not None and scopes == [None]


# rows of like length are judged together


RAGGED = torch.tensor([200, 9, 12, 195, 60, 61, 7, 59, 199, 11, 8, 61, 9, 10, 11, 12, 8, 9, 11, 12, 12, 11])


def ragged_rollout(actor_critic, reward, judge=lambda e: e, **options):
    """One token is drawn after each of these prompts."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(2, 11, (len(RAGGED), 200), generator=generator)
    groups, options = torch.arange(len(RAGGED)), RolloutOptions(max_seq_len=4, **options)
    return roll_out(actor_critic, Scorer(reward), prompts, RAGGED, groups, options, generator, judge)


def tiny_reward_model():
    reward = RewardModel(tiny_palm(3, causal=False), num_binned_output=5)
    shake(reward.finetune_parameters())
    return reward


def test_little_of_what_is_judged_is_padding():
    actor_critic, reward = tiny_actor_critic(), tiny_reward_model()
    seen = {"reference": [], "judge": [], "reward": []}

    def count(name):
        return lambda _, args, kwargs: None if "cache" in kwargs else seen[name].append(args[0].numel())

    actor_critic.actor_palm.register_forward_pre_hook(count("reference"), with_kwargs=True)
    reward.palm.register_forward_pre_hook(count("reward"), with_kwargs=True)
    ragged_rollout(actor_critic, reward, lambda part: seen["judge"].append(part.sequence.numel()) or part)
    real, whole = int((RAGGED + 1).sum()), len(RAGGED) * 201
    for name, positions in seen.items():
        assert real <= sum(positions) <= 1.1 * real < 0.5 * whole and 1 < len(positions) < 6, name


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_no_more_than_some_rows_tokens_are_judged_at_once(rows):
    sizes = []
    actor_critic, reward = tiny_actor_critic(), tiny_reward_model()
    reward.palm.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    together = ragged_rollout(actor_critic, reward)
    sizes.clear()
    e = ragged_rollout(actor_critic, reward, lambda p: sizes.append(p.sequence.numel()) or p, rows_at_once=rows)
    assert 201 <= max(sizes) <= rows * 201 and sum(sizes) <= 2.3 * int((RAGGED + 1).sum())
    for name, t in together.tensors().items():
        torch.testing.assert_close(getattr(e, name), t, msg=name)


@pytest.mark.parametrize("least", [1, 128])
def test_scores_do_not_depend_on_how_many_are_read_at_once(monkeypatch, least):
    monkeypatch.setitem(ops.LEAST_TOKENS, "cpu", least)
    reward = tiny_reward_model()
    e = ragged_rollout(tiny_actor_critic(), reward)
    whole = reward.score(e.sequence, e.prompt_mask, e.mask)
    assert len(whole.unique()) == len(whole)
    for max_tokens in (None, 1, 200, 320, 10**6):
        torch.testing.assert_close(Scorer(reward)(e, max_tokens), whole, atol=1e-5, rtol=1e-5)


def test_a_function_gets_few_responses_at_once_in_order():
    seen = []

    def reward(prompts, responses):
        seen.append(len(responses))
        return [float(p.sum() + 100 * r.sum()) for p, r in zip(prompts, responses, strict=True)]

    e = rolled(tiny_actor_critic(), reward, replace(ROLL, max_batch=3))
    assert seen == [3, 3, 2]
    expected = (e.sequence * e.prompt_mask).sum(-1) + 100 * (e.sequence * e.response_mask).sum(-1)
    assert e.scores.tolist() == expected.tolist() == Scorer(reward)(e).tolist() and seen[3:] == [8]
    with pytest.raises(ValueError, match="each of 2 responses, got shape"):
        Scorer(lambda p, r: [0.0] * 3)(e, max_batch=3)


def test_an_unfinished_response_costs():
    free, fined = (rolled(tiny_actor_critic(), options=replace(ROLL, missing_eos_penalty=p)) for p in (0.0, 5.0))
    assert free.finished.any() and not free.finished.all()
    assert torch.equal(fined.scores, free.scores - 5 * ~free.finished)
