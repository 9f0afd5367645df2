import gzip
import json
from collections import Counter

import pytest
import torch
from chat import assistant, system, user

from palm_rlhf_pytorch.conversation import Conversation
from palm_rlhf_pytorch.data import (
    DataError,
    Demonstration,
    Labelled,
    Pair,
    Rating,
    bin_ratings,
    first_words,
    load_hf_dataset,
    quantile_edges,
    read_demonstrations,
    read_labelled,
    read_pairs,
    read_prompts,
    read_ratings,
    read_records,
    read_texts,
    rounding_edges,
    shared_prompt,
    split_holdout,
    uniform_edges,
)


def write(path, content: str | bytes | list[dict]):
    """Write text, bytes or JSON Lines, gzipped when the name says so."""
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RATINGS = [Rating("2 + 2 =", ' "four",\n😀', 4.5), Rating("hi", "", -1.0)]
RATING_FILES = {
    "r.jsonl": [rating._asdict() for rating in RATINGS],
    "r.json": [rating._asdict() for rating in RATINGS],
    "r.csv": 'prompt,response,rating\r\n2 + 2 =," ""four"",\n😀",4.5\r\n\r\nhi,,-1\r\n',
    "r.tsv": 'rating\tresponse\tprompt\n4.5\t" ""four"",\n😀"\t2 + 2 =\n-1\t\thi\n',
}


# readers


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("name", RATING_FILES)
def test_every_format_gives_the_same_ratings(tmp_path, name, gz):
    path = write(tmp_path / (name + gz), RATING_FILES[name])
    assert read_ratings(path) == RATINGS
    assert read_ratings(str(path)) == RATINGS


