"""--reward and --prompts: what answers are judged by, models and rules, and what they answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.cli.common import text_reward
from palm_rlhf_pytorch.data import first_words, read_prompts, read_texts
from palm_rlhf_pytorch.flags import option, required

PROMPTS = "prompts: a .txt with one a line, or records with a prompt column (text, or messages with roles)"


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """By what reward, on what prompts"""

    reward: tuple[str, ...] = required(
        "directory of a reward run, or FILE.py:FUNCTION, called with two lists of text (prompts, responses) for a "
        "number each (a prompt with roles is text that also has .messages); of several the mean counts, or where any "
        "ends in =WEIGHT the weighted sum (of the others with 1)"
    )
    prompts: str = required(PROMPTS)
    prompt_words: int = option(0, "take the first words of the texts in --prompts instead of whole prompts", least=0)
    whole_text: bool | None = option(
        None, "rate prompt and response as one text (default: where the reward was learned on texts alone)"
    )


def prompt_texts(options: RewardOptions) -> list[str]:
    if options.prompt_words == 0:
        return read_prompts(options.prompts)
    texts = read_texts(options.prompts, lines=True)
    openings = (first_words(text, options.prompt_words) for text in texts)
    prompts = list(dict.fromkeys(prompt for prompt, rest in openings if rest.strip()))
    if not prompts:
        raise ValueError(f"{options.prompts}: no text has more than the {options.prompt_words} words of --prompt-words")
    return prompts


def rewards(options: RewardOptions, device: torch.device, max_len: int) -> Any:
    """What --reward names, a reward as `Scorer` takes it; of several each is logged. Reward runs without weights are
    one model, the mean of theirs.
    """
    places = [place_and_weight(text) for text in options.reward]
    runs = [place for place, _ in places if not is_rule(place)]
    weighed = any(weight is not None for _, weight in places)
    found = [(place.rpartition(":")[2], rule(place), weight) for place, weight in places if is_rule(place)]
    models = [(Path(place).name, [place], weight) for place, weight in places if place in runs] if weighed else []
    if runs and not weighed:
        models = [("model", runs, float(len(runs)))]
    found += [(name, text_reward(some, device, options.whole_text, max_len), weight) for name, some, weight in models]
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--reward: each needs a name of its own (that of reward runs is 'model'), got {names}")
    if len(found) == 1 and not weighed:
        return found[0][1]
    share = 1.0 if weighed else 1 / len(places)
    return {name: (reward, share * (1.0 if weight is None else weight)) for name, reward, weight in found}


def place_and_weight(text: str) -> tuple[str, float | None]:
    """PLACE or PLACE=WEIGHT."""
    place, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, None
    try:
        return place, float(weight)
    except ValueError:
        raise ValueError(f"--reward {text!r}: behind = stands its weight, a number, got {weight!r}") from None


def is_rule(place: str) -> bool:
    return ".py:" in place


def rule(place: str) -> Callable[..., Any]:
    """The function that FILE.py:FUNCTION names."""
    path, _, name = place.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--reward {place!r}: there is no file {path!r}")
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:  # what the file imports from beside it
        sys.path.append(folder)
    spec = spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {place!r}: {path} has no function {name!r}")
    return function
