import argparse
from dataclasses import dataclass

import pytest

from palm_rlhf_pytorch.flags import add_flags, from_flags, option, required


@dataclass(frozen=True)
class Options:
    """What to do. And more."""

    data: str = required("a file")
    steps: int = option(10, "how many", least=1)
    lr: float = option(1e-3, "how fast")
    lora: bool = option(True, "adapters only")
    edges: tuple[float, ...] = option((), "where to cut")
    top_k: int | None = option(None, "how many to keep")
    kind: str = option("a", "which one", choices=("a", "b"))
    seed: int | None = option(None, "seed (default: another every time)")
    share: str = option("10%", "how much")


@dataclass(frozen=True)
class More:
    """More of it"""

    many: tuple[str, ...] = required("one or more")
    steps: int = option(99, "never asked for")


def parse(*arguments, classes=(Options,), defaults=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, *classes, defaults=defaults)
    return parser.parse_args(arguments)


def options(*arguments, **keywords):
    return from_flags(Options, parse(*arguments, **keywords))


def test_defaults_are_the_dataclass_s():
    assert options("--data", "x") == Options("x")


def test_values_have_the_fields_types():
    made = options("--data", "x", "--steps", "3", "--lr", "1", "--edges", "1", "2.5", "--top-k", "4", "--kind", "b")
    assert made == Options("x", 3, 1.0, True, (1.0, 2.5), 4, "b")
    assert type(made.steps) is int and type(made.lr) is float and type(made.edges) is tuple


def test_a_bool_is_a_flag_and_its_no():
    assert options("--data", "x", "--no-lora").lora is False
    assert options("--data", "x", "--no-lora", "--lora").lora is True


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "required: --data"),
        (("--data", "x", "--steps", "a"), "--steps: invalid int value: 'a'"),
        (("--data", "x", "--steps", "0"), "--steps: must be 1 or more, got 0"),
        (("--data", "x", "--kind", "c"), "invalid choice: 'c'"),
        (("--data", "x", "--edges"), "--edges: expected at least one argument"),
    ],
)
def test_mistakes_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        options(*arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_nan_is_not_enough():
    @dataclass
    class Share:
        share: float = option(0.1, "share", least=0)

    with pytest.raises(SystemExit):
        parse("--share", "nan", classes=(Share,))
    assert from_flags(Share, parse("--share", "0", classes=(Share,))).share == 0.0


def test_fields_of_one_name_share_a_flag():
    namespace = parse("--data", "x", "--many", "a", "b", classes=(Options, More))
    assert from_flags(More, namespace) == More(("a", "b"), 10)


def test_other_defaults_take_their_place_and_need_no_flag():
    made = options("--steps", "5", defaults={"data": "y", "steps": 3, "edges": [1.0], "lora": False, "unknown": 1})
    assert made == Options("y", 5, lora=False, edges=(1.0,))


def test_help_says_every_default_once():
    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    text = " ".join(parser.format_help().split())
    assert "What to do. And more:" in text
    for line in ("--lr FLOAT how fast (default: 0.001)", "adapters only (default: on)", "(default: none)", "{a,b}"):
        assert line in text
    assert "how much (default: 10%)" in text
    assert text.count("default:") == 8 and "seed (default: another every time) " in text
    assert "a file (" not in text


def test_mutable_defaults_are_refused():
    with pytest.raises(TypeError, match="immutable"):
        option([], "a list")