def test_ratings_of_text_alone_have_no_prompt(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": "whole", "rating": 3, "other": None}])
    assert read_ratings(path) == [Rating("", "whole", 3.0)]


@pytest.mark.parametrize("value", ["good", "nan", "", None, True, float("inf"), float("nan"), 10**400, [1]])
def test_ratings_must_be_finite_numbers(tmp_path, value):
    path = write(tmp_path / "r.jsonl", [{"text": "a", "rating": 1}, {"text": "b", "rating": value}])
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: expected a finite number in `rating`"):
        read_ratings(path)


def test_ratings_and_responses_need_text(tmp_path):
    for reader in (read_ratings, read_demonstrations, read_labelled):
        records = [{"prompt": " ", "response": "a", "rating": 1, "label": 1}]
        reader(write(tmp_path / "r.jsonl", records))
        with pytest.raises(DataError, match=r"r\.jsonl, line 2: expected a response, got blank text"):
            reader(write(tmp_path / "r.jsonl", [*records, {**records[0], "response": "\n"}]))


@pytest.mark.parametrize(
    "name, content",
    [
        ("d.jsonl", [{"prompt": "2 + 2 =", "response": " 4", "score": 1.5}, {"prompt": "hi", "response": ""}]),
        ("d.csv.gz", "response,prompt\n 4,2 + 2 =\n,hi\n"),
    ],
)
def test_demonstrations(tmp_path, name, content):
    expected = [Demonstration("2 + 2 =", " 4"), Demonstration("hi", "")]  # nothing is an answer too
    assert read_demonstrations(write(tmp_path / name, content)) == expected


@pytest.mark.parametrize("yes, no", [(True, False), (1, 0), ("true", "False"), ("1", " 0 ")])
def test_labels_are_true_or_false(tmp_path, yes, no):
    records = [{"prompt": "p", "response": "a", "label": label} for label in (yes, no)]
    assert read_labelled(write(tmp_path / "l.jsonl", records)) == [Labelled("p", "a", True), Labelled("p", "a", False)]
    rows = f"prompt,response,label\np,a,{yes}\np,a,{no}\n"
    assert [r.label for r in read_labelled(write(tmp_path / "l.csv", rows))] == [True, False]


@pytest.mark.parametrize("label", ["yes", "", None, 2, -1, 0.5, [True]])
def test_other_labels_are_refused(tmp_path, label):
    records = [{"prompt": "p", "response": "a", "label": label} for label in (True, label)]
    with pytest.raises(DataError, match=r"l\.jsonl, line 2: expected true or false \(or 1 or 0\) in `label`, got "):
        read_labelled(write(tmp_path / "l.jsonl", records))


@pytest.mark.parametrize(
    "reader, columns", [(read_demonstrations, "prompt + response"), (read_labelled, "prompt + response + label")]
)
def test_responses_need_their_columns(tmp_path, reader, columns):
    others = (columns.replace("response", "completion"), columns.replace("prompt + response", "messages"))
    allowed = ", or ".join((columns, *others)).replace("+", r"\+")
    with pytest.raises(DataError, match=f"expected the columns {allowed}, got prompt, text"):
        reader(write(tmp_path / "r.jsonl", [{"prompt": "p", "text": "t"}]))
    for content in ("", "\n"):
        with pytest.raises(DataError, match="got an empty file|at least one record"):
            reader(write(tmp_path / "r.jsonl", content))


def test_records_carry_the_line_they_begin_on(tmp_path):
    path = write(tmp_path / "r.csv", '\ufeffa,b\n1,"x\ny"\n\n2,z\n')
    assert list(read_records(path)) == [(2, {"a": "1", "b": "x\ny"}), (5, {"a": "2", "b": "z"})]
    path = write(tmp_path / "r.jsonl", '\n{"a": 1}\n  \n{"a": 2}')
    assert list(read_records(path)) == [(2, {"a": 1}), (4, {"a": 2})]


def test_a_csv_cell_may_hold_a_long_document(tmp_path):
    text = "word " * 100_000
    assert read_texts(write(tmp_path / "t.csv", f"text\n{text}\n")) == [text]


def test_texts_of_a_text_file(tmp_path):
    content = "one\r\n\n two \nthree"
    path = write(tmp_path / "t.txt", content)
    assert read_texts(path) == [content]
    assert read_texts(path, lines=True) == ["one", " two ", "three"]
    assert read_texts(write(tmp_path / "t.txt.gz", content)) == [content]


def test_texts_of_records(tmp_path):
    records = [{"text": "a", "prompt": "p"}, {"text": " \n"}, {"prompt": "q: ", "response": "r"}]
    assert read_texts(write(tmp_path / "t.jsonl", records)) == ["a", "q: r"]


def test_only_newlines_divide_json_lines(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"text": "a\u2028b\x85c"}\n')
    assert read_texts(path) == ["a\u2028b\x85c"]


def test_prompts(tmp_path):
    assert read_prompts(write(tmp_path / "p.txt", "first \n\n  \nsecond\r\n")) == ["first ", "second"]
    assert read_prompts(write(tmp_path / "p.csv", "prompt,id\nfirst,1\n")) == ["first"]
    with pytest.raises(DataError, match="line 2: expected a prompt, got blank"):
        read_prompts(write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": " "}]))


def test_pairs_with_a_prompt_and_an_optional_margin(tmp_path):
    rows = 'prompt,chosen,rejected,margin\nq,"good, yes",bad,1.5\nq,a,b,\n'
    assert read_pairs(write(tmp_path / "p.csv", rows)) == [
        Pair("q", "good, yes", "bad", 1.5),
        Pair("q", "a", "b", None),
    ]
    with pytest.raises(DataError, match=r"p\.jsonl, line 1: expected a finite number in `margin`, got 'big'"):
        read_pairs(write(tmp_path / "p.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b", "margin": "big"}]))


def test_a_given_prompt_is_not_divided_again(tmp_path):
    pair = {"prompt": "q", "chosen": "same start one", "rejected": "same start two"}
    assert read_pairs(write(tmp_path / "p.jsonl", [pair])) == [Pair(**pair)]


