"""Files and data sets to texts, ratings, demonstrations, labels, pairs and prompts.

Wherever a reader takes a path it takes a plain text (.txt), JSON Lines (.jsonl, .json), CSV or TSV file in
UTF-8, each also gzipped (.gz), or `hf:NAME[:split]`, read through `datasets`. In records, prompts and responses are
text, or lists of messages {role, content}: prompts with roles become a `Conversation`.
"""

import csv
import gzip
import json
import math
import os
import random
import re
import statistics
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from palm_rlhf_pytorch.conversation import Conversation, Message, checked_messages
from palm_rlhf_pytorch.extras import require

T = TypeVar("T")
Record = dict[str, Any]

HF_PREFIX = "hf:"
JSON_FORMATS = (".jsonl", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
RECORD_FORMATS = (*JSON_FORMATS, *DELIMITERS)
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
ASSISTANT_TURN = "\n\nAssistant:"  # how Anthropic's hh transcripts open a response
SURROGATE = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """A data file that cannot be used: says where, what was expected and what came."""


class Rating(NamedTuple):
    prompt: str
    response: str
    rating: float


class Demonstration(NamedTuple):
    prompt: str
    response: str


class Labelled(NamedTuple):
    """A response and whether it is desirable."""

    prompt: str
    response: str
    label: bool


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None


# readers of training data


def read_texts(path: str | Path, *, lines: bool = False) -> list[str]:
    """Documents to pretrain on; blank ones are skipped.

    A .txt file is one document with its newlines, or with `lines` one document per line. A record gives its
    `text`, or else its `prompt` and `response` joined.
    """
    if _format(path) != ".txt":
        found = _columns_of(path, ("text",), ("prompt", "response"))
        texts = ["".join(_text(record, column, where) for column in columns) for where, record, columns in found]
    elif lines:
        texts = [_without_newline(line) for _, line in _lines(path)]
    else:
        texts = ["".join(line for _, line in _lines(path))]
    return _not_empty([text for text in texts if text.strip()], path, "text")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts: the lines of a .txt file that are not blank, or the `prompt` column of records."""
    if _format(path) == ".txt":
        lines = (_without_newline(line) for _, line in _lines(path))
        return _not_empty([line for line in lines if line.strip()], path, "prompt")
    found = _columns_of(path, ("prompt",), ("messages",))
    return [_prompt(record, columns[0], where) for where, record, columns in found]


def read_ratings(path: str | Path) -> list[Rating]:
    """Rated responses, from records of `prompt`, `response`, `rating`, or of `text`, `rating` (no prompt), or of
    `messages`, `rating`.
    """
    found = _responses(path, "rating", ("text", "rating"))
    return [Rating(prompt, response, _number(record, "rating", where)) for where, record, prompt, response in found]


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """Responses to learn, from records of `prompt`, `response`, or of `messages`, whose last is the response."""
    return [Demonstration(prompt, response) for _, _, prompt, response in _responses(path)]


def read_labelled(path: str | Path) -> list[Labelled]:
    """Responses that are desirable or not, from records of `prompt`, `response`, `label` (true or false, 1 or 0), or of
    `messages`, `label`.
    """
    found = _responses(path, "label")
    return [Labelled(prompt, response, _truth(record, "label", where)) for where, record, prompt, response in found]


def _responses(path: str | Path, what: str = "", *layouts: tuple[str, ...]) -> Iterator[tuple[str, Record, str, str]]:
    """Every record with its place in words, its prompt ("" of a `text`) and its response; `what` it is to say of them.
    A `prompt` with a `completion`, as TRL writes it, is one with a `response`.
    """
    own = (what,) if what else ()
    named = [(*columns, *own) for columns in (("prompt", "response"), ("prompt", "completion"), ("messages",))]
    for where, record, columns in _columns_of(path, named[0], *layouts, *named[1:]):
        response = next(name for name in columns if name != "prompt")
        if response == "messages" or any(isinstance(record[c], list) for c in columns if c != what):
            yield where, record, *_answered(record, response, where)
            continue
        prompt, text = (_text(record, name, where) if name in columns else "" for name in ("prompt", response))
        if not (prompt + text).strip():
            raise DataError(f"{where}: expected a response, got blank text.")
        yield where, record, prompt, text


def read_pairs(path: str | Path) -> list[Pair]:
    """Comparisons, from records of `prompt`, `chosen`, `rejected`, or of `chosen`, `rejected` alone.

    Without a prompt column they are whole transcripts, divided by `shared_prompt`; or lists of messages, which differ
    in the last. A `margin` is optional, row by row.
    """
    pairs = []
    for where, record, columns in _columns_of(path, ("prompt", "chosen", "rejected"), ("chosen", "rejected")):
        divide = _answered_pair if any(isinstance(record[column], list) for column in columns) else _text_pair
        prompt, chosen, rejected = divide(record, columns, where)
        if chosen == rejected:
            raise DataError(f"{where}: expected two different responses, got chosen equal to rejected.")
        has_margin = record.get("margin") not in (None, "")
        margin = _number(record, "margin", where) if has_margin else None
        pairs.append(Pair(prompt, chosen, rejected, margin))
    return pairs


def _text_pair(record: Record, columns: tuple[str, ...], where: str) -> tuple[str, str, str]:
    *given, chosen, rejected = (_text(record, column, where) for column in columns)
    if given:
        return given[0], chosen, rejected
    prompt = shared_prompt(chosen, rejected)
    return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)


def _answered_pair(record: Record, columns: tuple[str, ...], where: str) -> tuple[Conversation, str, str]:
    (prompt, chosen), (other, rejected) = (_answered(record, column, where) for column in columns[-2:])
    if prompt.messages != other.messages:
        raise DataError(f"{where}: expected chosen and rejected to differ in the last message alone, got others too.")
    return prompt, chosen, rejected


def shared_prompt(chosen: str, rejected: str) -> str:
    """The prompt of two whole transcripts: their common prefix, cut back to where a response can begin.

    That is after the last "\\n\\nAssistant:" in it, or else at the last word boundary: after a newline, or
    before a space, because byte-level tokens carry the space in front of their word.
    """
    prefix = os.path.commonprefix([chosen, rejected])
    turn = prefix.rfind(ASSISTANT_TURN)
    if turn >= 0:
        return prefix[: turn + len(ASSISTANT_TURN)]
    return prefix[: max(prefix.rfind("\n") + 1, prefix.rfind(" "), prefix.rfind("\t"))]


# records


def read_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    """The records of a .jsonl, .csv or .tsv file with the line each begins on, or of a data set with its row.

    Numbers start at 1. CSV and TSV need a header and may quote cells; their values are strings.
    """
    kind = _format(path)
    if kind == HF_PREFIX:
        name, _, split = str(path).removeprefix(HF_PREFIX).partition(":")
        records = enumerate(load_hf_dataset(name, split or "train"), start=1)
    elif kind in JSON_FORMATS:
        records = _json_records(path)
    elif kind in DELIMITERS:
        records = _csv_records(path, DELIMITERS[kind])
    else:
        raise DataError(f"{path}: expected records ({', '.join(RECORD_FORMATS)}, or {HF_PREFIX}NAME), got {kind}.")
    number = 0
    for number, record in records:
        yield number, record
    if number == 0:
        raise DataError(f"{path}: expected at least one record, got none.")


def load_hf_dataset(name: str, split: str = "train", columns: Sequence[str] | None = None) -> Any:
    """One split of a `datasets` data set, with only `columns` if given.

    name: a directory written by `save_to_disk`, a local data file (.jsonl, .csv, .tsv, .txt, .parquet) or
    anything else that `datasets.load_dataset` takes, such as a name on the hub.
    """
    if not name:
        raise DataError(f"{HF_PREFIX}: expected {HF_PREFIX}NAME or {HF_PREFIX}NAME:split, got no name.")
    datasets = require("datasets", "hf")
    try:
        dataset = _open_dataset(datasets, name, split)
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{HF_PREFIX}{name}: could not load split {split} ({reason}).") from error
    missing = [column for column in columns or () if column not in dataset.column_names]
    if missing:
        came = ", ".join(dataset.column_names)
        raise DataError(f"{HF_PREFIX}{name}: expected the columns {', '.join(columns)}, got {came}.")
    return dataset if columns is None else dataset.select_columns(list(columns))


def _open_dataset(datasets: Any, name: str, split: str) -> Any:
    path = Path(name)
    if path.is_file():
        suffix = Path(name.removesuffix(".gz")).suffix
        builder = {".tsv": "csv", ".jsonl": "json", ".txt": "text"}.get(suffix, suffix[1:])
        delimiter = DELIMITERS.get(suffix)
        options = {} if delimiter is None else {"delimiter": delimiter}
        # `datasets` calls all of a single file "train"; slices such as train[:10] still work.
        return datasets.load_dataset(builder, data_files=name, split=split, **options)
    if (path / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(name)
        if split not in splits:
            raise DataError(f"{HF_PREFIX}{name}: expected one of the splits {', '.join(splits)}, got {split}.")
        return splits[split]
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(name)
        if split not in ("train", str(dataset.split)):
            raise DataError(f"{HF_PREFIX}{name}: expected no split, the directory holds only one, got {split}.")
        return dataset
    return datasets.load_dataset(name, split=split)


def _json_records(path: str | Path) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: expected one JSON object per line ({error}).") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}.")
        yield number, record


def _csv_records(path: str | Path, delimiter: str) -> Iterator[tuple[int, Record]]:
    rows = _csv_rows(path, delimiter)
    number, header = next(rows, (1, []))
    if len(set(header)) < len(header):
        raise DataError(f"{path}, line {number}: expected different column names, got {', '.join(header)}.")
    for number, row in rows:
        if len(row) != len(header):
            expected = f"{len(header)} cells ({', '.join(header)})"
            raise DataError(f"{path}, line {number}: expected {expected}, got {len(row)}.")
        yield number, dict(zip(header, row, strict=True))


def _csv_rows(path: str | Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with the line each begins on: a quoted cell can span lines."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    number = 1
    try:
        for row in reader:
            if row:
                yield number, row
            number = reader.line_num + 1
    except csv.Error as error:
        rule = "one that begins with a quote ends with one, and quotes inside are doubled"
        message = f"{path}, line {number}: expected well-formed cells between {delimiter!r} ({rule}; {error})."
        raise DataError(message) from error


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, newlines kept, numbered from 1.

    Split as bytes and decoded one by one: a bad byte is reported with its line, and only "\\n" ends a line.
    """
    number = 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8")
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x}"
        raise DataError(f"{path}, line {number}: expected UTF-8, got {bad} at column {error.start + 1}.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}, line {number + 1}: expected a whole gzip file ({error}).") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: expected a file, got a directory: for a data set write {HF_PREFIX}{path}.") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file ({error.strerror}).") from error
    if number == 0:
        raise DataError(f"{path}: expected data, got an empty file.")


