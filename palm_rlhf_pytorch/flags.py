"""Command-line flags from dataclass fields: name, type, default and help are written once."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, least: float | None = None) -> Any:
    """A dataclass field that a flag is made of, which takes one of `choices`, or a number of `least` or more."""
    metadata = {"help": help, "choices": choices, "least": least}
    if isinstance(default, (list, dict)):
        raise TypeError("defaults of options are immutable; use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A field without default: its flag must be given."""
    return dataclasses.field(metadata={"help": help})


def checked(options: T) -> T:
    """The dataclass, or a ValueError where a field holds what its flag would refuse."""
    for field in dataclasses.fields(options):
        value, least, choices = (getattr(options, field.name), *(field.metadata.get(k) for k in ("least", "choices")))
        if value is None:
            continue
        if choices and value not in choices:
            raise ValueError(f"{field.name} is one of {', '.join(choices)}, got {value!r}")
        if least is not None and not value >= least:
            raise ValueError(f"{field.name} must be {least} or more, got {value}")
    return options


def add_flags(parser: argparse.ArgumentParser, *classes: type, defaults: Mapping[str, Any] | None = None) -> None:
    """One flag for each field of the dataclasses, grouped by class; fields of the same name share one.

    `defaults` take the place of those in the dataclasses, also where there is none.
    """
    defaults = defaults or {}
    seen: set[str] = set()
    for cls in classes:
        title = (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in seen:
                default = defaults.get(field.name, field.default)
                settings = _settings(field, hints[field.name], default)
                # help is set last: in some Pythons BooleanOptionalAction adds its own default to it
                group.add_argument("--" + field.name.replace("_", "-"), **settings).help = settings["help"]
                seen.add(field.name)


def from_flags(cls: type[T], namespace: argparse.Namespace) -> T:
    """The dataclass that the parsed flags describe."""
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(cls)}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _settings(field: dataclasses.Field, hint: Any, default: Any) -> dict[str, Any]:
    kind, many = _plain_type(hint)
    settings: dict[str, Any] = {"help": field.metadata.get("help", "")}
    if default is dataclasses.MISSING:
        settings["required"] = True
    else:
        settings["default"] = default
        if "(default:" not in settings["help"]:
            settings["help"] += f" (default: {_shown(default)})"
    if kind is bool:
        return {**settings, "action": argparse.BooleanOptionalAction}  # --flag and --no-flag
    settings["type"] = _at_least(kind, field.metadata.get("least"))
    if field.metadata.get("choices"):
        settings["choices"] = field.metadata["choices"]
    elif kind is not str:
        settings["metavar"] = kind.__name__.upper()
    return {**settings, "nargs": "+"} if many else settings


def _at_least(kind: type, least: float | None) -> Callable[[str], Any]:
    """`kind`, which refuses what is below `least`."""
    if least is None:
        return kind

    def convert(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return value

    convert.__name__ = kind.__name__  # what argparse calls it in its messages
    return convert


def _plain_type(hint: Any) -> tuple[type, bool]:
    """int | None -> int; tuple[float, ...] -> float, several."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None or default == () else str(default).replace("%", "%%")