def test_transcript_pairs_are_divided(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: name?\n\nAssistant:"
    pair = {"chosen": start + " I am Ann.", "rejected": start + " I am Bob."}
    path = write(tmp_path / "p.jsonl", [pair])
    assert read_pairs(path) == [Pair(start, " I am Ann.", " I am Bob.", None)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        # the turn that differs is inside the last common "Assistant:" turn
        ("\n\nHuman: a\n\nAssistant: no", "\n\nHuman: a\n\nAssistant: nope", "\n\nHuman: a\n\nAssistant:"),
        ("Q: 6 * 7?\nA: 42", "Q: 6 * 7?\nA: 41", "Q: 6 * 7?\nA:"),  # not inside the number
        ("Write a poem.\nRoses", "Write a poem.\nRotten", "Write a poem.\n"),
        ("Q\tyes", "Q\tno", "Q"),
        ("Hi there", "Hi", ""),
        ("yes", "no", ""),
    ],
)
def test_shared_prompt_ends_at_a_boundary(chosen, rejected, prompt):
    assert shared_prompt(chosen, rejected) == shared_prompt(rejected, chosen) == prompt


def test_identical_responses_are_refused(tmp_path):
    pairs = [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "a"}]
    with pytest.raises(DataError, match=r"p\.jsonl, line 2: .*chosen equal to rejected"):
        read_pairs(write(tmp_path / "p.jsonl", pairs))


