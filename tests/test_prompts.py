import numpy as np
import pytest
import torch
from chat import assistant, chat_tokenizer, user
from tiny import PROMPTS, tiny_trainer

from palm_rlhf_pytorch import PaLM, RLHFTrainer
from palm_rlhf_pytorch.batches import encode_prompt
from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.prompts import Prompts, Remembered
from palm_rlhf_pytorch.tokenizer import ByteTokenizer


def letters(texts):
    """A tokenizer as the reference asks for: texts -> ids (b, n), 0 is padding."""
    n = max(map(len, texts))
    return torch.tensor([[ord(c) - ord("a") + 1 for c in text] + [0] * (n - len(text)) for text in texts])


def test_only_trailing_padding_is_taken_off():
    prompts = Prompts(torch.tensor([[0, 3, 0, 4, 0], [5, 0, 0, 0, 0], [1, 2, 3, 4, 5]]))
    assert prompts.lengths.tolist() == [4, 1, 5]
    ids, lengths = prompts.rows(torch.tensor([1, 0]))
    assert ids.tolist() == [[5, 0, 0, 0], [0, 3, 0, 4]] and lengths.tolist() == [1, 4]


def test_padding_of_another_id():
    prompts = Prompts(torch.tensor([[0, 3, -1], [2, -1, -1]]), pad_value=-1)
    assert prompts.lengths.tolist() == [2, 1]
    prompts.check(4)
    with pytest.raises(ValueError, match="prompt ids run from 0 to 3, but the vocabulary has ids 0 to 2"):
        prompts.check(3)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_prompts_of_any_lengths_are_laid_side_by_side(kind):
    prompts = Prompts([kind(prompt) for prompt in ([1, 2, 3], [4], [5, 9])], pad_value=9)
    assert prompts.ids.tolist() == [[1, 2, 3], [4, 9, 9], [5, 9, 9]] and prompts.lengths.tolist() == [3, 1, 1]
    trainer = tiny_trainer(prompt_token_ids=[kind([1, 2, 3]), kind([4])])
    assert trainer.prompts.lengths.tolist() == [3, 1]


def test_ids_of_any_integers_become_long():
    few = torch.tensor([5], dtype=torch.uint8)
    assert Prompts([few, torch.tensor([300, 2])], pad_value=256).ids.tolist() == [[5, 256], [300, 2]]
    assert Prompts(few[None]).ids.dtype == torch.long


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ([], ValueError, "the list is empty"),
        ([1, 2], ValueError, r"prompt 0 must be token ids \(n,\), got shape \(\)"),
        ([[1], torch.ones(1, 2).long()], ValueError, r"prompt 1 .* got shape \(1, 2\)"),
        (["ab"], TypeError, "prompt 0 must be a list or a tensor .* got str ab"),
        ([[1], [2**70]], TypeError, "prompt 1 .* got list .1180591620717411303424"),
        ([[5], [3.7, 2.0]], TypeError, "ids of prompt 1 must be integers, got torch.float32"),
        ([[True], [5]], TypeError, "ids of prompt 0 must be integers, got torch.bool"),
        ([[1, 2], []], ValueError, "prompt 1 is empty"),
        ([[], [1, 2]], ValueError, "prompt 0 is empty"),
        ({"input_ids": torch.ones(1, 2)}, TypeError, "a list of prompts, got a dict"),
        (torch.ones(1, 2), TypeError, "prompt ids must be integers, got torch.float32"),
    ],
)
def test_what_is_no_prompts_is_refused(ids, error, message):
    with pytest.raises(error, match=message):
        Prompts(ids)


@pytest.mark.parametrize("ids", [torch.zeros(3, 0), torch.ones(4).long(), torch.tensor([[1, 2], [0, 0]])])
def test_prompts_that_cannot_be_answered_are_refused(ids):
    with pytest.raises(ValueError, match="prompt"):
        Prompts(ids)


def test_three_sources_say_the_same(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"ab\r\n\nabc\n  \nd")
    by_text = Prompts.gather(["ab", "abc", "d"], None, None, letters)
    by_path = Prompts.gather(None, path, None, letters)
    by_ids = Prompts.gather(None, None, letters(["ab", "abc", "d"]), None)
    for prompts in (by_text, by_path, by_ids):
        assert prompts.ids.tolist() == [[1, 2, 0], [1, 2, 3], [4, 0, 0]] and prompts.lengths.tolist() == [2, 3, 1]


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\u2028still one\ntwo\x0cstill two\n", encoding="utf-8-sig")
    seen = []
    Prompts.gather(None, path, None, lambda texts: seen.extend(texts) or torch.ones(len(texts), 1).long())
    assert seen == ["one\u2028still one", "two\x0cstill two"]


