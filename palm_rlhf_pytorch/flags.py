"""Command-line flags from dataclass fields: name, type, default and help are written once."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field that a flag is made of."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        raise TypeError("defaults of options are immutable; use a tuple")
    return dataclasses.field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """A field without default: its flag must be given."""
    return dataclasses.field(metadata={"help": help, "choices": None})


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One flag for each field of the dataclasses, grouped by class; fields of the same name share one."""
    seen: set[str] = set()
    for cls in classes:
        title = (cls.__doc__ or cls.__name__).strip().split("\n")[0].rstrip(".")
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in seen:
                group.add_argument("--" + field.name.replace("_", "-"), **_settings(field, hints[field.name]))
                seen.add(field.name)


def from_flags(cls: type[T], namespace: argparse.Namespace) -> T:
    """The dataclass that the parsed flags describe."""
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(cls)}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _settings(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    kind, many = _plain_type(hint)
    help_text = field.metadata.get("help", "")
    if field.default is dataclasses.MISSING:
        return {"type": kind, "required": True, "help": help_text}
    if kind is bool:
        # BooleanOptionalAction gives --flag and --no-flag
        action = argparse.BooleanOptionalAction
        return {"action": action, "default": field.default, "help": f"{help_text} (default: {_shown(field.default)})"}
    settings = {"type": kind, "default": field.default, "help": f"{help_text} (default: {_shown(field.default)})"}
    if field.metadata.get("choices"):
        settings["choices"] = field.metadata["choices"]
    else:
        settings["metavar"] = kind.__name__.upper()
    return {**settings, "nargs": "+"} if many else settings


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