# what is refused, and where it is said to be


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: expected one JSON object per line"),
        ("a.jsonl", '{"text": "x"}\n["x"]\n', r"a\.jsonl, line 2: expected a JSON object, got list"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: expected one JSON object per line"),
        ("a.jsonl", "\n \n", r"a\.jsonl: expected at least one record"),
        ("a.jsonl", '{"text": 5}\n', r"a\.jsonl, line 1: expected text in `text`, got int"),
        ("a.jsonl", '{"text": "\\ud800"}\n', r"a\.jsonl, line 1: .*surrogate"),
        ("a.jsonl", '{"body": "x"}\n', r"line 1: expected the columns text, or prompt \+ response, got body"),
        ("a.jsonl", "{}\n", r"line 1: expected the columns .*, got none"),
        ("a.csv", "text,id\nx,1\ny\n", r"a\.csv, line 3: expected 2 cells \(text, id\), got 1"),
        ("a.csv", "text,id\nx,1,2\n", r"a\.csv, line 2: expected 2 cells \(text, id\), got 3"),
        ("a.csv", 'text\nx\n"open\n\n', r"a\.csv, line 3: expected well-formed cells between ','"),
        ("a.csv", "text,text\nx,y\n", r"a\.csv, line 1: expected different column names, got text, text"),
        ("a.csv", "text\n", r"a\.csv: expected at least one record"),
        ("a.tsv", "text\tid\nx\n", r"a\.tsv, line 2: expected 2 cells"),
        ("a.txt", b"fine\nb\xff\n", r"a\.txt, line 2: expected UTF-8, got byte 0xff at column 2"),
        ("a.csv", b"text\nfine\n\xe9\n", r"a\.csv, line 3: expected UTF-8, got byte 0xe9"),
        ("a.txt", "", r"a\.txt: expected data, got an empty file"),
        ("a.txt.gz", "", r"a\.txt\.gz: expected data, got an empty file"),
        ("a.txt", " \n\n", r"a\.txt: expected at least one text"),
        ("a.jsonl", '{"text": " "}\n', r"a\.jsonl: expected at least one text"),
        ("a.xml", "<a>", r"a\.xml: expected a name ending in \.txt, \.jsonl.*got '\.xml'"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path, name, content, says):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_texts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_gzip_is_refused_with_file_and_line(tmp_path):
    whole = gzip.compress("".join(f"line {i * i}\n" for i in range(20_000)).encode())
    path = tmp_path / "a.txt.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.gz, line \d\d+: expected a whole gzip file"):
        read_texts(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"a\.txt\.gz, line 1: expected a whole gzip file"):
        read_texts(path)
    # A changed byte in the middle fails the checksum; 0x07 after the 10 byte header is no deflate block.
    for place, byte in ((len(whole) // 2, whole[len(whole) // 2] ^ 0xFF), (10, 0x07)):
        corrupt = bytearray(whole)
        corrupt[place] = byte
        path.write_bytes(corrupt)
        with pytest.raises(DataError, match=r"a\.txt\.gz, line \d+: expected a whole gzip file"):
            read_texts(path)


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: expected a readable file \(No such file"):
        read_texts(tmp_path / "gone.txt")
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match=r"dir\.jsonl: .*directory.*hf:"):
        read_texts(tmp_path / "dir.jsonl")
    with pytest.raises(DataError, match=r"a\.txt: expected records"):
        read_ratings(write(tmp_path / "a.txt", "a"))


def test_missing_columns_list_what_came_and_what_is_allowed(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,score\na,1\n")
    allowed = (
        r"prompt \+ response \+ rating, or text \+ rating, or prompt \+ completion \+ rating, or messages \+ rating, "
        "got prompt, score"
    )
    with pytest.raises(DataError, match=r"a\.csv, line 2: expected the columns " + allowed):
        read_ratings(path)
    with pytest.raises(DataError, match=r"prompt \+ chosen \+ rejected, or chosen \+ rejected, got prompt"):
        read_pairs(path)


# data sets


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A directory with a data set of two splits (`two`) and one without splits (`one`)."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list([{"prompt": f"p{i}", "response": "r", "rating": i} for i in range(3)])
    test = datasets.Dataset.from_list([{"prompt": "t", "response": "", "rating": None}])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / "two"))
    train.save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_readers_take_data_sets(saved):
    assert read_prompts(f"hf:{saved}/two") == ["p0", "p1", "p2"]
    assert read_prompts(f"hf:{saved}/two:test") == ["t"]
    assert read_texts(f"hf:{saved}/one") == ["p0r", "p1r", "p2r"]
    assert read_ratings(f"hf:{saved}/one:train")[2] == Rating("p2", "r", 2.0)
    assert [number for number, _ in read_records(f"hf:{saved}/one")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz"])
def test_data_sets_of_local_files(saved, name):
    dataset = load_hf_dataset(str(saved / "one"))
    if name.endswith(".parquet"):
        dataset.to_parquet(str(saved / name))
    elif ".jsonl" in name:
        write(saved / name, list(dataset))
    else:
        dataset.to_csv(str(saved / name), sep="\t" if name.endswith(".tsv") else ",", index=False)
    assert read_prompts(f"hf:{saved / name}") == ["p0", "p1", "p2"]
    assert read_prompts(f"hf:{saved / name}:train[:2]") == ["p0", "p1"]


def test_load_hf_dataset_selects_columns(saved):
    dataset = load_hf_dataset(str(saved / "one"), columns=["rating"])
    assert dataset.column_names == ["rating"] and len(dataset) == 3
    with pytest.raises(DataError, match="expected the columns rating, score, got prompt, response, rating"):
        load_hf_dataset(str(saved / "one"), columns=["rating", "score"])


def test_bad_data_sets_are_refused(saved):
    with pytest.raises(DataError, match=r"hf:.*two:test, row 1: expected a finite number in `rating`, got None"):
        read_ratings(f"hf:{saved}/two:test")
    with pytest.raises(DataError, match="two: expected one of the splits train, test, got dev"):
        read_prompts(f"hf:{saved}/two:dev")
    with pytest.raises(DataError, match="one: expected no split.*got test"):
        read_prompts(f"hf:{saved}/one:test")
    with pytest.raises(DataError, match="hf:: expected hf:NAME or hf:NAME:split"):
        read_prompts("hf:")
    (saved / "empty").mkdir()
    with pytest.raises(DataError, match="hf:.*empty: could not load split train"):
        read_prompts(f"hf:{saved}/empty")


# bins and splits


def test_a_rating_on_an_edge_belongs_to_the_bin_above():
    assert bin_ratings([-9, 0.99, 1, 1.5, 2, 9], [1, 2]) == [0, 0, 1, 1, 2, 2]
    assert bin_ratings([3.0], []) == [0]
    assert bin_ratings([1, 2, 3, 4, 5], rounding_edges(1, 5)) == [0, 1, 2, 3, 4]


def test_bin_ratings_refuses():
    for edges in ([1, 1], [2, 1]):
        with pytest.raises(ValueError, match="strictly increasing"):
            bin_ratings([1], edges)
    with pytest.raises(ValueError, match="finite"):
        bin_ratings([float("nan")], [1])


def test_edges():
    assert rounding_edges(1, 5) == [1.5, 2.5, 3.5, 4.5]
    assert uniform_edges(0, 1, 4) == [0.25, 0.5, 0.75]
    assert uniform_edges(0, 1, 1) == []
    assert quantile_edges([4, 1, 3, 2, 5], 2) == [3]
    ratings = torch.randn(1000, generator=seeded()).tolist()
    assert set(Counter(bin_ratings(ratings, quantile_edges(ratings, 4))).values()) == {250}


def test_edges_refuse():
    with pytest.raises(ValueError, match="at least one bin"):
        uniform_edges(0, 1, 0)
    with pytest.raises(ValueError, match="low < high"):
        uniform_edges(1, 1, 2)
    with pytest.raises(ValueError, match="two ratings"):
        quantile_edges([1], 2)
    for ratings, bins in (([1, 2, 2, 2, 3], 4), ([1, 1, 1, 2], 2)):  # equal edges; an empty first bin
        with pytest.raises(ValueError, match=f"too often for {bins} quantile bins"):
            quantile_edges(ratings, bins)


def test_split_holdout():
    items = [f"item {i}" for i in range(100)]
    train, held_out = split_holdout(items, 0.2, seed=1)
    assert (len(train), len(held_out)) == (80, 20)
    assert sorted(train + held_out) == sorted(items)
    assert train == [item for item in items if item in train]  # the order stays
    assert split_holdout(items, 0.2, seed=1) == (train, held_out)
    assert split_holdout(items, 0.2, seed=2)[1] != held_out
    assert split_holdout(items, 0.0, seed=1) == (items, [])
    assert len(split_holdout(items, 0.001, seed=1)[1]) == 1
    for few, fraction in ((items, 1.0), (items, -0.1), (items[:1], 0.5)):
        with pytest.raises(ValueError, match="fraction must|cannot hold out"):
            split_holdout(few, fraction, seed=1)


@pytest.mark.parametrize(
    "text, count, expected",
    [
        ("The film is fine.", 2, ("The film", " is fine.")),
        ("The film", 2, ("The film", "")),
        ("The film", 5, ("The film", "")),
        ("  The\n film is", 2, ("  The\n film", " is")),
        ("The film ", 2, ("The film", " ")),
        ("The film", 0, ("", "The film")),
        ("", 3, ("", "")),
    ],
)
def test_first_words_and_how_it_went_on(text, count, expected):
    assert first_words(text, count) == expected
    assert "".join(expected) == text


# messages with roles

ASKED, ANSWERED = [user("q")], [user("q"), assistant("a")]
TALK = [system("s"), user("q"), assistant("a"), user("r")]


def same(found, expected):
    """Equal, and with the same messages where these are conversations."""
    assert found == expected
    for a, b in zip(found, expected, strict=True):
        a, b = (x if isinstance(x, str) else x.prompt for x in (a, b))
        assert getattr(a, "messages", None) == getattr(b, "messages", None)


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"messages": ANSWERED}, ASKED),
        ({"prompt": ASKED, "response": "a"}, ASKED),
        ({"prompt": ASKED, "response": [assistant("a")]}, ASKED),
        ({"prompt": ASKED, "completion": [assistant("a")]}, ASKED),
        ({"prompt": "q", "completion": [assistant("a")]}, ASKED),
        ({"messages": [*TALK, assistant("a")]}, TALK),
        ({"prompt": TALK, "response": "a"}, TALK),
    ],
)
def test_answers_to_messages(tmp_path, record, prompt):
    record |= {"rating": 2, "label": True}
    path, prompt = write(tmp_path / "m.jsonl", [record]), Conversation(prompt)
    same(read_demonstrations(path), [Demonstration(prompt, "a")])
    same(read_labelled(path), [Labelled(prompt, "a", True)])
    same(read_ratings(path), [Rating(prompt, "a", 2.0)])
    same(read_prompts(path), [prompt if record.get("prompt") != "q" else "q"])


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"prompt": ASKED, "chosen": [assistant("a")], "rejected": [assistant("b")]}, ASKED),
        ({"chosen": ANSWERED, "rejected": [*ASKED, assistant("b")]}, ASKED),
        ({"prompt": ASKED, "chosen": ANSWERED, "rejected": [*ASKED, assistant("b")]}, ASKED),
        ({"prompt": "q", "chosen": ANSWERED, "rejected": [*ASKED, assistant("b")]}, ASKED),
        ({"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}, ASKED),
        ({"prompt": TALK, "chosen": "a", "rejected": "b"}, TALK),
        ({"prompt": "r", "chosen": [*TALK, assistant("a")], "rejected": [*TALK, assistant("b")]}, TALK),
    ],
)
def test_choices_between_messages(tmp_path, record, prompt):
    path = write(tmp_path / "p.jsonl", [{**record, "margin": 1}])
    same(read_pairs(path), [Pair(Conversation(prompt), "a", "b", 1.0)])


