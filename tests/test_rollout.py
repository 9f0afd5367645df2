from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import EOS, LENGTHS, PROMPTS, ROLL, count_even, rolled, shake, tiny_actor_critic, tiny_palm

from palm_rlhf_pytorch import RewardModel
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
    with pytest.raises(ValueError, match="'text', 'tokens' or None to choose, got 'words'"):
        Scorer(count_even, over="words")
    with pytest.raises(ValueError, match="needs a tokenizer with a decode method"):
        Scorer(count_even, over="text")


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
    policy, _ = actor_critic.log_probs(e.sequence, e.response_mask, 0.7)
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