def _format(path: str | Path) -> str:
    """ "hf:" or the suffix that names the format, looking through .gz."""
    if str(path).startswith(HF_PREFIX):
        return HF_PREFIX
    suffix = Path(str(path).removesuffix(".gz")).suffix
    allowed = (".txt", *RECORD_FORMATS)
    if suffix not in allowed:
        raise DataError(f"{path}: expected a name ending in {', '.join(allowed)} (or these with .gz), got {suffix!r}.")
    return suffix


def _columns_of(path: str | Path, *layouts: tuple[str, ...]) -> Iterator[tuple[str, Record, tuple[str, ...]]]:
    """Every record with its place in words and the first layout whose columns it has."""
    unit = "row" if _format(path) == HF_PREFIX else "line"
    for number, record in read_records(path):
        where = f"{path}, {unit} {number}"
        columns = next((layout for layout in layouts if set(layout) <= set(record)), None)
        if columns is None:
            allowed = ", or ".join(" + ".join(layout) for layout in layouts)
            raise DataError(f"{where}: expected the columns {allowed}, got {', '.join(record) or 'none'}.")
        yield where, record, columns


def _text(record: Record, column: str, where: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: expected text in `{column}`, got {type(value).__name__}.")
    _refuse_surrogate(value, f"`{column}`", where)
    return value


def _refuse_surrogate(text: str, place: str, where: str) -> None:
    """JSON can escape half a character, which no tokenizer can encode."""
    if SURROGATE.search(text):
        raise DataError(f"{where}: expected whole characters in {place}, got a lone surrogate.")


def _messages(record: Record, column: str, where: str) -> tuple[Message, ...]:
    """A list of messages; a `prompt` may be a text, which is a message of the user's."""
    value = record[column]
    try:
        messages = checked_messages(
            [Message("user", value)] if column == "prompt" and isinstance(value, str) else value
        )
    except ValueError as error:
        raise DataError(f"{where}: in `{column}` {error}.") from None
    for number, message in enumerate(messages, start=1):
        _refuse_surrogate(message.content, f"message {number} of `{column}`", where)
    return messages


def _conversation(messages: Sequence[Message], column: str, where: str) -> Conversation:
    try:
        return Conversation(messages)
    except ValueError as error:
        raise DataError(f"{where}: in `{column}` {error}.") from None


def _prompt(record: Record, column: str, where: str) -> str:
    """A prompt that is not blank. Of `messages` that end with the assistant's, those before."""
    if isinstance(record[column], list) or column == "messages":
        messages = _messages(record, column, where)
        answered = column == "messages" and messages and messages[-1].role == "assistant"
        return _conversation(messages[:-1] if answered else messages, column, where)
    prompt = _text(record, column, where)
    if not prompt.strip():
        raise DataError(f"{where}: expected a prompt, got blank text.")
    return prompt


def _answered(record: Record, column: str, where: str) -> tuple[Conversation, str]:
    """A conversation and the assistant's last message, which `column` holds: with the messages before it, or behind
    those of `prompt`. A text there is the response itself.
    """
    prompt = _messages(record, "prompt", where) if "prompt" in record and column != "messages" else ()
    if isinstance(record[column], str) and column != "messages":
        return _conversation(prompt, "prompt", where), _text(record, column, where)
    messages = _messages(record, column, where)
    if not messages or messages[-1].role != "assistant":
        came = f"the {messages[-1].role}'s" if messages else "none"
        raise DataError(f"{where}: expected the assistant's message at the end of `{column}`, got {came}.")
    if messages[0].role == "assistant":
        messages = (*prompt, *messages)
    elif messages[: len(prompt)] != prompt and not (isinstance(record["prompt"], str) and prompt[0] in messages):
        raise DataError(f"{where}: expected the messages of `prompt` to begin `{column}`, got others.")
    return _conversation(messages[:-1], column, where), messages[-1].content


def _number(record: Record, column: str, where: str) -> float:
    value = record[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: expected a finite number in `{column}`, got {value!r}.")
    return number


def _truth(record: Record, column: str, where: str) -> bool:
    value = TRUTHS.get(str(record[column]).strip().lower())
    if value is None:
        raise DataError(f"{where}: expected true or false (or 1 or 0) in `{column}`, got {record[column]!r}.")
    return value


def _not_empty(items: list[T], path: str | Path, what: str) -> list[T]:
    if not items:
        raise DataError(f"{path}: expected at least one {what}, got only blank lines or records.")
    return items


def _without_newline(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


# ratings to classes


def bin_ratings(ratings: Sequence[float], edges: Sequence[float]) -> list[int]:
    """The bin of each rating, 0 to len(edges): bin i holds edges[i - 1] <= rating < edges[i]."""
    if not all(low < high for low, high in pairwise(edges)):
        raise ValueError(f"edges must be strictly increasing, got {list(edges)}.")
    if not all(map(math.isfinite, [*ratings, *edges])):
        raise ValueError("ratings and edges must be finite numbers.")
    return [bisect_right(edges, rating) for rating in ratings]


def rounding_edges(low: int, high: int) -> list[float]:
    """One bin for each whole rating from `low` to `high`: (1, 5) -> [1.5, 2.5, 3.5, 4.5]."""
    return uniform_edges(low - 0.5, high + 0.5, high - low + 1)


def uniform_edges(low: float, high: float, num_bins: int) -> list[float]:
    """The inner edges of `num_bins` equally wide bins over [low, high]: (0, 1, 4) -> [0.25, 0.5, 0.75]."""
    if num_bins < 1 or not low < high:
        raise ValueError(f"need low < high and at least one bin, got {low}, {high} and {num_bins} bins.")
    return [low + (high - low) * i / num_bins for i in range(1, num_bins)]


def quantile_edges(ratings: Sequence[float], num_bins: int) -> list[float]:
    """The edges that put about equally many of `ratings` in each bin."""
    if num_bins < 1 or len(ratings) < 2:
        raise ValueError(f"need at least one bin and two ratings, got {num_bins} bins and {len(ratings)} ratings.")
    edges = statistics.quantiles(ratings, n=num_bins, method="inclusive")
    # An edge at the smallest rating would leave the first bin empty.
    if not all(low < high for low, high in pairwise([min(ratings), *edges])):
        raise ValueError(
            f"the ratings repeat too often for {num_bins} quantile bins (edges {edges}): "
            "use fewer bins, rounding_edges or uniform_edges."
        )
    return edges


def split_holdout(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(train, held out) in their original order; the same items and seed always give the same split.

    A fraction above 0 holds out at least one item, and at least one is always left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and less than 1, got {fraction}.")
    wanted = max(1, round(len(items) * fraction)) if fraction else 0
    if wanted >= len(items):
        raise ValueError(f"cannot hold out {wanted} of {len(items)} items: more items are needed.")
    held_out = set(random.Random(seed).sample(range(len(items)), wanted))
    parts: tuple[list[T], list[T]] = ([], [])
    for i, item in enumerate(items):
        parts[i in held_out].append(item)
    return parts


def first_words(text: str, count: int) -> tuple[str, str]:
    """(the first `count` words, the rest with its leading space): an opening to complete, and how it went on."""
    end = 0
    for _ in range(count):
        found = re.compile(r"\s*\S+").match(text, end)
        if found is None:
            break
        end = found.end()
    return text[:end], text[end:]