def test_messages_are_prompts_too():
    tokenizer, talk = chat_tokenizer(), [user("a"), assistant("b"), user("c")]
    found = Prompts.gather([talk, "plain"], None, None, tokenizer)
    assert found.ids.tolist() == Prompts.gather([Conversation(talk), "plain"], None, None, tokenizer).ids.tolist()
    with pytest.raises(ValueError, match="expected a conversation whose last message before the answer is the user's"):
        Prompts.gather([talk[:2]], None, None, tokenizer)


def test_a_tokenizers_own_padding_is_padding():
    prompts = Prompts.gather(["abc", "d"], None, None, ByteTokenizer(), pad_value=7)
    assert prompts.pad_value == ByteTokenizer.pad_id and prompts.lengths.tolist() == [4, 2]


def test_texts_begin_as_those_of_pretraining_do():
    prompts = Prompts.gather(["abc", "d"], None, None, ByteTokenizer())
    tokenizer = ByteTokenizer()
    assert prompts.ids[1, :2].tolist() == encode_prompt(tokenizer, "d") == [tokenizer.bos_id, *tokenizer.encode("d")]


@pytest.mark.parametrize(
    "arguments",
    [
        (None, None, None, None),
        (["a"], "somewhere.txt", None, letters),
        (["a"], None, torch.ones(1, 1), letters),
        (None, "somewhere.txt", torch.ones(1, 1), None),
    ],
)
def test_exactly_one_source(arguments):
    with pytest.raises(ValueError, match="exactly one of prompts, prompts_path and prompt_token_ids"):
        Prompts.gather(*arguments)


def test_what_is_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match="there are no prompts"):
        Prompts.gather(None, empty, None, letters)
    with pytest.raises(ValueError, match="there are no prompts"):
        Prompts.gather([], None, None, letters)
    with pytest.raises(ValueError, match="need a tokenizer"):
        Prompts.gather(["a"], None, None, None)
    with pytest.raises(TypeError, match=r"goes in as \[text\]"):
        Prompts.gather("abc", None, None, letters)
    with pytest.raises(TypeError, match="the tokenizer must make token ids"):
        Prompts.gather(["ab", "c"], None, None, lambda texts: [[1, 2], [3]])
    with pytest.raises(TypeError, match="got a dict"):
        Prompts.gather(["ab", "c"], None, None, lambda texts: {"input_ids": [[1], [2]]})
    with pytest.raises(ValueError, match="from 2 prompts"):
        Prompts.gather(["ab", "c"], None, None, lambda texts: [[1, 2]])


def test_draws_see_every_prompt_before_any_again():
    prompts = Prompts(torch.arange(1, 8)[:, None])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([prompts.draw(count, generator) for count in (3, 5, 1, 12)])
    rounds = drawn.view(3, 7)
    assert (rounds.sort(dim=-1).values == torch.arange(7)).all()
    assert not torch.equal(rounds[0], rounds[1])
    again = Prompts(torch.arange(1, 8)[:, None]).draw(21, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_the_trainer_takes_text_and_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("abc\nd\n")
    for source in ({"prompts": ["abc", "d"]}, {"prompts_path": path}):
        trainer = tiny_trainer(tokenizer=letters, **source)
        assert trainer.prompts.lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="exactly one"):
        tiny_trainer(prompts=["abc"], prompt_token_ids=PROMPTS, tokenizer=letters)
    with pytest.raises(ValueError, match="prompt ids run from 1 to 26"):
        tiny_trainer(prompts=["az"], tokenizer=letters)


def test_prompts_are_remembered_with_their_roles():
    tokenizer = chat_tokenizer()
    talk = Conversation([user("a"), assistant("b"), user("c")])
    remembered = Remembered(tokenizer, [talk, "plain <b>"])
    assert remembered.decode(encode_prompt(tokenizer, talk)) is talk
    assert remembered.decode(encode_prompt(tokenizer, "plain <b>")) == "plain <b>"
    assert remembered.decode(tokenizer.encode("c") + [tokenizer.eos_id]) == "c"


def test_a_reward_sees_the_prompts_that_the_trainer_was_given():
    tokenizer, seen = chat_tokenizer(), []
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def reward(prompts, responses):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=8, depth=1, heads=1, dim_head=8)
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompts=[talk], tokenizer=tokenizer, critic_num_pred_bins=1)
    trainer.train(1, 2, 2, 2, 40)
    assert [message.content for message in seen[0].messages] == ["a", "b", "c"]
    assert isinstance(trainer.generate(40, prompt="plain", num_samples=2), torch.Tensor)
