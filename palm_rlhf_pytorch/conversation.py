"""Prompts with roles: messages of a system, a user and an assistant, which a model's chat template turns into ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str
    content: str


class Conversation(str):
    """A prompt with roles, accepted wherever a prompt is: `messages` up to the assistant's turn.

    As a str it is what functions of text see: one user's message is its content; anything longer a transcript of
    "role:" lines and contents that ends with "assistant:". Only `batches.encode_prompt` and `encode_response` look at
    the messages.
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Iterable[Any]) -> Conversation:
        messages = checked_messages(messages)
        if not messages or messages[-1].role != "user":
            came = f"one of the {messages[-1].role}" if messages else "none"
            raise ValueError(f"expected a conversation whose last message before the answer is the user's, got {came}")
        self = super().__new__(cls, transcript(messages))
        self.messages = messages
        return self

    def __reduce__(self) -> tuple:
        return Conversation, (self.messages,)


def transcript(messages: tuple[Message, ...]) -> str:
    if len(messages) == 1:
        return messages[0].content
    return "".join(f"{role}:\n{content}\n\n" for role, content in messages) + "assistant:\n"


def checked_messages(values: Iterable[Any]) -> tuple[Message, ...]:
    """Messages of [{"role": ..., "content": ...}, ...] (or of `Message`s); what is wrong with one is said."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"expected a list of messages, got {type(values).__name__}")
    return tuple(_message(number, value) for number, value in enumerate(values, start=1))


def _message(number: int, value: Any) -> Message:
    if isinstance(value, Message):
        value = value._asdict()
    if not isinstance(value, Mapping) or not {"role", "content"} <= set(value):
        came = f"the keys {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(f"expected a role and a content in message {number}, got {came}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise ValueError(f"expected the role {', '.join(ROLES[:-1])} or {ROLES[-1]} in message {number}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"expected text in the {role}'s message {number}, got {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"expected text in the {role}'s message {number}, got an empty content")
    return Message(role, content)


def as_chat(prompt: str, chat: bool | None = None) -> str:
    """A prompt with `chat`: plain text becomes a user's message; without: a conversation becomes plain text; None: each
    stays what it is.
    """
    if chat is None or isinstance(prompt, Conversation) is chat:
        return prompt
    return Conversation([Message("user", prompt)]) if chat else str(prompt)


def as_json(prompt: str) -> str | list[dict[str, str]]:
    """What a prompt is in a record: text, or a list of messages."""
    return [message._asdict() for message in prompt.messages] if isinstance(prompt, Conversation) else prompt


def from_json(prompt: str | list[dict[str, str]]) -> str:
    """The inverse of `as_json`."""
    return prompt if isinstance(prompt, str) else Conversation(prompt)