def test_prompts_with_roles(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": TALK}, {"prompt": "plain"}, {"prompt": ASKED}])
    same(read_prompts(path), [Conversation(TALK), "plain", Conversation(ASKED)])
    path = write(tmp_path / "p.jsonl", [{"messages": TALK}, {"messages": ANSWERED}])
    same(read_prompts(path), [Conversation(TALK), Conversation(ASKED)])


def test_messages_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"messages": ANSWERED}, {"messages": [*TALK, assistant("a")]}]).save_to_disk(
        tmp_path / "d"
    )
    found = read_demonstrations(f"hf:{tmp_path / 'd'}")
    same(found, [Demonstration(Conversation(ASKED), "a"), Demonstration(Conversation(TALK), "a")])


@pytest.mark.parametrize(
    "reader, record, says",
    [
        (read_demonstrations, {"messages": ASKED}, "the assistant's message at the end of `messages`, got the user's"),
        (read_demonstrations, {"messages": []}, "the assistant's message at the end of `messages`, got none"),
        (read_demonstrations, {"messages": "hi"}, "in `messages` expected a list of messages, got str"),
        (read_demonstrations, {"messages": [assistant("a")]}, "before the answer is the user's, got none"),
        (read_demonstrations, {"messages": [*ASKED, assistant(" ")]}, "message 2, got an empty content"),
        (read_demonstrations, {"messages": [{"role": "bot", "content": "a"}]}, "expected the role system, user or"),
        (read_demonstrations, {"messages": [user("\ud83d"), assistant("a")]}, "characters in message 1 of `mess"),
        (read_demonstrations, {"prompt": ANSWERED, "response": "a"}, "is the user's, got one of the assistant"),
        (read_demonstrations, {"prompt": "q", "response": ASKED}, "message at the end of `response`, got the user's"),
        (read_demonstrations, {"prompt": 3, "response": ASKED}, "`prompt` expected a list of messages, got int"),
        (read_prompts, {"prompt": ANSWERED}, "is the user's, got one of the assistant"),
        (read_prompts, {"messages": 3}, "expected a list of messages, got int"),
        (read_labelled, {"messages": ANSWERED, "label": 3}, "expected true or false"),
        (read_ratings, {"messages": ANSWERED, "rating": [1]}, "expected a finite number in `rating`"),
        (read_pairs, {"chosen": ANSWERED, "rejected": ANSWERED}, "got chosen equal to rejected"),
        (read_pairs, {"chosen": ANSWERED, "rejected": [user("r"), assistant("b")]}, "differ in the last message alone"),
        (read_pairs, {"chosen": ANSWERED, "rejected": "b"}, "expected a conversation"),
        (read_pairs, {"prompt": "r", "chosen": ANSWERED, "rejected": ANSWERED}, "of `prompt` to begin `chosen`"),
        (read_pairs, {"prompt": TALK, "chosen": ANSWERED, "rejected": ANSWERED}, "of `prompt` to begin `chosen`"),
    ],
)  # fmt: skip
def test_bad_messages_are_refused_with_their_line(tmp_path, reader, record, says):
    good = {"messages": ANSWERED, "label": True, "rating": 1, "prompt": "q", "chosen": "a", "rejected": "b"}
    if "prompt" not in record and "messages" in record:
        del good["prompt"]
    with pytest.raises(DataError, match=r"m\.jsonl, line 2: .*" + says):
        reader(write(tmp_path / "m.jsonl", [good, record]))
