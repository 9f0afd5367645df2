"""Several rewards by name, and the penalty of length."""

from dataclasses import replace

import pytest
import torch
from tiny import (
    EOS,
    LENGTHS,
    ROLL,
    TRAIN,
    count_even,
    rolled,
    shake,
    tiny_actor_critic,
    tiny_palm,
    tiny_trainer,
)

from palm_rlhf_pytorch import RewardModel
from palm_rlhf_pytorch.rollout import RolloutOptions, Scorer, soft_overlong_punishment


def length(prompts, responses):
    return [float(len(response)) for response in responses]


def reward_model():
    model = RewardModel(tiny_palm(3))
    shake(model.finetune_parameters())
    return model


def test_scores_are_the_weighted_sum():
    model = reward_model()
    several = {"even": count_even, "length": (length, -0.5), "model": (model, 2)}
    e = rolled(tiny_actor_critic(), several)
    found = {name: e.extra[f"reward/{name}"] for name in several}
    assert all(t.shape == (len(e),) and t.dtype == torch.float32 for t in found.values())
    assert torch.equal(found["length"], e.lengths.float())
    assert torch.equal(found["even"], ((e.sequence % 2 == 0) & e.response_mask).sum(dim=-1).float())
    torch.testing.assert_close(found["model"], model.score(e.sequence, e.prompt_mask, e.mask), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(e.scores, found["even"] - 0.5 * found["length"] + 2 * found["model"])
    torch.testing.assert_close(Scorer(several)(e), e.scores)


def test_a_reward_alone_has_no_components():
    assert rolled(tiny_actor_critic()).extra == {}


def test_components_are_without_penalties():
    fined = rolled(tiny_actor_critic(), {"even": count_even}, replace(ROLL, missing_eos_penalty=5.0))
    assert not fined.finished.all()
    torch.testing.assert_close(fined.scores, fined.extra["reward/even"] - 5.0 * ~fined.finished)


def test_texts_are_made_once_for_all():
    class Letters:
        calls = 0

        def decode(self, ids):
            Letters.calls += 1
            return "".join(chr(97 + i) for i in ids)

    e = rolled(tiny_actor_critic())
    Scorer({"a": lambda p, r: [len(t) for t in r], "b": lambda p, r: [0] * len(r)}, Letters())(e)
    assert Letters.calls == 2 * len(e)


def test_the_row_has_the_mean_of_each():
    model = reward_model().train()
    trainer = tiny_trainer(reward_model={"even": (count_even, 2.0), "length": (length, -1.0), "model": (model, 0.0)})
    assert not model.training
    row = trainer.train(8, **TRAIN).history[0]
    assert row["reward"] == pytest.approx(2 * row["reward/even"] - row["reward/length"], abs=1e-5)
    assert row["reward/length"] == pytest.approx(row["response_length"]) and "reward/model" in row


@pytest.mark.parametrize(
    "reward, error, sentence",
    [
        ({}, ValueError, "must hold at least one, got none"),
        ({"a": (count_even, "2")}, TypeError, "the weight of the reward 'a' must be a finite number, got '2'"),
        ({"a": (count_even, True)}, TypeError, "must be a finite number, got True"),
        ({"a": (count_even, float("nan"))}, TypeError, "must be a finite number, got nan"),
        ({"a": 3}, TypeError, "the reward 'a' must be a RewardModel or a function, got int"),
        ({"a": (count_even, 1, 2)}, ValueError, "a pair .reward, weight., got 3 values"),
        ({3: count_even}, TypeError, "named by text, got 3"),
    ],
)
def test_mappings_that_are_refused(reward, error, sentence):
    with pytest.raises(error, match=sentence):
        tiny_trainer(reward_model=reward)


def test_what_a_component_may_not_return():
    with pytest.raises(ValueError, match="the reward 'b' must return one number for each of 8 responses"):
        rolled(tiny_actor_critic(), {"a": count_even, "b": lambda p, r: [1.0]})


def test_a_component_of_fewer_tokens_is_refused():
    with pytest.raises(ValueError, match="the reward model knows 5 tokens"):
        tiny_trainer(reward_model={"a": count_even, "b": RewardModel(tiny_palm(num_tokens=5))})


# the penalty of length


def test_soft_overlong_punishment_by_hand():
    """DAPO's own setting: 20480 tokens, of which 4096 are the buffer."""
    lengths = torch.tensor([1, 16384, 17408, 18432, 20480, 20481])
    found = soft_overlong_punishment(lengths, torch.tensor(20480), 4096)
    assert found.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_the_limit_of_a_row_is_what_its_prompt_leaves():
    options = RolloutOptions(max_seq_len=9, eos_token=EOS, overlong_buffer=2, overlong_penalty=3.0)
    plain, fined = (rolled(tiny_actor_critic(), options=o) for o in (ROLL, options))
    assert torch.equal(plain.sequence, fined.sequence)
    expected = []
    for prompt, response in zip(LENGTHS.repeat(2).tolist(), plain.lengths.tolist(), strict=True):
        start = 9 - prompt - 2
        expected.append(0.0 if response <= start else 3.0 * (start - response) / 2)
    assert {0.0, -3.0} <= set(expected)
    torch.testing.assert_close(fined.scores - plain.scores, torch.tensor(expected))


def test_a_prompt_that_leaves_less_than_the_buffer():
    """One token is drawn all the same: its length is the limit."""
    options = RolloutOptions(max_seq_len=5, overlong_buffer=4)
    e = rolled(tiny_actor_critic(), lambda p, r: [0.0] * len(p), options)
    assert e.scores[0] == -1 and e.lengths[0] == 1


def test_the_trainer_passes_it_on():
    trainer = tiny_trainer(reward_model=lambda p, r: [0.0] * len(p), overlong_buffer=8, overlong_penalty=2.0)
    kept = []
    inner, trainer.learn = trainer.learn, lambda e, t: (kept.append(e), inner(e, t))[1]
    trainer.train(8, **TRAIN)
    limits = TRAIN["max_seq_len"] - kept[0].prompt_mask.sum(-1)
    expected = 2 * soft_overlong_punishment(kept[0].lengths, limits, 8)
    assert (expected < 0).any() and torch.equal(kept[0].scores, expected)


def test_a_buffer_below_0_is_refused():
    with pytest.raises(ValueError, match="overlong_buffer is a number of tokens"):
        tiny_trainer(overlong_buffer=-1)
