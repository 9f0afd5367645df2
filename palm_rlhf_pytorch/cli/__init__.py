"""The command `palm-rlhf`: one subcommand a step of the path, flags and help from dataclasses."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from palm_rlhf_pytorch.flags import add_flags, from_flags
from palm_rlhf_pytorch.version import __version__

COMMANDS = {
    "quickstart": "the whole path in minutes, on an embedded corpus: pretrain, reward, PPO, a judged table",
    "pretrain": "train a PaLM on text",
    "reward": "train a reward model on ratings or on choices between two responses",
    "ppo": "improve a PaLM with PPO against a reward model",
    "generate": "complete a prompt, or chat line by line",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser; with `only`, just that command's flags are made (the others would be imported for nothing)."""
    parser = argparse.ArgumentParser(prog="palm-rlhf", description="RLHF end to end on the PaLM architecture.")
    parser.add_argument("--version", action="version", version=f"palm-rlhf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if name == only:
            add_flags(command, *options_of(name))
    return parser


def options_of(name: str) -> tuple[type, ...]:
    return import_module(f"palm_rlhf_pytorch.cli.{name}").OPTIONS


def runner_of(name: str) -> Callable[..., object]:
    return import_module(f"palm_rlhf_pytorch.cli.{name}").run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what a user can mend is said in one sentence on stderr, with exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in arguments if word in COMMANDS), None)
    namespace = build_parser(name).parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        runner_of(name)(*(from_flags(cls, namespace) for cls in options_of(name)))
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"palm-rlhf {name}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npalm-rlhf {name}: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
