import pytest
import torch
from chat import chat_tokenizer, system, user

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.batches import encode_prompt
from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.text_reward import TextReward
from palm_rlhf_pytorch.tokenizer import ByteTokenizer

PROMPTS, RESPONSES = ["the coffee", "we"], [" was good.", " liked the very long film."]


def reward_model(seed: int, num_tokens: int = 259) -> RewardModel:
    torch.manual_seed(seed)
    model = RewardModel(PaLM(num_tokens=num_tokens, dim=16, depth=1, heads=2, dim_head=8), use_lora=False)
    with torch.no_grad():
        model.prompt_embed.normal_()
        model.response_embed.normal_()
    return model


def test_one_member_is_its_own_score():
    tokenizer, model = ByteTokenizer(), reward_model(0)
    ids, lengths = prompt_batch(tokenizer, [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)], "cpu")
    ids = torch.nn.functional.pad(ids, (0, 1))
    ids[torch.arange(2), lengths] = tokenizer.eos_id
    places = torch.arange(ids.shape[1])
    prompt_lengths = torch.tensor([1 + len(p) for p in PROMPTS])  # bos and the bytes
    expected = model.score(ids, places < prompt_lengths[:, None], places < lengths[:, None] + 1)
    assert torch.allclose(TextReward([(model, tokenizer)])(PROMPTS, RESPONSES), expected, atol=1e-5)


def test_several_members_are_averaged():
    members = [(reward_model(seed), ByteTokenizer()) for seed in (0, 1)]
    alone = [TextReward([member])(PROMPTS, RESPONSES) for member in members]
    assert not torch.allclose(*alone)
    assert torch.allclose(TextReward(members)(PROMPTS, RESPONSES), (alone[0] + alone[1]) / 2)


def test_whole_rates_prompt_and_response_as_one_text():
    reward = TextReward([(reward_model(0), ByteTokenizer())], whole=True)
    joined = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert torch.allclose(reward(PROMPTS, RESPONSES), reward(["", ""], joined))
    divided = TextReward(reward.members)
    assert not torch.allclose(divided(PROMPTS, RESPONSES), reward(PROMPTS, RESPONSES))


def test_no_member_is_refused():
    with pytest.raises(ValueError, match="at least one reward model"):
        TextReward([])


# prompts with roles

TALK = Conversation([system("be kind"), user("hi")])


def test_a_reward_reads_roles_by_its_own_template():
    tokenizer, model = chat_tokenizer(), reward_model(0, 280)
    reward = TextReward([(model, tokenizer)])
    ids = [*encode_prompt(tokenizer, TALK), *tokenizer.encode("yes"), tokenizer.eos_id]
    prompt_mask = torch.arange(len(ids))[None] < len(encode_prompt(tokenizer, TALK))
    expected = model.score(torch.tensor([ids]), prompt_mask)
    assert torch.allclose(reward([TALK], ["yes"]), expected, atol=1e-5)
    assert not torch.allclose(reward([str(TALK)], ["yes"]), expected)


def test_a_reward_without_roles_reads_text():
    talk, text = [TALK], [str(TALK)]
    for tokenizer, chat in ((ByteTokenizer(), None), (ByteTokenizer(), [False]), (chat_tokenizer(), [False])):
        reward = TextReward([(reward_model(0, 280), tokenizer)], chat=chat)
        assert torch.allclose(reward(talk, ["yes"]), reward(text, ["yes"]))
    members = [(reward_model(0, 280), ByteTokenizer()), (reward_model(1, 280), chat_tokenizer())]
    both = TextReward(members, chat=[False, True])(talk, ["yes"])
    alone = [TextReward([member])(talk, ["yes"]) for member in members]
    assert torch.allclose(both, (alone[0] + alone[1]) / 2)
