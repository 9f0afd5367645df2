"""palm-rlhf generate: one completion, or a chat line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from palm_rlhf_pytorch.cli.common import MODEL, ModelUse, open_model, text_reward
from palm_rlhf_pytorch.conversation import Conversation, Message
from palm_rlhf_pytorch.devices import DEVICES, choose_device
from palm_rlhf_pytorch.evaluation import prompt_batch
from palm_rlhf_pytorch.flags import option, required
from palm_rlhf_pytorch.generation import repeat_prompts
from palm_rlhf_pytorch.palm import PaLM
from palm_rlhf_pytorch.text_reward import TextReward
from palm_rlhf_pytorch.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelUse):
    """What to complete, and how"""

    model: str = required(MODEL)
    prompt: str | None = option(None, "text to complete; without it each line typed is one (empty line or Ctrl-D ends)")
    reward: tuple[str, ...] = option(
        (), "reward runs: the best of --num-samples by their mean is shown, with its score"
    )
    whole_text: bool | None = option(
        None, "rate prompt and response as one text (default: where the reward was learned on texts alone)"
    )
    chat: bool | None = option(
        None, "the prompt is a user's message to the model's chat template (default: where the model has one)"
    )
    system: str | None = option(None, "a chat's first message, which says how to answer")
    remember: bool = option(False, "typed lines continue the conversation so far, instead of each standing alone")
    num_samples: int = option(1, "completions to draw", least=1)
    max_new_tokens: int = option(200, "tokens of a completion at most", least=1)
    temperature: float = option(1.0, "0 takes the likeliest token")
    top_k: int | None = option(None, "draw from that many of the likeliest tokens")
    top_p: float | None = option(None, "draw from the likeliest tokens of that probability together")
    seed: int | None = option(None, "seed (default: different every time)")
    device: str = option("auto", "where to compute; auto takes a GPU where there is one", choices=DEVICES)


def pieces(palm: PaLM, tokenizer: Tokenizer, prompt: str, options: GenerateOptions) -> Iterator[str]:
    """The completion's text as it comes; characters of several tokens are held back until they are whole."""
    ids, lengths = prompt_batch(tokenizer, [prompt], palm.device)
    drawn: list[int] = []
    shown = 0
    for token in palm.stream(
        int(lengths) + options.max_new_tokens,
        ids,
        eos_token=tokenizer.eos_ids,
        temperature=options.temperature,
        filter_logits_fn=None,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    ):
        drawn.append(int(token))
        text = tokenizer.decode(drawn)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(drawn)[shown:]


def ranked(
    palm: PaLM, reward: TextReward | None, tokenizer: Tokenizer, prompt: str, options: GenerateOptions
) -> list[tuple[float | None, str]]:
    """`num_samples` completions with their scores, the best first where there is a reward model."""
    ids, lengths = repeat_prompts(*prompt_batch(tokenizer, [prompt], palm.device), options.num_samples)
    out = palm.generate(
        int(lengths[0]) + options.max_new_tokens,
        ids,
        options.temperature,
        filter_logits_fn=None,
        pad_value=tokenizer.pad_id,
        eos_token=tokenizer.eos_ids,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        return_log_probs=True,
    )
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(out.sequence, out.response_mask, strict=True)]
    if reward is None:
        return [(None, text) for text in texts]
    scores = reward([prompt] * len(texts), texts).tolist()
    return sorted(zip(scores, texts, strict=True), reverse=True)


class Talk:
    """What has been said so far, and what a line makes of it: a text to complete, or with `chat` a conversation."""

    def __init__(self, chat: bool, system: str | None = None):
        if system is not None and not chat:
            raise ValueError("--system needs --chat, and a model with a chat template")
        self.chat, self.said = chat, ""
        self.messages = [] if system is None else [Message("system", system)]

    def prompt(self, line: str) -> str:
        return Conversation([*self.messages, Message("user", line)]) if self.chat else self.said + line

    def remember(self, line: str, answer: str) -> None:
        self.said += f"{line}{answer}\n"
        if answer.strip():  # no template takes an empty message
            self.messages += [Message("user", line), Message("assistant", answer)]


def run(options: GenerateOptions) -> None:
    device = choose_device(options.device)
    palm, tokenizer = open_model(options.model, device, options.dtype)
    talk = Talk(tokenizer.has_chat if options.chat is None else options.chat, options.system)
    reward = None
    if options.reward:
        reward = text_reward(options.reward, device, options.whole_text, options.max_new_tokens + 512)

    def answer(line: str, options: GenerateOptions) -> str:
        """Print an answer (or several), behind the line that it completes; returns the first."""
        prompt, shown = talk.prompt(line), "" if talk.chat else line
        if reward is None and options.num_samples == 1:
            print(shown, end="", flush=True)
            text = ""
            for piece in pieces(palm, tokenizer, prompt, options):
                print(piece, end="", flush=True)
                text += piece
            print()
            return text
        answers = ranked(palm, reward, tokenizer, prompt, options)
        for score, text in answers[:1] if reward is not None else answers:
            print(f"{shown}{text}" if score is None else f"[{score:.3f}] {shown}{text}")
        return answers[0][1]

    if options.prompt is not None:
        answer(options.prompt, options)
        return
    for turn, line in enumerate(typed_lines()):
        seed = None if options.seed is None else options.seed + turn  # or every line would get the same noise
        text = answer(line, replace(options, seed=seed))
        if options.remember:
            talk.remember(line, text)


def typed_lines() -> Iterator[str]:
    """Lines from the terminal until an empty one or the end; those of a pipe that are not empty."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            return
        if line:
            yield line
        elif terminal:
            return


OPTIONS = (GenerateOptions,)
