import pickle

import pytest
from chat import assistant, system, user

from palm_rlhf_pytorch.conversation import Conversation, Message, as_chat, as_json, checked_messages, from_json

LONG = [system("be brief"), user("hi"), assistant("hello"), user("bye")]


def test_one_message_of_the_user_is_its_text():
    conversation = Conversation([user("hi there")])
    assert conversation == "hi there" and isinstance(conversation, str)
    assert conversation.messages == (Message("user", "hi there"),)
    assert conversation + "!" == "hi there!" and type(conversation + "!") is str


def test_longer_ones_are_transcripts():
    expected = "system:\nbe brief\n\nuser:\nhi\n\nassistant:\nhello\n\nuser:\nbye\n\nassistant:\n"
    assert Conversation(LONG) == expected
    assert Conversation(Conversation(LONG).messages).messages == checked_messages(LONG)


def test_what_else_a_message_says_is_left_out():
    assert checked_messages([{"role": "user", "content": "a", "name": "x"}]) == (Message("user", "a"),)


def test_it_is_pickled_and_written_whole():
    conversation = Conversation(LONG)
    for again in (pickle.loads(pickle.dumps(conversation)), from_json(as_json(conversation))):
        assert again == conversation and again.messages == conversation.messages
    assert as_json(conversation) == LONG
    assert as_json("hi") == from_json("hi") == "hi" and not isinstance(from_json("hi"), Conversation)


def test_as_chat():
    plain, talk = "hi", Conversation(LONG)
    assert as_chat(plain) is plain and as_chat(talk) is talk
    assert as_chat(plain, True).messages == (Message("user", "hi"),) and as_chat(talk, True) is talk
    assert as_chat(plain, False) is plain
    assert as_chat(talk, False) == talk and type(as_chat(talk, False)) is str


@pytest.mark.parametrize(
    "messages, says",
    [
        ("hi", "expected a list of messages, got str"),
        ({"role": "user", "content": "a"}, "expected a list of messages, got dict"),
        (3, "expected a list of messages, got int"),
        ([], "last message before the answer is the user's, got none"),
        ([user("a"), assistant("b")], "is the user's, got one of the assistant"),
        ([user("a"), "b"], "expected a role and a content in message 2, got str"),
        ([{"from": "human", "value": "a"}], "in message 1, got the keys from, value"),
        ([{"role": "tool", "content": "a"}], "expected the role system, user or assistant in message 1, got 'tool'"),
        ([{"role": ["user"], "content": "a"}], r"or assistant in message 1, got \['user'\]"),
        ([system("a"), {"role": "user", "content": None}], "expected text in the user's message 2, got NoneType"),
        ([user(" \n")], "expected text in the user's message 1, got an empty content"),
    ],
)
def test_mistakes(messages, says):
    with pytest.raises(ValueError, match=says):
        Conversation(messages)
