"""The command `palm-rlhf`: one subcommand a step of the path, flags and help from dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from tqdm import tqdm

from palm_rlhf_pytorch.flags import add_flags, from_flags
from palm_rlhf_pytorch.version import __version__

COMMANDS = {
    "quickstart": "the whole path in minutes, on an embedded corpus: pretrain, reward, PPO, a judged table",
    "pretrain": "train a PaLM on text",
    "reward": "train a reward model on ratings or on choices between two responses",
    "sft": "train a model on responses to prompts",
    "dpo": "improve a model by choices between two responses (DPO, IPO, SimPO)",
    "kto": "improve a model by responses labelled good or bad",
    "rejection": "answer prompts several times, and train a model on the best answers by a reward",
    "ppo": "improve a PaLM with PPO against a reward model",
    "rl": "improve a model with GRPO, RLOO, TPO, ... and any reward: a model's, or a rule's",
    "generate": "complete a prompt, or chat line by line",
    "export": "write a trained model for transformers, vLLM and others, or as a PEFT adapter",
}


class LogLines(logging.Handler):
    """Writes what is logged to stderr, on lines of their own above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one sentence, not with all flags there are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists all)\n")


def build_parser(
    only: str | None = None, defaults: Mapping[str, Any] | None = None, arguments: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """The parser; with `only`, just that command's flags are made (the others would be imported for nothing)."""
    parser = Parser(prog="palm-rlhf", description="RLHF end to end on the PaLM architecture.")
    parser.add_argument("--version", action="version", version=f"palm-rlhf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        if name == only:
            classes, own = options_of(name, arguments)
            add_flags(command, *classes, defaults={**own, **(defaults or {})})
    return parser


def options_of(name: str, arguments: Sequence[str] = ()) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The dataclasses of a command's flags, and defaults that are not theirs; both may depend on what is asked for."""
    module = import_module(f"palm_rlhf_pytorch.cli.{name}")
    return module.options_for(arguments) if hasattr(module, "options_for") else (module.OPTIONS, {})


def runner_of(name: str) -> Callable[..., object]:
    return import_module(f"palm_rlhf_pytorch.cli.{name}").run


def remembered(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What the run that --resume goes on with was started with: only flags that change need to be given again."""
    fields = {field.name: field for cls in options_of(name, arguments)[0] for field in dataclasses.fields(cls)}
    if "--resume" not in arguments or "resume" not in fields:
        return {}
    run_directory = import_module("palm_rlhf_pytorch.run_directory")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--out", default=fields["out"].default)
    return run_directory.RunDirectory(early.parse_known_args(arguments)[0].out).options(name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend is said in one sentence on stderr, with exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in arguments if word in COMMANDS), None)
    logging.basicConfig(format="%(message)s", handlers=[LogLines()])
    logging.getLogger("palm_rlhf_pytorch").setLevel(logging.INFO)
    try:
        if name is None:
            build_parser().parse_args(arguments)
        earlier = remembered(name, arguments)
        if "algorithm" in earlier:  # its flags are those of a run gone on with
            arguments = [*arguments, "--algorithm", earlier["algorithm"]]
        namespace = build_parser(name, earlier, arguments).parse_args(arguments)
        runner_of(name)(*(from_flags(cls, namespace) for cls in options_of(name, arguments)[0]))
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"palm-rlhf {name}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\npalm-rlhf {name}: {str(error) or 'stopped'}", file=sys.stderr)
        return 130
    return 0
