import math
import zlib
from collections import Counter
from itertools import pairwise

import pytest
import torch
from chat import assistant, chat_tokenizer, user

from palm_rlhf_pytorch import rejection
from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.data import Demonstration, read_demonstrations
from palm_rlhf_pytorch.rejection import Best, BestOfOptions, best_of_n, kl_bound, read_best, summary, write_best
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PROMPTS = ["the soup", "a", "so what", "the film"]


@pytest.fixture
def palm(make_palm):
    return make_palm(num_tokens=TOKENIZER.num_tokens)


class Recorder:
    """A reward (a number of each response's own) that remembers what it was asked."""

    def __init__(self):
        self.asked, self.sizes = [], []

    def __call__(self, prompts, responses):
        self.sizes.append(len(responses))
        scores = [zlib.crc32(r.encode()) % 1000 / 1000 for r in responses]
        self.asked += zip(prompts, responses, scores, strict=True)
        return scores


@pytest.mark.parametrize("windows", [1, 8])
def test_the_best_of_each_prompt_is_kept(palm, monkeypatch, capsys, windows):
    monkeypatch.setattr(rejection, "BATCHES_AT_ONCE", windows)
    reward, options = Recorder(), BestOfOptions(samples=3, rollout_batch=5, max_seq_len=12)
    found = best_of_n(palm, TOKENIZER, PROMPTS, reward, options)
    assert [b.prompt for b in found] == PROMPTS and len(reward.asked) == 12
    for b in found:
        mine = [(score, response) for prompt, response, score in reward.asked if prompt == b.prompt]
        assert len(mine) == 3
        top = max(score for score, _ in mine)
        assert b.score == pytest.approx(top) and (pytest.approx(top), b.response) in mine
        assert b.mean_score == pytest.approx(sum(score for score, _ in mine) / 3)
    assert max(reward.sizes) <= 5 and "best of 3: 100%" in capsys.readouterr().err
    again = best_of_n(palm, TOKENIZER, PROMPTS, Recorder(), options)
    assert again == found and best_of_n(palm, TOKENIZER, PROMPTS, Recorder(), options, seed=1) != found


def test_an_answer_may_end_in_several_ways(palm):
    class EndsAnywhere(ByteTokenizer):
        eos_ids = tuple(range(2, 259))

        def decode(self, ids):
            return str(len(ids))

    options = BestOfOptions(samples=2, max_seq_len=9)
    found = best_of_n(palm, EndsAnywhere(), ["a", "b"], lambda prompts, responses: [1.0] * len(responses), options)
    assert [(b.response, b.finished) for b in found] == [("1", True)] * 2  # one token, which ends it


def test_prompts_with_roles_are_answered_and_written(make_palm, tmp_path):
    tokenizer, talk = chat_tokenizer(), Conversation([user("a"), assistant("b"), user("c")])
    asked = []

    def reward(prompts, responses):
        asked.extend(prompts)
        return [1.0] * len(responses)

    options = BestOfOptions(samples=2, max_seq_len=24)
    found = best_of_n(make_palm(num_tokens=280), tokenizer, [talk, "plain"], reward, options)
    assert [getattr(prompt, "messages", None) for prompt in asked] == [talk.messages] * 2 + [None] * 2
    write_best(tmp_path / "best.jsonl", found)
    assert read_best(tmp_path / "best.jsonl") == found
    demonstrations = read_demonstrations(tmp_path / "best.jsonl")
    assert demonstrations == [Demonstration(b.prompt, b.response) for b in found]
    assert demonstrations[0].prompt.messages == talk.messages and type(demonstrations[1].prompt) is str


def test_unfinished_answers_pay(palm):
    options = BestOfOptions(samples=2, max_seq_len=4, missing_eos_penalty=5.0)  # room for few tokens: none finish
    found = best_of_n(palm, TOKENIZER, ["a", "b"], lambda prompts, responses: [1.0] * len(responses), options)
    assert [(b.score, b.mean_score, b.finished) for b in found] == [(-4.0, -4.0, False)] * 2


class Digits:
    """Eight tokens, each a digit; 0 pads and begins, 1 ends."""

    num_tokens, pad_id, bos_id, eos_id, eos_ids = 8, 0, 0, 1, (1,)

    def encode_start(self, text):
        return [int(digit) for digit in text]

    def decode(self, ids):
        return "".join(str(int(i)) for i in ids)


def test_the_best_comes_as_often_as_it_should(make_palm):
    palm, n, times = make_palm(num_tokens=8), 4, 600
    options = BestOfOptions(samples=n, max_seq_len=3)  # bos, the prompt's digit, and one more
    found = best_of_n(palm, Digits(), ["5"] * times, lambda prompts, responses: map_to_float(responses), options)
    policy = palm(torch.tensor([[0, 5]]))[0, -1].softmax(dim=-1).tolist()
    # scores differ, so P(best <= k) = P(answer <= k)^n
    at_most = [0.0, *torch.tensor(policy).double().cumsum(dim=0).tolist()]
    best = [high**n - low**n for low, high in pairwise(at_most)]
    counts = Counter(int(b.response) for b in found)
    chi_square = sum((counts[k] - times * p) ** 2 / (times * p) for k, p in enumerate(best))
    assert chi_square < 29.9  # 7 degrees of freedom: exceeded once in 10,000 times
    assert sum((counts[k] - times * p) ** 2 / (times * p) for k, p in enumerate(policy)) > 100  # not the policy's
    kl = sum(p * math.log(p / q) for p, q in zip(best, policy, strict=True))
    assert 0.3 < kl <= kl_bound(n)


def map_to_float(responses):
    return [float(response) for response in responses]


def test_kl_bound_by_hand():
    assert kl_bound(1) == 0
    assert kl_bound(4) == pytest.approx(1.386294 - 0.75)


def test_what_is_written_is_read(tmp_path):
    found = [Best("p\u2028", ' "é"\n', 1.5, 0.5, True), Best("q", "", -1.0, -2.0, False)]
    write_best(tmp_path / "run" / "best.jsonl", found)
    assert read_best(tmp_path / "run" / "best.jsonl") == found
    demonstrations = read_demonstrations(tmp_path / "run" / "best.jsonl")
    assert demonstrations == [Demonstration("p\u2028", ' "é"\n'), Demonstration("q", "")]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["best.jsonl"]
    assert summary(found, 4) == (
        "best of 4: mean score 0.250 (of all answers -0.750), at most 0.64 nats of KL, 50% finished"
    )


def test_a_reward_that_fails_leaves_no_file(tmp_path):
    class Broken(Best):
        def _asdict(self):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_best(tmp_path / "best.jsonl", [Best("p", "r", 1.0, 1.0, True), Broken("p", "r", 1.0, 1.0, True)])
    assert not list(tmp_path.iterdir())


def test_prompts_without_room_are_refused(palm):
    with pytest.raises(ValueError, match="longest prompt has 9 tokens, --max-seq-len 9 leaves no room"):
        best_of_n(palm, TOKENIZER, PROMPTS, Recorder(), BestOfOptions(max_seq_len=9))
